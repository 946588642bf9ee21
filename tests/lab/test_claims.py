"""Claims judged over seeds: values by hand, versions kept apart, collecting, and that README, claims.json and manifests agree."""

import base64
import io
import json
import math
import re
import shutil

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image

from sae_utils.files import ASSETS, ROOT, read_json, write_json
from sae_utils.lab import claims, parameters, runs, sweep
from sae_utils.lab.claims import TUNED_ON, Claim, judge, read, read_claims, summary, verdict

KEYS = set("paper claim metric values mean sd n comparison interval controls verdict run_ids".split())
PAPERS = {"2404.16014", "2405.12241", "2411.10397", "2410.14670", "2411.02124"}
CLAIM = Claim("0000.00000", "", "b is larger", "01_toy", "b - a", "k 8", [">", 0], "ours", {"a": "a"}, {"only b": "b"})


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)])
def test_intervals_are_those_of_the_tables_of_t(n, t):
    found = summary(range(n))
    assert (found["interval"][1] - found["mean"]) * math.sqrt(n) / found["sd"] == pytest.approx(t, abs=2e-3)


def test_a_value_is_read_by_path_alone_or_combined():
    metrics = {"a": 2.0, "of k": {"e2e k=8": 3.0}, "none": None}
    assert read(metrics, "of k/e2e k=8") == 3
    assert read(metrics, "of k/e2e k=8 - a") == 1
    assert read(metrics, "of k/e2e k=8 over a") == 1.5
    assert read(metrics, "none - a") is None and read(metrics, "a - none") is None
    assert read({"a": 1, "b": 0}, "a over b") is None


def test_a_name_that_is_not_there_is_said_with_those_that_are():
    with pytest.raises(KeyError, match="'x/yy' .did you mean 'y'.*at 'yy' there are y"):
        read({"x": {"y": 1}}, "x/yy")
    for metrics, value in (({"x": [5]}, "x/0"), ({"x": 1}, "x/y"), ({"x": None}, "x/y")):
        with pytest.raises(KeyError, match=f"metrics has no '{value}'"):
            read(metrics, value)
    with pytest.raises(TypeError, match="'x' of metrics is no number, but a dict"):
        read({"x": {}}, "x")


def test_mean_sd_and_interval_by_hand():
    found = summary([1.0, 2.0, 3.0])
    half = 4.3027 / math.sqrt(3)
    assert (found["mean"], found["sd"], found["n"]) == (2, 1, 3)
    assert found["interval"] == pytest.approx([2 - half, 2 + half], abs=1e-3)


def test_too_few_values_have_no_interval():
    assert summary([4.0]) == {"mean": 4, "sd": None, "n": 1, "interval": [None, None]}
    assert summary([None]) == {"mean": None, "sd": None, "n": 0, "interval": [None, None]}


@pytest.mark.parametrize(
    "interval, expected, word",
    [
        ([1, 2], (">", 0), "holds"),
        ([-2, -1], (">", 0), "fails"),
        ([-1, 1], (">", 0), "undecided"),
        ([1, 2], ("<", 3), "holds"),
        ([4, 5], ("<", 3), "fails"),
        ([0.99, 1.01], ("=", 1, 0.02), "holds"),
        ([0.9, 1.01], ("=", 1, 0.02), "undecided"),
        ([0.9, 0.95], ("=", 1, 0.02), "fails"),
        ([1.03, 1.05], ("=", 1, 0.02), "fails"),
        ([None, None], (">", 0), "undecided"),
    ],
)
def test_a_verdict_is_where_the_whole_interval_lies(interval, expected, word):
    assert verdict(interval, expected) == word


# ---------------------------------------------------------------------------------------------------------------------
# claims.toml
# ---------------------------------------------------------------------------------------------------------------------


def written(tmp_path, **changes):
    """A file of one claim, with these fields other than they should be; None leaves one out."""
    fields = CLAIM._asdict() | changes
    lines = [f"{field} = {json.dumps(value)}" for field, value in fields.items() if value and type(value) is not dict]
    lines += [
        'section = ""',
        *(f"{f}.{json.dumps(k)} = {json.dumps(v)}" for f in ("controls", "also") for k, v in fields[f].items()),
    ]
    (tmp_path / "claims.toml").write_text("[[claim]]\n" + "\n".join(lines))
    return tmp_path / "claims.toml"


def test_claims_are_read_as_they_are_written(tmp_path):
    assert read_claims(written(tmp_path)) == [CLAIM]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metric": None}, ".*missing 1 required .*'metric'"),
        ({"metrics": "b"}, ".*unexpected keyword argument 'metrics'"),
        ({"whose": "theirs"}, 'whose is \'theirs\', not "paper" or "ours"'),
        ({"bound": ["=", 1]}, r"bound is \['=', 1\], not "),
        ({"bound": [">", "0"]}, r"bound is \['>', '0'\], not "),
        ({"bound": ["≥", 0]}, r"bound is \['≥', 0\], not "),
        ({"bound": ">"}, "bound is >, not "),
    ],
)
def test_a_malformed_claim_is_refused_with_file_claim_and_field(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"{path}, claim 1 \('b is larger'\): {message}"):
        read_claims(path)


@pytest.mark.parametrize("text", ["[[claim]", "claim = 1", "[[claims]]\npaper = '1'", "claim = [1]"])
def test_a_file_without_claims_is_refused(tmp_path, text):
    (tmp_path / "claims.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'claims.toml'}"):
        read_claims(tmp_path / "claims.toml")


# ---------------------------------------------------------------------------------------------------------------------
# Runs, made by hand
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """outputs/reference/runs of this test."""
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference" / "runs")
    monkeypatch.setenv("SAE_UTILS_OUTPUT", str(tmp_path / "outputs"))
    monkeypatch.setenv("SAE_UTILS_NOTEBOOKS", str(tmp_path))
    monkeypatch.delenv(parameters.TIER, raising=False)
    (tmp_path / "sweep.toml").write_text("")
    return tmp_path / "reference" / "runs"


def committed(reference, seed, metrics, code="c", name="01_toy"):
    directory = reference / name / f"{code}{seed}"
    about = {
        "notebook": name,
        "run_id": directory.name,
        "seed": seed,
        "parameters": {"seed": seed, "k": 8},
        "finished": True,
    }
    about |= {
        "wall_seconds": 60.0,
        "gpu": None,
        "threads": 2,
        "code": code,
        "sources": {},
        "corpus_hash": "t",
        "model_hash": "m",
        "requires": {},
    }
    write_json(directory / "manifest.json", about)
    write_json(directory / "metrics.json", metrics)


def found(reference):
    return claims.reference_runs(reference.parents[1] / "sweep.toml")


def test_a_row_by_hand(reference):
    for seed, b in enumerate([99.0, 2.0, 3.0, 4.0]):  # seed 0 is for tuning
        committed(reference, seed, {"a": 1.0, "b": b})
    (row,) = claims.evaluate(found(reference), [CLAIM])
    assert set(row) == KEYS
    assert row["values"] == [1, 2, 3] and row["n"] == 3 and row["verdict"] == "undecided"  # 2 ± 2.48
    assert row["controls"]["a"]["mean"] == 1 and row["controls"]["a"]["verdict"] == "holds"
    assert row["controls"]["only b"]["mean"] == 3 and "verdict" not in row["controls"]["only b"]
    assert row["run_ids"] == ["01_toy/c1", "01_toy/c2", "01_toy/c3"]
    assert "expected > 0" in row["comparison"]


def test_the_table_has_the_control_and_says_how_many_hold_too(reference):
    for seed in range(1, 5):
        committed(reference, seed, {"a": 1.0, "b": 2.0, "zero": 0.0})
    other = CLAIM._replace(statement="so is this", controls={"nothing": "zero"})
    rows = claims.evaluate(found(reference), [CLAIM, other])
    assert "| **holds** | a: 1 [1, 1], holds |" in claims.table(rows)
    assert "| **holds** | nothing: 0 [0, 0], fails |" in claims.table(rows)
    assert "Of 2 claims" in claims.section(rows) and "as for 1 of the 2" in claims.section(rows)


def test_the_seed_that_was_tuned_on_alone_makes_no_row(reference):
    committed(reference, TUNED_ON, {"a": 1.0, "b": 2.0})
    assert claims.evaluate(found(reference), [CLAIM]) == []


def test_two_seeds_or_a_seed_without_a_value_decide_nothing(reference):
    for seed in range(3):
        committed(reference, seed, {"a": 1.0, "b": 2.0})
    assert judge(CLAIM, found(reference)["01_toy"])["verdict"] == "undecided"
    for seed in range(3, 5):
        committed(reference, seed, {"a": 1.0, "b": 2.0})
    assert judge(CLAIM, found(reference)["01_toy"])["verdict"] == "holds"
    committed(reference, 5, {"a": 1.0, "b": None})
    row = judge(CLAIM, found(reference)["01_toy"])
    assert row["verdict"] == "undecided" and row["n"] == 4 and row["values"][-1] is None


def test_runs_of_other_code_are_not_mixed_with_these(reference):
    for seed in range(3):
        committed(reference, seed, {"a": 1.0, "b": 2.0})
    committed(reference, 0, {"a": 1.0, "b": 99.0}, code="d")
    committed(reference, 1, {"a": 1.0, "b": 99.0}, code="d")
    assert [run.id for run in found(reference)["01_toy"].values()] == ["c0", "c1", "c2"]


def test_a_claim_without_runs_has_no_row(reference):
    assert claims.evaluate(found(reference), [CLAIM]) == []


@pytest.mark.parametrize(
    "name, content",
    [
        ("manifest.json", "[]"),
        ("manifest.json", "{"),
        ("manifest.json", None),
        ("manifest.json", '{"notebook": "01_toy", "finished": true}'),
        ("metrics.json", "[1]"),
        ("metrics.json", None),
        ("metrics.json", '{"a": 1.0}'),
        ("metrics.json", '{"a": 1.0, "b": "text"}'),
    ],
)
def test_a_damaged_reference_run_costs_one_row_and_is_named(reference, monkeypatch, capsys, name, content):
    """Of a damaged one the seed is lost, of one without a number the claims that need it."""
    monkeypatch.setattr(claims, "SWEEP", reference.parents[1] / "sweep.toml")
    positive = CLAIM._replace(statement="a is positive", metric="a", controls={}, also={})
    monkeypatch.setattr(claims, "read_claims", lambda: [CLAIM, positive])
    for seed in range(1, 6):
        committed(reference, seed, {"a": 1.0, "b": 2.0})
    damaged = reference / "01_toy" / "c5" / name
    damaged.unlink()
    damaged.write_text(content) if content else damaged.mkdir()
    monkeypatch.setattr(claims, "reference_runs", lambda: claims.by_seed(claims.committed(reference)))
    assert claims.main([]) == 0
    out, err = capsys.readouterr()
    assert "| a is positive | 1 [1, 1] |" in out and err.startswith("warning: ") and str(damaged) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("field", ["notebook", "run_id"])
@pytest.mark.parametrize("value", ["../../victim", "{tmp}/victim", "..", ".", "", "a\0b", "c1/../../../victim"])
def test_a_crafted_manifest_makes_nothing_change_elsewhere(reference, tmp_path, monkeypatch, field, value):
    monkeypatch.setattr(claims, "read_claims", lambda: [CLAIM])
    (tmp_path / "README.md").write_text("")
    for directory in ("victim", "victim/01_toy", "reference/victim"):
        (tmp_path / directory / "c9").mkdir(parents=True)
        for file in ("manifest.json", "metrics.json", "keep.txt"):
            (tmp_path / directory / "c9" / file).write_text("theirs")
    for seed in range(1, 5):
        committed(reference, seed, {"a": 1.0, "b": 2.0})
    manifest = reference / "01_toy" / "c1" / "manifest.json"
    write_json(manifest, read_json(manifest) | {field: value.format(tmp=tmp_path)})
    before = everything(tmp_path)
    with pytest.warns(UserWarning, match="does not belong here"):
        claims.collect(tmp_path / "sweep.toml", tmp_path / "README.md")
    written = {"reference/claims.json", "README.md"}
    gone = {"reference/runs/01_toy/c1/manifest.json", "reference/runs/01_toy/c1/metrics.json"}  # no run of this version
    assert {path: text for path, text in everything(tmp_path).items() if path not in written} == {
        path: text for path, text in before.items() if path not in written | gone
    }


def everything(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text() for path in files}


def test_collecting_passes_over_stray_files(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "read_claims", lambda: [CLAIM])
    (tmp_path / "README.md").write_text("")
    for seed in range(1, 5):
        committed(reference, seed, {"a": 1.0, "b": 2.0})
    committed(reference, 1, {"a": 1.0, "b": 2.0}, code="old")
    strays = [reference / "notes.txt", reference / "01_toy" / ".DS_Store", reference / "01_toy" / "mine" / "x.txt"]
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("mine")
    claims.collect(tmp_path / "sweep.toml", tmp_path / "README.md")
    assert all(stray.read_text() == "mine" for stray in strays)
    assert not (reference / "01_toy" / "old1").exists(), "a run of another version is replaced"


# ---------------------------------------------------------------------------------------------------------------------
# A sweep, collected
# ---------------------------------------------------------------------------------------------------------------------

PARAMETERS = "seed: int = 0\noutput_dir: str = ''"
CODE = """import os
from sae_utils.lab.runs import start_run
run = start_run("02_toy", globals())
open(run.dir.parents[1] / "log", "a").write(f"{seed}\\n")
print(os.path.join(os.getcwd(), "file"))
run.finish({"a": 1.0, "b": 2.0 + seed / 10})
"""


def test_collected_runs_count_as_finished_and_make_the_table(reference, tmp_path, monkeypatch):
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, CODE)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "02_toy.ipynb")
    (tmp_path / "sweep.toml").write_text("[02_toy]\nseed = [0, 1, 2, 3]\n")
    (tmp_path / "README.md").write_text(
        "before\n<!-- claims: written by `make reference` -->\n<!-- end of claims -->\nafter\n"
    )
    monkeypatch.setattr(claims, "read_claims", lambda: [CLAIM._replace(notebook="02_toy")])
    monkeypatch.chdir(ROOT)
    home, outputs, log = reference.parent, tmp_path / "outputs", tmp_path / "outputs" / "log"

    def sweep_all(seeds):
        plan = sweep.planned(tmp_path / "sweep.toml")[:seeds]
        assert sweep.sweep(plan) == 0
        return claims.collect(tmp_path / "sweep.toml", tmp_path / "README.md")

    (row,) = sweep_all(3)
    assert row["n"] == 2 and row["verdict"] == "undecided"
    (row,) = sweep_all(4)
    assert row["values"] == pytest.approx([1.1, 1.2, 1.3]) and row["verdict"] == "holds"
    assert read_json(home / "claims.json") == json.loads(json.dumps([row]))
    readme = (tmp_path / "README.md").read_text()
    assert (
        claims.MARKED.search(readme)[2] == claims.section([row])
        and readme.startswith("before\n")
        and readme.endswith("after\n")
    )
    executed = (home / "02_toy.ipynb").read_text()
    assert "papermill" not in executed and str(ROOT) not in executed and "file" in executed

    assert log.read_text().split() == ["0", "1", "2", "3"]
    shutil.rmtree(outputs / "02_toy")
    (again,) = sweep_all(4)  # nothing but what is committed
    assert again == row and log.read_text().split() == ["0", "1", "2", "3"]
    assert len(list(reference.glob("*/*/manifest.json"))) == 4


def test_figures_get_smaller_and_look_the_same():
    figure, ax = plt.subplots()
    ax.imshow(np.arange(900.0).reshape(30, 30))
    ax.plot([0, 29], [29, 0], "w")
    figure.savefig(png := io.BytesIO())
    small = base64.b64decode(claims.with_palette(base64.b64encode(png.getvalue()).decode()))
    before, after = (np.asarray(Image.open(io.BytesIO(b)).convert("RGB"), int) for b in (png.getvalue(), small))
    assert len(small) < 0.6 * len(png.getvalue()) and before.shape == after.shape
    assert abs(before - after).mean() < 1 and np.quantile(abs(before - after), 0.999) < 32


def test_the_command_line_says_what_it_takes(capsys):
    assert claims.main(["show"]) == 2
    assert "collect" in capsys.readouterr().err
    assert claims.main(["collect", "nowhere.toml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.toml: no such sweep file\n"


# ---------------------------------------------------------------------------------------------------------------------
# This repository
# ---------------------------------------------------------------------------------------------------------------------

HOME = ROOT / "outputs" / "reference"
HOMES = [home for home in (claims.FIRST, HOME) if (home / "claims.json").exists()]


def test_every_paper_has_at_least_four_claims():
    of_paper = {paper: sum(claim.paper == paper for claim in read_claims()) for paper in PAPERS}
    assert min(of_paper.values()) >= 4, of_paper


def nearly(value):
    """The value with its numbers as pytest compares them: t quantiles differ in the last digits between versions of scipy."""
    if isinstance(value, dict):
        return {key: nearly(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nearly(item) for item in value]
    return pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value


@pytest.mark.parametrize("home", HOMES, ids=lambda home: home.name)
def test_claims_and_metrics_agree(home):
    rows = read_json(home / "claims.json")
    found = claims.by_seed(claims.committed(home / "runs"))
    if home == claims.FIRST:
        assert claims.table(rows) in (home / "claims.md").read_text()
    for row in rows:
        made = [runs.run_at(home / "runs" / run_id) for run_id in row["run_ids"]]
        assert all(run.manifest["finished"] for run in made)
        assert len({claims.version(run) for run in made}) == 1
    judged_by = home / "claims.toml" if home == claims.FIRST else claims.CLAIMS  # its notebooks had other names
    again = claims.evaluate(found, read_claims(judged_by))
    assert again == nearly(rows), "a claim or a seed of the committed runs is missing, or is judged otherwise"


def test_the_readme_shows_the_newest_table():
    shown = claims.MARKED.search((ROOT / "README.md").read_text())[2]
    assert shown == claims.section(read_json(HOMES[-1] / "claims.json"), HOMES[-1]), "run `... lab.claims collect`"


def test_without_new_runs_the_first_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(claims, "reference_runs", dict)
    assert claims.main([]) == 0
    out = capsys.readouterr().out
    assert (
        out == f"The first table, which earlier code made:\n\n{claims.table(read_json(claims.FIRST / 'claims.json'))}\n"
    )


def test_the_first_table_names_the_commits_that_made_its_runs():
    text = (claims.FIRST / "README.md").read_text()
    made_by = {run.manifest["git_commit"][:7] for run in claims.committed(claims.FIRST / "runs")}
    assert made_by == set(re.findall(r"`([0-9a-f]{7})`", text))


def test_the_numbers_about_text_model_and_minutes_in_the_readme_are_those_of_manifests():
    text = (ROOT / "README.md").read_text()
    row = r"^\| \[`\w+`\]\(notebooks/(\w+)\.ipynb\).* \| ([^|]*) \|$"  # of chapters, whose last column is minutes
    shown = dict(re.findall(row, text, re.MULTILINE))
    took = {
        path.stem: next((HOME / "laptop").glob(f"{path.stem}/manifest.json"))
        for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    assert shown == {name: f"{read_json(file)['wall_seconds'] / 60:.1f}" for name, file in took.items()}
    (base,) = (HOMES[-1] / "runs" / "00_base_model").glob("*/metrics.json")
    bits = read_json(base)["bits_per_byte"]
    for said, name in (
        ("{:.3f} bits per\n  byte", "python-lm"),
        ("`xz -9e` {:.3f}", "xz -9e"),
        ("3-gram {:.3f}", "Kneser-Ney 3-gram"),
    ):
        assert said.format(bits[name]) in text, name
    n_files = len((ASSETS / "python-source.sha256").read_text().splitlines())
    assert f"{n_files:,} files" in text


def test_the_figures_that_the_readme_shows_are_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"[(\"](outputs/reference/[^)\"]+)[)\"]", text):
        assert (ROOT / path).exists(), path
