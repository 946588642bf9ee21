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
    items.sort(key=lambda item: item.path.name == "test_studies.py")  # last: it reads the runs that nbval made
    for item in items:
        if isinstance(item, IPyNbCell) and "parameters" in item.cell.metadata.get("tags", []):
            if notebooks().get(item.path.stem) == item.path.resolve():
                try:
                    fast = combinations(read_sweep(os.environ["SAE_UTILS_TIER"]), item.path.stem)[0]
                except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
                    raise pytest.UsageError(error.args[0]) from None
                item.cell.source += "\n" + PythonTranslator.codify(fast)


def pytest_runtest_setup(item):
    """Skip what follows a failing cell: nbval would go on without what that cell defines."""
    if isinstance(item, IPyNbCell) and (failed := getattr(item.parent, "failed_cell", None)):
        pytest.skip(f"{failed} failed")


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
