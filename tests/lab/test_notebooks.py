"""What every notebook keeps to, that the fast parameters fit, and that conftest.py tests notebooks as it says.

The notebooks themselves are collected by nbval (`--nbval-lax`, see pyproject.toml).
"""

import os
import subprocess
import sys

import nbformat
import papermill
import pytest

from sae_utils.files import ROOT
from sae_utils.lab import execute, parameters, sweep

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
FAST = ROOT / "tests" / "fast.toml"
ALWAYS = {
    "model",
    "dataset",
    "text_field",
    "dataset_config",
    "bos",
    "hook_name",
    "n_tokens",
    "seed",
    "device",
    "output_dir",
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run_pytest(*args, cwd):
    """pytest in a process of its own, as far from this repository's settings as it gets."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--nbval-current-env", *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


@each_notebook
def test_fast_parameters_are_declared_with_the_same_type_and_mean_one_run(path):
    assert len(parameters.combinations(parameters.read_sweep(FAST), path.stem)) == 1


@each_notebook
def test_parameters_are_few_complete_and_read_alike_by_papermill(path):
    found = parameters.parameters_of(path)
    assert len(found) <= 17
    assert ALWAYS <= set(found), f"missing: {ALWAYS - set(found)}"
    assert list(found) == list(papermill.inspect_notebook(path)), "papermill is confused by an = in a comment"


@each_notebook
def test_a_notebook_starts_and_finishes_its_run_and_hides_no_failure(path):
    cells = parameters.code_cells(path)
    assert f'run = start_run("{path.stem}", globals())' in "\n".join(source for _, source in cells)
    assert "run.finish(" in "\n".join(source for _, source in cells)
    assert not [tags for tags, _ in cells if {"raises-exception", "nbval-raises-exception", "nbval-skip"} & set(tags)]


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_every_sweep_file_is_valid(path):
    assert sweep.planned(path)


def test_executed_again_a_run_gives_equal_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv(parameters.TIER, str(FAST))
    monkeypatch.setenv("SAE_UTILS_OUTPUT", str(tmp_path / "runs"))
    executed = execute.run("02_train_gated").dir / "notebook.ipynb"
    check_strictly(executed, tmp_path)


def check_strictly(executed, tmp_path):
    """Run an executed notebook again and compare all outputs but those of cells tagged nbval-ignore-output."""
    copy = tmp_path / executed.name
    copy.write_bytes(executed.read_bytes())
    done = run_pytest("--nbval", copy, cwd=tmp_path)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# conftest.py, on notebooks of two cells
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """`toy(name, *code)` writes a notebook whose parameters are `k = 8` and `output_dir`, and a tier with k = 2."""
    monkeypatch.setenv("SAE_UTILS_NOTEBOOKS", str(tmp_path))
    monkeypatch.setenv("SAE_UTILS_OUTPUT", str(tmp_path / "runs"))
    monkeypatch.setenv(parameters.TIER, str(tmp_path / "fast.toml"))
    (tmp_path / "fast.toml").write_text("[shared]\nk = 2\n")

    def write(name, *code):
        start = f"from sae_utils.lab.runs import start_run\nrun = start_run('{name}', globals())"
        cells = [nbformat.v4.new_code_cell(source) for source in ("k = 8\noutput_dir = ''", start, *code)]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
        return tmp_path / f"{name}.ipynb"

    return write


def outcomes(path):
    done = run_pytest("-p", "conftest", "--nbval-lax", path, cwd=path.parent)
    words = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "XFAIL"))]
    return words, done.stdout


def test_the_small_parameters_reach_the_kernel_and_the_run(toy):
    words, out = outcomes(toy("01_toy", "assert k == 2 and run.parameters['k'] == 2", "run.finish({})"))
    assert words == ["PASSED"] * 4, out


def test_what_follows_a_failing_cell_is_not_run(toy):
    words, out = outcomes(toy("01_toy", "1 / (k - 2)", "k = 3", "k = 4"))
    assert sorted(words) == ["FAILED", "PASSED", "PASSED", "XFAIL", "XFAIL"], out
    assert "ZeroDivisionError" in out and out.count("Cell 2 failed") == 2, out


def test_an_unknown_magic_fails(toy):
    words, out = outcomes(toy("01_toy", "%no_such_magic"))
    assert sorted(words) == ["FAILED", "PASSED", "PASSED"], out


def test_a_parameter_that_no_notebook_declares_stops_the_tests(toy, tmp_path):
    path = toy("01_toy")
    (tmp_path / "fast.toml").write_text("[shared]\nkk = 2\n")
    assert "no notebook declares 'kk'" in run_pytest("-p", "conftest", "--nbval-lax", path, cwd=tmp_path).stderr


def test_strict_comparison_accepts_equal_and_refuses_unequal_outputs(toy, tmp_path):
    (tmp_path / "copy").mkdir()
    toy("01_toy", "print(k, run.id)\nimport random\nrandom.random()", "run.finish({})")
    check_strictly(execute.run("01_toy").dir / "notebook.ipynb", tmp_path / "copy")
    toy("02_toy", "import os\nprint(os.getpid())", "run.finish({})")
    executed = execute.run("02_toy").dir / "notebook.ipynb"
    with pytest.raises(AssertionError, match="Cell outputs differ"):
        check_strictly(executed, tmp_path / "copy")
