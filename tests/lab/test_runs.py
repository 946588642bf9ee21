"""Run identity, directories and manifests."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

from sae_utils.activations.model_files import model_hash
from sae_utils.files import PACKAGE, ROOT, digest, file_hash, write_json
from sae_utils.lab import parameters, runs
from sae_utils.lab.parameters import Parameter, notebook_path, notebooks, parameters_of
from sae_utils.lab.runs import find_run, run_id, start_run

PARAMETERS = """
# Comments and annotations are as in a real notebook.
k: int = 8  # latents per token
rate: float = 1e-3
full = False
name = "topk"
sizes: list[int] = [1, 2]
rates = [0.1, 1]
seed: int = 0
output_dir: str = ""
"""


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """`notebook(name, parameters)` writes one; runs go to tmp_path/"runs"."""
    monkeypatch.setenv("SAE_UTILS_NOTEBOOKS", str(tmp_path))
    monkeypatch.setenv("SAE_UTILS_OUTPUT", str(tmp_path / "runs"))
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(runs, "_current", None)
    monkeypatch.delenv(parameters.TIER, raising=False)

    def write(name="01_toy", parameters=PARAMETERS, code="x = 1"):
        cells = [nbformat.v4.new_code_cell(source) for source in (parameters, code)]
        cells[0].metadata["tags"] = ["parameters"]
        metadata = {"kernelspec": {"name": "python3", "display_name": ""}, "language_info": {"name": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / f"{name}.ipynb")
        return tmp_path / f"{name}.ipynb"

    return write


def defaults(path):
    return {name: parameter.default for name, parameter in parameters_of(path).items()}


def test_parameters_are_read_as_papermill_reads_them(notebook):
    path = notebook()
    found = parameters_of(path)
    assert found["k"] == Parameter(8, "int")
    assert found["rate"] == Parameter(0.001, "float")
    assert found["full"] == Parameter(False, "bool")
    assert found["name"] == Parameter("topk", "str")
    assert found["sizes"] == Parameter([1, 2], "list[int]")
    assert found["rates"] == Parameter([0.1, 1.0], "list[float]")
    assert list(found) == list(papermill.inspect_notebook(path))


@pytest.mark.parametrize(
    "line", ["k = 2 * 4", "import os", "a = b = 1", "k: int | None = 3", "k = (1, 2)", "k: int = 1.5"]
)
def test_a_parameters_cell_that_papermill_would_get_wrong_is_refused(notebook, line):
    with pytest.raises((ValueError, TypeError), match="k|os|a = b"):
        parameters_of(notebook(parameters=line))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"worksheets": []}', '{"cells": [{"cell_type": "code"}]}', '{"cells": 1}']
)
def test_a_file_that_is_no_notebook_is_named(tmp_path, content):
    (tmp_path / "x.ipynb").write_text(content)
    with pytest.raises(ValueError, match="x.ipynb is n"):
        parameters_of(tmp_path / "x.ipynb")


def test_an_unknown_notebook_is_answered_with_the_near_one(notebook):
    notebook("01_train_topk")
    with pytest.raises(FileNotFoundError, match="did you mean '01_train_topk'"):
        notebook_path("01_train_tpok")


def test_studies_are_found_behind_the_chapters_and_no_two_share_a_name(notebook, tmp_path):
    chapter = notebook("02_toy")
    (tmp_path / "studies").mkdir()
    study = Path(shutil.copy(chapter, tmp_path / "studies" / "01_study.ipynb"))
    assert list(notebooks()) == ["02_toy", "01_study"] and notebook_path("01_study") == study
    shutil.copy(chapter, tmp_path / "studies")
    with pytest.raises(ValueError, match="02_toy is a chapter and a study"):
        notebook_path("02_toy")


def test_the_id_changes_with_code_parameters_text_and_model_only(notebook, tmp_path):
    text, model = tmp_path / "text.txt", tmp_path / "model"
    text.write_text("one")
    model.mkdir()
    (model / "config.json").write_text("{}")
    path = notebook()
    params = defaults(path) | {"dataset": str(text), "model": str(model)}
    first = run_id(path, params)
    assert len(first) == 12
    assert run_id(path, params | {"output_dir": "elsewhere"}) == first
    (model / "notes.json").write_text("not part of the model")
    assert run_id(path, params) == first

    others = [run_id(path, params | {"k": 9})]
    text.write_text("two")
    others.append(run_id(path, params))
    (model / "model.safetensors").write_text("weights")
    others.append(run_id(path, params))
    notebook(code="x = 2")
    others.append(run_id(path, params))
    assert len({first, *others}) == 5


def test_model_hash_of_files_and_names(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert model_hash(str(tmp_path)) == digest([("config.json", file_hash(tmp_path / "config.json"))])
    assert model_hash("gpt2@main") == "gpt2@main"


def test_a_run_from_start_to_finish(notebook, tmp_path):
    path = notebook()
    run = start_run("01_toy", defaults(path) | {"k": 16, "seed": 3, "something": "else"})
    drawn = random.random(), np.random.rand()
    assert run.dir == tmp_path / "runs" / "01_toy" / run.id and run.parameters["k"] == 16
    assert find_run("01_toy", run.parameters) is None
    run.checkpoint("topk").mkdir(parents=True)
    run.finish(
        {"fvu": np.float32(0.5), "ce": float("nan"), "alive": np.int64(3), "per_layer": np.ones(2), "a": {"b": 1}}
    )

    expected = {"a": {"b": 1}, "alive": 3, "ce": None, "fvu": 0.5, "per_layer": [1.0, 1.0]}
    assert (run.dir / "metrics.json").read_text() == json.dumps(expected, indent=1) + "\n"
    assert not (run.dir / "checkpoints").exists()
    found = find_run("01_toy", run.parameters)
    assert found.metrics == expected and found.stale() == ""
    manifest = found.manifest
    assert manifest["finished"] and manifest["seed"] == 3 and manifest["wall_seconds"] >= 0
    assert manifest["versions"]["numpy"] == np.__version__ and manifest["versions"]["torch"]
    assert (
        {"lab/runs.py", "lab/__init__.py", "files.py"}
        <= {file for file in manifest["sources"] if not file.startswith("/")}
        == {
            Path(module.__file__).relative_to(PACKAGE).as_posix()
            for name, module in sys.modules.items()
            if name.startswith("sae_utils.")
        }
    )
    assert set(manifest) >= {"git_commit", "git_dirty", "device", "corpus_hash", "model_hash", "requires"}

    again = start_run("01_toy", run.parameters)
    assert (random.random(), np.random.rand()) == drawn
    assert again.id == run.id and find_run("01_toy", run.parameters) is None, "rerun by hand: not finished any more"


def test_values_of_a_wrong_type_are_refused_before_anything_is_made(notebook, tmp_path):
    path = notebook()
    for name, value, declared in [
        ("k", "8", "int"),
        ("k", True, "int"),
        ("full", 1, "bool"),
        ("sizes", [1, 2.5], "int"),
    ]:
        with pytest.raises(TypeError, match=rf"{name}.*{declared}"):
            start_run("01_toy", defaults(path) | {name: value})
    with pytest.raises(NameError, match="k not set. Run the parameters cell"):
        start_run("01_toy", {name: value for name, value in defaults(path).items() if name != "k"})
    assert not (tmp_path / "runs").exists()
    assert start_run("01_toy", defaults(path) | {"rate": 1}).parameters["rate"] == 1.0, "an int serves as a float"


def test_numbers_of_numpy_are_numbers(notebook):
    given = {
        "k": np.int64(16),
        "rate": np.float32(0.5),
        "full": np.True_,
        "sizes": [np.uint8(3)],
        "rates": [np.float64(1), 2],
    }
    run = start_run("01_toy", defaults(notebook()) | given)
    assert [run.parameters[name] for name in given] == [16, 0.5, True, [3], [1.0, 2.0]]
    assert json.loads((run.dir / "manifest.json").read_text())["parameters"] == run.parameters
    with pytest.raises(TypeError, match="k=array.*is of type ndarray, but k is declared int"):
        start_run("01_toy", run.parameters | {"k": np.ones(2, int)})


def test_no_hook_of_a_model_is_refused_by_its_form(tiny_gpt2, tiny_neox, tiny_llama):
    for lm in (tiny_gpt2, tiny_neox, tiny_llama):
        assert [parameters.in_range("hook_name", name) for name in lm.hook_dict] == list(lm.hook_dict)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "", "a\0", None])
def test_names_of_what_a_run_saves_do_not_lead_out_of_it(notebook, name):
    run = start_run("01_toy", defaults(notebook()))
    for save in (run.checkpoint, run.sae):
        with pytest.raises(ValueError, match="cannot name what is saved in"):
            save(name)
    with pytest.raises(ValueError, match="cannot name what is saved in"):
        run.figure(None, "../x")


def test_a_shape_is_read_from_local_models_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "vocab_size": "many"}))
    assert parameters.shape_of(str(tmp_path)) == (3, None) and parameters.shape_of("gpt2") == (None, None)
    with pytest.raises(FileNotFoundError, match="no hub model can have this name"):
        parameters.shape_of("a\0")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds no JSON object"):
        parameters.shape_of(str(tmp_path))


def test_only_the_unfinished_run_of_the_same_sources_keeps_its_checkpoints(notebook):
    params = defaults(notebook())
    run = start_run("01_toy", params)
    run.checkpoint("topk").mkdir(parents=True)
    assert start_run("01_toy", params).checkpoint("topk").exists()
    write_json(run.dir / "manifest.json", run.manifest | {"sources": {"sae.py": "other"}})
    assert not start_run("01_toy", params).checkpoint("topk").exists()


def test_a_second_kernel_in_the_same_run_is_refused(notebook, monkeypatch):
    path = notebook()
    start = f"from sae_utils.lab.runs import start_run; run = start_run('01_toy', {defaults(path)})"
    other = [sys.executable, "-c", f"{start}; print('started', flush=True); input(); run.finish({{}})"]
    with subprocess.Popen(other, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as kernel:
        assert kernel.stdout.readline() == "started\n"
        monkeypatch.setattr(runs, "KERNEL_WAIT", 0.1)
        with pytest.raises(RuntimeError, match="another kernel is in the middle of this run"):
            start_run("01_toy", defaults(path))
        kernel.communicate("\n")
    start_run("01_toy", defaults(path))


def test_a_run_is_stale_if_its_sources_or_those_of_a_required_run_or_its_notebook_changed(notebook):
    base = notebook("01_toy")
    required = start_run("01_toy", defaults(base))
    required.finish({})
    params = defaults(notebook("02_toy"))
    run = start_run("02_toy", params)
    run.record(required, {})
    run.finish({})
    assert find_run("02_toy", params).stale() == ""
    assert list(run.manifest["requires"]) == [f"01_toy/{required.id}"]

    notebook("01_toy", code="x = 'changed'")
    assert "its notebook has changed" in find_run("02_toy", params).stale()
    manifest = json.loads((run.dir / "manifest.json").read_text())
    write_json(run.dir / "manifest.json", manifest | {"requires": {"../../x/1": {"sources": {}, "code": "c"}}})
    assert "required ../../x/1: its notebook has changed" in find_run("02_toy", params).stale()
    manifest["requires"][f"01_toy/{required.id}"]["sources"] = {"lab/runs.py": "other"}
    write_json(run.dir / "manifest.json", manifest)
    required_stale = f"required 01_toy/{required.id}: made by other sources: lab/runs.py"
    assert find_run("02_toy", params).stale() == required_stale
    write_json(run.dir / "manifest.json", manifest | {"sources": {"lab/runs.py": "other", "gone.py": "any"}})
    assert find_run("02_toy", params).stale() == "made by other sources: gone.py, lab/runs.py"


def test_only_an_edit_of_what_code_does_makes_runs_stale_and_only_those_that_loaded_it(notebook, tmp_path):
    """On a copy of the package: words change nothing, an operator in gated.py the run that loaded it, one in base.py both."""
    copy = tmp_path / "copy"
    shutil.copytree(PACKAGE, copy / "sae_utils", ignore=shutil.ignore_patterns("assets", "__pycache__"))

    def python(*argv):
        done = subprocess.run(
            [sys.executable, *argv], cwd=copy, env=os.environ | {"PYTHONPATH": ""}, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def edit(file, before, after):
        text = (copy / "sae_utils" / file).read_text()
        assert before in text
        (copy / "sae_utils" / file).write_text(text.replace(before, after, 1))

    def stale():
        listed = [line for line in python("-m", "sae_utils.sweep", "runs").splitlines() if line[:3] in ("01_", "02_")]
        assert len(listed) == 2
        return {line.split()[0]: re.findall(r"stale \((.*?)\)  ", line) for line in listed}

    loaded = {"01_toy": "TopKSAE", "02_toy": "GatedSAE"}
    for name, sae in loaded.items():
        path = notebook(name, code=f"from sae_utils import {sae}, start_run\n# a comment\nrun = start_run(...)")
        python(
            "-c", f"from sae_utils import {sae}, start_run; {sae}; start_run('{name}', {defaults(path)}).finish({{}})"
        )
    made = {name: next((tmp_path / "runs" / name).glob("*/manifest.json")).read_text() for name in loaded}
    assert '"saes/topk.py"' in made["01_toy"] and '"saes/gated.py"' not in made["01_toy"]
    assert '"saes/gated.py"' in made["02_toy"] and '"saes/base.py"' in made["01_toy"]

    assert stale() == {"01_toy": [], "02_toy": []}
    for file in ("base", "topk", "gated"):
        edit(f"saes/{file}.py", '"""', '"""Other words. ')
        edit(f"saes/{file}.py", "\n\n", "\n\n# a comment\n\n")
    cells = nbformat.read(tmp_path / "01_toy.ipynb", as_version=4)
    cells.cells[1].source = cells.cells[1].source.replace("# a comment", "# another")
    cells.cells.insert(0, nbformat.v4.new_markdown_cell("Prose"))
    nbformat.write(cells, tmp_path / "01_toy.ipynb")
    assert stale() == {"01_toy": [], "02_toy": []}
    edit("saes/gated.py", "* scale + b_mag", "* scale - b_mag")
    assert stale() == {"01_toy": [], "02_toy": ["made by other sources: saes/gated.py"]}
    edit("saes/base.py", "f @ self.W_dec + self", "f @ self.W_dec - self")
    assert stale()["01_toy"] == ["made by other sources: saes/base.py"]


def test_reference_runs_count_where_no_saes_are_needed(notebook, tmp_path):
    params = defaults(notebook())
    run = start_run("01_toy", params)
    run.finish({"fvu": 0.25})
    run.dir.rename(tmp_path / "moved")
    (tmp_path / "reference" / "01_toy").mkdir(parents=True)
    (tmp_path / "moved").rename(tmp_path / "reference" / "01_toy" / run.id)
    assert find_run("01_toy", params) is None
    assert find_run("01_toy", params, needs_saes=False).metrics == {"fvu": 0.25}


def test_torch_is_not_imported_but_seeded_if_the_notebook_has_it(notebook):
    path = notebook()
    start = f"from sae_utils.lab.runs import start_run; run = start_run('01_toy', {defaults(path)}); "

    def python(code):
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    bare = python(f"import sys, sae_utils.lab.sweep; {start} run.finish({{}}); print('torch' in sys.modules)")
    assert bare.stdout == "False\n", bare.stderr
    seeded = python(f"import torch; {start} print(torch.initial_seed())")
    assert seeded.stdout == "0\n", seeded.stderr
    late = python(f"{start} import torch; run.finish({{}})")
    assert "torch was imported after start_run" in late.stderr


def test_figures_are_saved(notebook):
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib.figure import Figure

    run = start_run("01_toy", defaults(notebook()))
    figure = Figure(figsize=(7, 4))
    figure.subplots().plot([1, 2])
    run.figure(figure, "loss")
    assert (run.dir / "figures" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_metrics_that_json_cannot_hold_are_refused(notebook):
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        start_run("01_toy", defaults(notebook())).finish({"a": [1, object()]})
