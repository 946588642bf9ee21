"""Notebooks as tests (nbval): small parameters, one failure per notebook, and magics that do not exist fail."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nbval.plugin import IPyNbCell
from papermill.translators import PythonTranslator

from sae_utils.lab.parameters import combinations, notebooks, read_sweep

FAST = Path(__file__).parent / "tests" / "fast.toml"
FIRST = ["notebooks", "06", "test_sweep", "00", "test_notebooks"]  # the groups that take longest


def group(nodeid):
    """What one worker of xdist runs in order: a file, or the notebooks that need each other's runs with their tests.

    07 and 08 compare the SAEs of 01 to 05. test_studies.py compares each chapter with its study.
    """
    file, _, test = nodeid.partition("::")
    name = test.partition("[")[2] if file.endswith("test_studies.py") else Path(file).stem
    return name if name.startswith("test_") else name[:2] if name[:2] in ("00", "06") else "notebooks"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hand out the groups in their order. The marks `xdist_group` of xdist 3.8 have no effect with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group
    return scheduler


def pytest_configure(config):
    """Kernels inherit the tier and a temporary place for runs, one for each worker of xdist: by hand, as nbval runs them,
    two kernels may not make the same run at once."""
    os.environ.setdefault("SAE_UTILS_TIER", str(FAST))
    if "SAE_UTILS_OUTPUT" not in os.environ or hasattr(config, "workerinput"):
        os.environ["SAE_UTILS_OUTPUT"] = directory = tempfile.mkdtemp(prefix="sae-utils-tests-")
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))


def pytest_collection_modifyitems(config, items):
    """Append the tier's parameters to each cell tagged `parameters`; deselect (and count) what needs a GPU, Triton or
    Ray where there is none."""
    here = {"cuda": torch.cuda.is_available()} | {name: find_spec(name) is not None for name in ("triton", "ray")}
    absent = [marker for marker in here if not here[marker]]
    if deselected := [item for item in items if any(map(item.get_closest_marker, absent))]:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    for item in items:
        if isinstance(item, IPyNbCell) and "parameters" in item.cell.metadata.get("tags", []):
            if notebooks().get(item.path.stem) == item.path.resolve():
                try:
                    fast = combinations(read_sweep(os.environ["SAE_UTILS_TIER"]), item.path.stem)[0]
                except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
                    raise pytest.UsageError(error.args[0]) from None
                item.cell.source += "\n" + PythonTranslator.codify(fast)
    order = {name: at for at, name in enumerate(FIRST)}
    items.sort(key=lambda item: (order.get(group(item.nodeid), len(FIRST)), item.path.name == "test_studies.py"))


def pytest_deselected(items):
    """A worker of xdist leaves the names of what it deselects to the run as a whole."""
    for item in items:
        if hasattr(item.config, "workeroutput"):
            item.config.workeroutput.setdefault("deselected", []).append(item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Count once, in the closing line, what every worker of xdist has deselected."""
    terminal = node.config.pluginmanager.get_plugin("terminalreporter")
    names = getattr(node, "workeroutput", {}).get("deselected", [])
    terminal.pytest_deselected([name for name in names if name not in terminal.stats.get("deselected", [])])


def pytest_runtest_setup(item):
    """Cells after a failing one are not run, for want of what it defines: they fail as expected, in a line each."""
    if isinstance(item, IPyNbCell) and (failed := getattr(item.parent, "failed_cell", None)):
        pytest.xfail(f"{failed} failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if isinstance(item, IPyNbCell):
        outputs = item.test_outputs or []
        stderr = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stderr")
        if report.passed and "UsageError:" in stderr:  # IPython reports an unknown magic there and goes on
            report.outcome, report.longrepr = "failed", stderr
        if report.failed:
            item.parent.failed_cell = item.name
    return report
