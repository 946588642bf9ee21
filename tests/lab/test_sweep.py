"""Executing notebooks: checks, runs found and repeated, failures, kills, requirements. Real kernels, tiny notebooks."""

import itertools
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time

import nbformat
import pytest

from sae_utils.files import ROOT, lock, write_json
from sae_utils.lab import clean, execute, parameters, probe, runs, sweep
from sae_utils.lab.runs import find_run, start_run

PARAMETERS = """k: int = 8
rate: float = 1e-3
flag: bool = True
sizes: list[int] = [1, 2]
seed: int = 0
output_dir: str = ""
"""
LOG = "open(run.dir.parents[1] / 'log', 'a').write(f'{run.name} {k} {seed}\\n')"  # one line for every execution


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """`notebook(name, *code)` writes one that starts a run, logs it, runs the code and finishes."""
    monkeypatch.setenv("SAE_UTILS_NOTEBOOKS", str(tmp_path))
    monkeypatch.setenv("SAE_UTILS_OUTPUT", str(tmp_path / "runs"))
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(runs, "_current", None)
    monkeypatch.delenv(parameters.TIER, raising=False)
    monkeypatch.delenv(execute.KEEP_STALE, raising=False)
    monkeypatch.chdir(ROOT)

    def write(name, *code, finish="run.finish({'k': k, 'draw': random.random()})", parameters=PARAMETERS):
        start = f"import random\nfrom sae_utils.lab.runs import start_run\nrun = start_run('{name}', globals())\n{LOG}"
        cells = [nbformat.v4.new_code_cell(source) for source in (parameters, start, *code, finish)]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")

    return write


@pytest.fixture
def finished(notebook):
    """`finished(name, **params)`: a finished run, made here without a kernel."""

    def make(name="01_toy", **params):
        run = start_run(name, parameters.resolve(name, params))
        run.finish({"a": 1.5})
        return run

    return make


@pytest.fixture
def log(tmp_path):
    return lambda: (tmp_path / "runs" / "log").read_text().splitlines()


def toml(tmp_path, text):
    (tmp_path / "sweep.toml").write_text(text)
    return str(tmp_path / "sweep.toml")


def main(*argv):
    """The command line in this process; what it puts into the environment is taken back."""
    before = dict(os.environ)
    try:
        return sweep.main([str(arg) for arg in argv])
    finally:
        os.environ.clear()
        os.environ.update(before)


def command(*argv, **kwargs):
    """A sweep in a process of its own. It takes Ctrl-C also where these tests do not, as in a shell's background."""
    kwargs["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([sys.executable, "-m", "sae_utils.sweep", *argv], text=True, **kwargs)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    """Whether the process runs (a zombie does not)."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, error, message",
    [
        ({"rat": 0.1}, KeyError, "no parameter 'rat' .did you mean 'rate'"),
        ({"k": "8"}, TypeError, "k='8' is of type str, but k is declared int"),
        ({"k": True}, TypeError, "k=True is of type bool, but k is declared int"),
        ({"flag": 1}, TypeError, "flag=1 .* declared bool"),
        ({"sizes": [1, 2.0]}, TypeError, r"sizes\[1\]=2.0 is of type float, but sizes\[1\] is declared int"),
        ({"sizes": (1, 2)}, TypeError, "declared list"),
    ],
)
def test_misspelt_and_mistyped_parameters_are_refused_before_anything_runs(notebook, tmp_path, params, error, message):
    notebook("01_toy")
    with pytest.raises(error, match=message):
        execute.run("01_toy", params)
    assert not (tmp_path / "runs").exists()


def test_values_of_the_command_line_are_read_by_the_declared_type(notebook):
    notebook("01_toy")
    pairs = [("flag", "false"), ("rate", "1e-4"), ("sizes", "[3, 4]"), ("k", "16"), ("output_dir", "")]
    values = {"flag": False, "rate": 1e-4, "sizes": [3, 4], "k": 16, "output_dir": ""}
    assert sweep.parse_values("01_toy", pairs) == values
    assert sweep.parse_values("01_toy", [("sizes", "3,4")]) == {"sizes": [3, 4]}
    for name, text in [
        ("flag", "no"),
        ("k", "8x"),
        ("sizes", "1,b"),
        ("sizes", "1,,2"),
        ("sizes", "[1,2"),
        ("rate", "fast"),
    ]:
        with pytest.raises(ValueError, match=f"-p {name} {re.escape(text)}: {name} is declared"):
            sweep.parse_values("01_toy", [(name, text)])
    with pytest.raises(TypeError, match="k=1.5 is of type float, but k is declared int"):
        sweep.parse_values("01_toy", [("k", "1.5")])
    with pytest.raises(KeyError, match="did you mean 'seed'"):
        sweep.parse_values("01_toy", [("sed", "1")])


def test_a_list_is_swept_where_a_scalar_is_declared(notebook, tmp_path):
    notebook("01_toy")
    notebook("02_toy")
    path = toml(tmp_path, "[shared]\nseed = [0, 1]\n[02_toy]\nk = [4, 2]\nsizes = [7, 8]\n[01_toy]\n")
    plan = sweep.planned(path)
    assert [(name, p["seed"], p["k"], p["sizes"]) for name, p in plan] == [
        ("02_toy", 0, 4, [7, 8]),
        ("02_toy", 0, 2, [7, 8]),
        ("02_toy", 1, 4, [7, 8]),
        ("02_toy", 1, 2, [7, 8]),
        ("01_toy", 0, 8, [1, 2]),
        ("01_toy", 1, 8, [1, 2]),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[01_toy", "not valid TOML"),
        ("k = 1\n[01_toy]", "'k' stands outside of a table"),
        ("[01_tyo]", "no notebook '01_tyo'.*did you mean '01_toy'.*01_toy"),
        ("[shared]\nsede = 1\n[01_toy]", "no notebook declares 'sede' .did you mean 'seed'"),
        ("[01_toy]\nkk = 1", "no parameter 'kk'"),
        ("[01_toy]\nk = [1, '2']", "k='2' is of type str"),
        ("[01_toy]\nk = []", "k = .. leaves nothing to run"),
    ],
)
def test_mistakes_in_a_sweep_file_are_said_and_nothing_runs(notebook, tmp_path, capsys, text, message):
    notebook("01_toy")
    assert main(toml(tmp_path, text)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_a_missing_sweep_file_and_notebook_are_said(notebook, tmp_path, capsys):
    notebook("01_toy")
    assert main(tmp_path / "none.toml") == 2
    assert "none.toml: no such sweep file" in capsys.readouterr().err
    assert main("run", "02_toy") == 2
    assert "no notebook '02_toy'" in capsys.readouterr().err


def test_shards_partition_the_plan(notebook, tmp_path, capsys):
    notebook("01_toy")
    path = toml(tmp_path, "[01_toy]\nseed = [1, 2, 3, 4, 5, 6, 7]\n")
    shards = []
    for i in (1, 2, 3):
        assert main(path, "--list", "--shard", f"{i}/3") == 0
        shards.append(capsys.readouterr().out.splitlines())
    assert [len(shard) for shard in shards] == [3, 2, 2]
    assert len({line for shard in shards for line in shard}) == 7
    assert main(path, "--shard", "4/3") == 2 and "--shard 4/3: it has to be i/n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("seed", "-1", "seed=-1: it has to be a whole number from 0 to 4,294,967,295"),
        ("seed", str(2**32), "seed=4294967296: it has to be a whole number from 0 to"),
        ("k", "0", "k=0: it has to be a whole number of at least 1"),
        ("k", "17", "01_toy: k=17: active latents per token are at most d_sae=16"),
        ("ks", "[]", "ks=[]: it needs at least one value"),
        ("ks", "4,0", "ks[1]=0: it has to be a whole number of at least 1"),
        ("ks", "4,17", "01_toy: ks=[4, 17]: active latents per token are at most d_sae=16"),
        ("lr", "nan", "-p lr nan: lr is declared float"),
        ("lr", "-0.5", "lr=-0.5: it has to be a finite number above 0"),
        ("other", "inf", "-p other inf: other is declared float"),
        ("other", "1e999", "other=inf: it has to be a finite number"),
        ("batch_size", "9999", "01_toy: batch_size=9999: n_tokens=512 give 510 activations"),
        ("n_tokens", "255", "01_toy: n_tokens=255: less than one row of the model's context of 256 tokens"),
        ("device", "gpu", "device='gpu': it has to be such as 'auto', 'cpu', 'cuda'"),
        ("hook_name", "blocks.6.hook_resid_pre", "01_toy: hook_name='blocks.6.hook_resid_pre': python-lm has layers 0 to 5"),
        ("hook_name", "blocks.hook_resid_pre", "hook_name='blocks.hook_resid_pre': it has to be such as"),
        ("hook_name", "transformer.h.3", "hook_name='transformer.h.3': it has to be such as 'blocks.3.hook_resid_pre'"),
        ("model", "pyton-lm", "model='pyton-lm': no such directory (did you mean 'python-lm'?)"),
        ("model", "./none", "model='./none': no such directory. Allowed"),
        ("model", "FILE", "it is a file, not a directory. Allowed"),
        ("dataset", "texs.txt", "dataset='texs.txt': no such file or directory"),
        ("output_dir", "FILE", "cannot be written: Not a directory"),
        ("output_dir", "FILE/below", "cannot be written: Not a directory"),
        ("output_dir", "x" * 300, "File name too long"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_in_a_line_before_a_kernel_starts(notebook, tmp_path, capsys, name, value, message):
    more = "model = 'python-lm'\ndataset = 'python-source'\nhook_name = 'blocks.0.attn.hook_z'\nn_tokens = 512\n"
    more += "batch_size = 8\nd_sae = 16\nks = [4, 8]\nlr = 0.1\nother = 0.1\ndevice = 'auto'\n"
    notebook("01_toy", parameters=PARAMETERS + more)
    (tmp_path / "file").touch()
    assert main("run", "01_toy", "-p", name, value.replace("FILE", str(tmp_path / "file"))) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1, error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "argument, hint",
    [
        ("01_toy", "python -m sae_utils.sweep run 01_toy"),
        ("01_tyo", "python -m sae_utils.sweep run 01_toy"),
        ("{tmp}/01_toy.ipynb", "python -m sae_utils.sweep run 01_toy"),
        ("sweeps/labtop.toml", "python -m sae_utils.sweep sweeps/laptop.toml"),
        ("laptop", "python -m sae_utils.sweep sweeps/laptop.toml"),
    ],
)
def test_what_is_no_sweep_file_is_answered_with_what_was_meant(notebook, tmp_path, capsys, argument, hint):
    notebook("01_toy")
    assert main(argument.format(tmp=tmp_path)) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../01_toy", "{tmp}/01_toy", "sub/../01_toy", "..", "", "01_toy\0"])
def test_a_name_that_leads_elsewhere_is_no_notebook(notebook, tmp_path, capsys, monkeypatch, name):
    notebook("01_toy")
    (tmp_path / "sub").mkdir()
    monkeypatch.setenv("SAE_UTILS_NOTEBOOKS", str(tmp_path / "sub"))
    name = name.format(tmp=tmp_path)
    assert main("run", name) == 2 and main(toml(tmp_path, f"[{json.dumps(name)}]\n"), "--list") == 2
    assert capsys.readouterr().err.count("error: no notebook") == 2


@pytest.fixture
def no_tier(monkeypatch):
    """Parameters not named are the notebooks' own, not those of the tests' tier."""
    monkeypatch.delenv(parameters.TIER, raising=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 1025}, "k=1025: active latents per token are at most d_sae=1024"),
        ({"ks": [2, 2000]}, r"ks=\[2, 2000\]: active latents"),
        ({"batch_size": 10**6}, "give 597,465 activations"),  # 2,343 rows of 255
        ({"hook_name": "blocks.6.hook_resid_pre"}, "has layers 0 to 5"),
        ({"n_tokens": 255}, "n_tokens=255: less than one row"),
        ({"n_eval_tokens": 100}, "n_eval_tokens=100: less than one row"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(no_tier, change, message):
    with pytest.raises(ValueError, match=message):
        parameters.resolve("01_train_topk", change)


def test_contexts_that_leave_no_room_for_what_is_generated_are_refused(no_tier):
    parameters.resolve("07_steering", {"n_prompt": 244, "n_new": 12})
    with pytest.raises(ValueError, match="n_prompt=245: beside n_new=12 the model's context has room for 244 tokens"):
        parameters.resolve("07_steering", {"n_prompt": 245, "n_new": 12})


def test_the_sweep_for_gpt2_is_checked_without_the_hub(no_tier, capsys, monkeypatch):
    def refuse(*args):
        raise AssertionError("a dry run must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(ROOT / "sweeps" / "gpt2.toml", "--dry-run") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 9 and all(line.startswith("missing  0") for line in out.splitlines())
    assert (
        sum("04_train_gsae" in line and "hook_name=blocks.7.hook_resid_pre" in line for line in out.splitlines()) == 1
    )


def test_a_mistake_in_a_sweep_is_one_line(no_tier, capsys, tmp_path):
    assert main(toml(tmp_path, "[01_train_topk]\nd_sae = 16\nk = 17\n"), "--dry-run") == 2
    said = "error: 01_train_topk: k=17: active latents per token are at most d_sae=16\n"
    assert capsys.readouterr().err == said


# ---------------------------------------------------------------------------------------------------------------------
# What runs will take, and what they took
# ---------------------------------------------------------------------------------------------------------------------

GROWS = """import os, pathlib, time
time.sleep(0.5 + 2e-5 * n_tokens)
kept = b"1" * (1000 * n_tokens)
cache = pathlib.Path(os.environ["SAE_UTILS_CACHE"]) / "activations"
cache.mkdir(parents=True)
(cache / "rows").write_bytes(bytes(10**6 + 500 * n_tokens))
assert k < 8, "a few steps do not train"
if k > 8:
    raise RuntimeError("k is too large")
"""


def test_a_probe_says_what_a_run_then_takes(notebook, tmp_path, monkeypatch, capsys):
    """Within 10% of time and memory, and 3% of disk. A notebook that fails costs its row."""
    declared = PARAMETERS + "n_tokens: int = 300_000\nbatch_size: int = 1024\n"
    notebook("01_toy", GROWS, parameters=declared)
    plan = sweep.planned(toml(tmp_path, "[01_toy]\nk = [8, 9]\n"))
    rows, (failure,) = probe.probe(plan)
    assert [row[:2] for row in rows] == [
        ("01_toy", "32,768 and 98,304"),
        ("01_toy k=9", "failed"),
        ("in all", ""),
    ]
    assert "RuntimeError: k is too large" in failure
    hours, memory, disk = map(float, rows[0][2:])
    assert not (tmp_path / "runs").exists(), "a probe leaves nothing among the runs"
    monkeypatch.setenv("SAE_UTILS_CACHE", str(tmp_path / "own"))
    notebook("01_toy", GROWS.replace("k < 8", "k < 9"), parameters=declared)
    done = execute.run("01_toy")
    assert hours * 3600 == pytest.approx(done.manifest["wall_seconds"], rel=0.1)
    assert memory * 2**30 == pytest.approx(done.manifest["peak_memory"], rel=0.1)
    assert disk * 2**30 == pytest.approx(probe.size(tmp_path / "own", done.dir), rel=0.03)
    assert rows[-1][2:] == rows[0][2:]


def test_a_probe_shows_a_table_and_what_it_leaves_out(notebook, tmp_path, capsys):
    notebook("01_toy", parameters=PARAMETERS + "n_tokens: int = 1000\n")
    notebook("02_toy", "1 / 0", parameters=PARAMETERS + "n_tokens: int = 1000\n")
    assert main(toml(tmp_path, "[01_toy]\n[02_toy]\n"), "--probe") == 1
    out = capsys.readouterr().out
    titles, first, second, total, *about = out.splitlines()
    assert titles.split("  ")[0] == "run" and first.split()[:2] == ["01_toy", "1,000"] and total.startswith("in all")
    assert second.split() == ["02_toy", "failed"] and "ZeroDivisionError" in out
    assert "Extrapolated linearly in n_tokens" in about[0] and "Left out" in about[1]


def test_clean_shows_what_there_is_and_removes_what_is_named(finished, notebook, tmp_path, capsys, own_cache):
    notebook("01_toy")
    fresh, old, broken = finished(k=2), finished(k=3), finished(k=4)
    edited(sources={"lab/runs.py": "other"})(old.dir / "manifest.json")
    (broken.dir / "manifest.json").write_text("{")
    started = start_run("01_toy", parameters.resolve("01_toy", {"k": 5}))
    started.lock.release()
    elsewhere = tmp_path / "elsewhere"
    for place in (own_cache / "tokens", own_cache / "mine", elsewhere / "01_toy" / "1"):
        place.mkdir(parents=True)
        (place / "rows.npy").write_bytes(bytes(2048))
    (own_cache / "activations").symlink_to(elsewhere)
    (tmp_path / "runs" / "linked").symlink_to(elsewhere / "01_toy")
    write_json(elsewhere / "01_toy" / "1" / "manifest.json", old.manifest)

    def counts(*options):
        assert main("clean", *options) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines}

    shown = counts()
    numbers = {kind: int(said.split()[0]) for kind, said in shown.items()}
    assert numbers == {"caches": 1, "stale": 1, "unfinished": 1, "finished": 1, "in progress": 0, "damaged": 1}
    assert "2.00 KiB" in shown["caches"]
    assert "1 removed" in counts("--stale")["stale"] and not old.dir.exists() and started.dir.exists()
    assert "1 removed" in counts("--unfinished")["unfinished"] and not started.dir.exists()
    assert "1 removed" in counts("--caches")["caches"] and not (own_cache / "tokens" / "rows.npy").exists()
    assert (own_cache / "mine" / "rows.npy").exists() and (elsewhere / "01_toy" / "1" / "manifest.json").exists()
    assert fresh.dir.exists() and (broken.dir / "manifest.json").exists(), "neither is removed by any name"


@pytest.mark.parametrize("name", ["run", "kernel"])
def test_clean_leaves_a_run_in_progress_and_the_caches_it_may_read(finished, notebook, own_cache, capsys, name):
    notebook("01_toy")
    run = finished()
    edited(finished=False)(run.dir / "manifest.json")
    (own_cache / "tokens").mkdir(parents=True)
    (own_cache / "tokens" / "rows.npy").touch()
    with lock(run.dir / name):
        assert main("clean", *[f"--{kind}" for kind in clean.REMOVABLE]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^in progress  1", out, re.MULTILINE) and "kept: a run is in progress" in out
    assert run.dir.exists() and (own_cache / "tokens" / "rows.npy").exists()
    assert main("clean", "--unfinished") == 0 and not run.dir.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def edited(**changes):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["manifest.json", "metrics.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("[1, 2]"),
        lambda file: file.write_text(file.read_text()[:-5]),
        lambda file: file.write_bytes(b"\xff\0\xfe"),
        lambda file: file.write_text("[" * 10**5),
    ],
    ids=["list", "cut off", "binary", "deep"],
)
def test_a_damaged_file_costs_one_row_and_a_new_run_replaces_it(finished, notebook, tmp_path, capsys, name, damage):
    notebook("01_toy")
    run, other = finished(k=2), finished(k=4)
    damage(run.dir / name)
    check_one_row_is_lost(run, other, run.dir / name, tmp_path, capsys)
    with pytest.warns(UserWarning, match="counts as missing"):
        assert finished(k=2).id == run.id
    assert main(tmp_path / "sweep.toml", "--list") == 0
    assert capsys.readouterr() == ("finished  01_toy k=2\nfinished  01_toy k=4\n", "")


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": None},
        {"requires": {"01_toy/1": []}},
        {"requires": {"01_toy/1": {"code": "", "sources": []}}},
        {"finished": 1},
        {"wall_seconds": "1"},
        {"run_id": "../../elsewhere"},
        {"notebook": "/tmp/01_toy"},
        {"run_id": "a\0"},
    ],
)
def test_a_foreign_manifest_costs_one_row(finished, notebook, tmp_path, capsys, changes):
    notebook("01_toy")
    run, other = finished(k=2), finished(k=4)
    edited(**changes)(run.dir / "manifest.json")
    check_one_row_is_lost(run, other, run.dir / "manifest.json", tmp_path, capsys)


def check_one_row_is_lost(run, other, path, tmp_path, capsys):
    capsys.readouterr()
    assert main(toml(tmp_path, "[01_toy]\nk = [2, 4]\n"), "--list") == 0
    out, err = capsys.readouterr()
    assert out == "missing   01_toy k=2\nfinished  01_toy k=4\n"
    assert err.startswith("warning: ") and len(err.splitlines()) == 1 and str(path) in err, err
    assert main("runs") == 0
    rows = {line.split()[-1]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert f"damaged ({path}" in rows[str(run.dir)] and "a=1.5" in rows[str(other.dir)]


def test_finished_runs_are_listed_with_what_differs(finished, notebook, tmp_path, capsys):
    assert main("runs") == 0 and "no finished run in" in capsys.readouterr().out
    notebook("01_toy")
    notebook("02_toy")
    runs_made = [finished(k=2), finished("02_toy"), finished(seed=3, rate=0.5)]
    start_run("01_toy", parameters.resolve("01_toy", {}))  # not finished
    for age, run in enumerate(runs_made):
        os.utime(run.dir / "manifest.json", (1e9 + age, 1e9 + age))
    assert main("runs") == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0] for row in rows] == ["01_toy rate=0.5 seed=3", "02_toy", "01_toy k=2"]
    assert all(
        "a=1.5" in row and "  finished  " in row and row.endswith(str(run.dir))
        for row, run in zip(rows, runs_made[::-1])
    )
    notebook("01_toy", "an_edit = 1")
    assert main("runs", "01_toy") == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 2 and all("stale (its notebook has changed since)" in row for row in rows)
    (tmp_path / "01_toy.ipynb").unlink()
    assert main("runs") == 0 and len(capsys.readouterr().out.splitlines()) == 4, "runs of a notebook that is gone"
    assert main("runs", "01_tyo") == 2 and "no notebook '01_tyo'" in capsys.readouterr().err


def test_names_in_files_do_not_steer_the_terminal(finished, notebook, capsys):
    notebook("01_toy")
    run = finished(k=2)
    write_json(run.dir / "metrics.json", {"a\x1b[2J\n": 1, "huge": 2})
    assert main("runs") == 0
    assert "a\\x1b[2J\\n=1 huge=2" in capsys.readouterr().out


def test_stray_files_are_passed_over(finished, notebook, tmp_path, capsys):
    notebook("01_toy")
    run = finished(k=2)
    strays = [run.dir.parents[1] / "notes.txt", run.dir.parents[1] / "manifest.json", run.dir.parent / ".DS_Store"]
    strays += [
        run.dir.parent / "metrics.json",
        run.dir / "mine.txt",
        run.dir.parent / "empty" / "x",
        tmp_path / "runs" / "d" / "x" / "y",
    ]
    for stray in strays:
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("mine")
    assert main(toml(tmp_path, "[01_toy]\nk = [2, 4]\n"), "--list") == 0
    assert capsys.readouterr() == ("finished  01_toy k=2\nmissing   01_toy k=4\n", "")
    assert main("runs") == 0 and len(capsys.readouterr().out.splitlines()) == 2
    finished(k=2)
    assert all(stray.read_text() == "mine" for stray in strays)


def test_a_run_says_where_it_is_executed(notebook, tmp_path, capsys):
    notebook("01_toy")
    notebook("02_toy", "from sae_utils import require\nrequire('01_toy')")
    assert main(toml(tmp_path, "[02_toy]\nk = 4\n")) == 0
    made = find_run("02_toy", parameters.resolve("02_toy", {"k": 4}))
    assert capsys.readouterr().err == f"[1/1] 02_toy k=4 is not there yet: executing it in {made.dir}\n", (
        "a log has a line for each run"
    )
    (cell,) = [c for c in nbformat.read(made.dir / "notebook.ipynb", as_version=4).cells if "require(" in c.source]
    assert cell.outputs[0].text == "01_toy is not there yet: executing it\n"


def test_on_a_terminal_a_bar_counts_the_cells(notebook, tmp_path):
    notebook("01_toy", "import time; time.sleep(1)")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    assert command("run", "01_toy", stdout=subprocess.DEVNULL, stderr=theirs).wait() == 0
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal:
        written = terminal.read(10**5).decode()
    assert written.count("\n") == 1 and re.search(r"\r01_toy: +\d+%.* [1-4]/4 ", written)
    assert written.rstrip("\r").endswith(" "), "the line is wiped out"


def test_after_an_interrupt_one_line_says_how_to_go_on(notebook, log, tmp_path):
    wait = "import os, time\n(run.dir / 'pid').write_text(str(os.getpid()))\n"
    wait += "while seed == 1 and not (run.dir.parents[1] / 'go').exists(): time.sleep(.05)"
    notebook("01_toy", wait)
    path = toml(tmp_path, "[01_toy]\nseed = [0, 1]\n")
    stopped = command(path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    pids = tmp_path / "runs" / "01_toy"
    wait_for(lambda: len(list(pids.glob("*/pid"))) == 2)
    kernels = [int(file.read_text()) for file in pids.glob("*/pid")]
    stopped.send_signal(signal.SIGINT)
    said = [line for line in stopped.communicate()[1].splitlines() if line and "executing it in" not in line]
    assert stopped.returncode == 130
    assert said == [
        f"Interrupted. Finished runs are kept; the same command goes on where it stopped: python -m sae_utils.sweep {path}"
    ]
    wait_for(lambda: not any(alive(pid) for pid in kernels), seconds=5)
    (tmp_path / "runs" / "go").touch()
    assert command(path, stdout=subprocess.DEVNULL).wait() == 0
    assert log() == ["01_toy 8 0", "01_toy 8 1", "01_toy 8 1"]


def test_braces_in_a_path_are_no_placeholders(notebook, tmp_path):
    notebook("01_toy")
    done = execute.run("01_toy", {"output_dir": str(tmp_path / "{k}" / "{x}")})
    assert (done.dir / "notebook.ipynb").is_file() and done.dir.is_relative_to(tmp_path / "{k}" / "{x}")


@pytest.mark.parametrize(
    "code, messages",
    [
        (
            "x = 2\n\nassert x == k",
            ["01_toy k=3 failed: AssertionError", "Cell In[5], line 3", "----> 3 assert x == k"],
        ),
        ("f(\n    2)", ["Cell In[5], line 1", "----> 1 f(", "----> 3     assert v > 2"]),
        ("x = = 1", ["failed: SyntaxError", "Cell In[5], line 1", "x = = 1"]),
        (
            "json.loads('')",
            ["failed: JSONDecodeError: Expecting value: line 1", "----> 1 json.loads('')", "json/decoder.py"],
        ),
        ("import os\nos._exit(1)", ["failed: DeadKernelError: Kernel died", "at: import os\nos._exit(1)"]),
    ],
)
def test_a_failed_cell_is_named_with_its_number_and_line(notebook, code, messages):
    notebook("01_toy", "import json\ndef f(v):\n    assert v > 2", code)
    with pytest.raises(execute.RunFailed) as failed:
        execute.run("01_toy", {"k": 3})
    assert all(message in str(failed.value) for message in messages), failed.value
    assert "parameters: {'k': 3," in str(failed.value) and "executed part: /" in str(failed.value)


def test_a_run_is_found_not_repeated_unless_stale_and_equal_seeds_give_equal_bytes(notebook, log, tmp_path, capsys):
    notebook("01_toy")
    assert main("run", tmp_path / "01_toy.ipynb", "-p", "flag", "false", "-p", "seed", "5") == 0
    done = execute.run("01_toy", {"flag": False, "seed": 5})
    assert done.parameters["flag"] is False and done.parameters["k"] == 8
    assert (done.dir / "notebook.ipynb").exists()
    assert log() == ["01_toy 8 5"], "the second call found the run"

    write_json(done.dir / "manifest.json", done.manifest | {"sources": {"lab/runs.py": "other"}})
    first = (done.dir / "metrics.json").read_bytes()
    capsys.readouterr()
    assert main("run", "01_toy", "-p", "flag", "false", "-p", "seed", "5", "--keep-stale") == 0
    assert "stale (made by other sources: lab/runs.py), kept" in capsys.readouterr().out
    path = toml(tmp_path, "[01_toy]\nflag = false\nseed = 5\n")
    main(path, "--dry-run")
    main(path, "--dry-run", "--keep-stale")
    assert capsys.readouterr().out.splitlines() == [
        "stale (made by other sources: lab/runs.py)  01_toy flag=False seed=5",
        "nothing to do",
    ]
    assert len(log()) == 1
    assert execute.run("01_toy", {"flag": False, "seed": 5}).stale() == ""
    assert "repeating it" in capsys.readouterr().out
    assert len(log()) == 2
    assert (done.dir / "metrics.json").read_bytes() == first


def test_a_failing_run_is_collected_and_the_others_go_on(notebook, log, tmp_path, capsys):
    notebook("01_toy", "inverse = 1 / (k - 3)")
    path = toml(tmp_path, "[01_toy]\nk = [2, 3, 4]\n")
    assert main(path) == 1
    out, err = capsys.readouterr()
    assert [line.split(", ")[0] for line in out.splitlines()[:3]] == [
        "[1/3] 01_toy k=2: done",
        "[2/3] 01_toy k=3: FAILED",
        "[3/3] 01_toy k=4: done",
    ]
    assert "ZeroDivisionError: division by zero" in err and "'k': 3" in err
    part = nbformat.read(err.split("executed part: ")[1].strip(), as_version=4)
    assert any(output.output_type == "error" for cell in part.cells for output in cell.get("outputs", []))
    assert main(path, "--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["finished", "missing", "finished"]
    assert len(log()) == 3


def test_a_notebook_that_never_finishes_its_run_has_failed(notebook):
    notebook("01_toy", finish="pass")
    with pytest.raises(execute.RunFailed, match="without run.finish"):
        execute.run("01_toy")


def test_a_dead_kernel_and_a_late_one_end_the_run_and_are_not_repeated(notebook, log):
    notebook("01_toy", "import os, time\ntime.sleep(60) if flag else os._exit(1)")
    with pytest.raises(execute.RunFailed, match="CellTimeoutError: .* after 4 seconds"):
        execute.run("01_toy", time_limit=4)
    with pytest.raises(execute.RunFailed, match="DeadKernelError"):
        execute.run("01_toy", {"flag": False})
    assert len(log()) == 2


def test_a_kernel_that_does_not_start_is_started_once_more(notebook, log, tmp_path, monkeypatch):
    """Jupyter finds our kernel first; it exits at once the first time."""
    code = f"import os, sys; p = {str(tmp_path / 'tried')!r}; new = not os.path.exists(p); open(p, 'a').close(); "
    code += "new and sys.exit(1); from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"
    argv = [sys.executable, "-c", code, "-f", "{connection_file}"]
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    write_json(spec, {"argv": argv, "display_name": "", "language": "python"})
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook("01_toy")
    execute.run("01_toy")
    assert (tmp_path / "tried").exists() and len(log()) == 1


def test_after_a_kill_only_the_unfinished_is_repeated(notebook, log, tmp_path):
    """kill -9 of the sweep in the middle of its second run; its kernel ends itself."""
    wait = "import os, time\n(run.dir / 'pid').write_text(str(os.getpid()))\n"
    wait += "while seed == 1 and not (run.dir.parents[1] / 'go').exists(): time.sleep(.05)"
    notebook("01_toy", wait)
    path = toml(tmp_path, "[01_toy]\nseed = [0, 1, 2]\n")
    killed = command(path, stdout=subprocess.DEVNULL)
    pids = tmp_path / "runs" / "01_toy"
    wait_for(lambda: len(list(pids.glob("*/pid"))) == 2)
    kernels = [int(file.read_text()) for file in pids.glob("*/pid")]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_for(lambda: not any(alive(pid) for pid in kernels), seconds=5)
    (tmp_path / "runs" / "go").touch()
    assert command(path, stdout=subprocess.DEVNULL).wait() == 0
    assert log() == ["01_toy 8 0", "01_toy 8 1", "01_toy 8 1", "01_toy 8 2"]


def test_after_a_kill_the_kernel_of_a_required_run_ends_too(notebook, tmp_path):
    pid = "import os, time\n(run.dir / 'pid').write_text(str(os.getpid()))\n"
    notebook("01_toy", pid + "time.sleep(60)")
    notebook("02_toy", pid + "from sae_utils import require\nrequire('01_toy')")
    killed = command("run", "02_toy", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pids = tmp_path / "runs"
    wait_for(lambda: len([file for file in pids.glob("*/*/pid") if file.read_text()]) == 2, seconds=60)
    killed.kill()
    killed.wait()
    wait_for(lambda: not any(alive(file.read_text()) for file in pids.glob("*/*/pid")), seconds=10)


def test_of_two_processes_that_want_a_run_one_executes_it(notebook, log):
    notebook("01_toy", "import time; time.sleep(2)")
    both = [command("run", "01_toy", stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("another process is executing it, waiting" in output for output in outputs) == 1
    assert log() == ["01_toy 8 0"]


# ---------------------------------------------------------------------------------------------------------------------
# Requirements
# ---------------------------------------------------------------------------------------------------------------------


def test_a_notebook_gets_the_runs_it_requires(notebook, log, tmp_path, monkeypatch):
    """seed comes from the caller, k from the sweep in force (its own table before [shared]), rate by name."""
    notebook("01_toy")
    notebook(
        "02_toy",
        "from sae_utils import require\nrequired = require('01_toy', rate=0.5)\nrequire('01_toy', rate=0.5)",
        finish="run.finish({'required': required.metrics, 'parameters': required.parameters})",
    )
    path = toml(tmp_path, "[shared]\nk = 5\nseed = 9\n[01_toy]\nk = 6\n[02_toy]\nseed = 3\n")
    assert main(path, "--shard", "2/2") == 0
    monkeypatch.setenv(parameters.TIER, path)
    done = find_run("02_toy", parameters.resolve("02_toy", {}))
    wanted = {"k": 6, "rate": 0.5, "flag": True, "sizes": [1, 2], "seed": 3, "output_dir": ""}
    assert done.metrics["parameters"] == wanted
    required = find_run("01_toy", wanted)
    assert done.metrics["required"] == required.metrics
    assert list(done.manifest["requires"]) == [f"01_toy/{required.id}"]
    assert log() == ["02_toy 5 3", "01_toy 6 3"]

    by_hand = start_run("02_toy", parameters.resolve("02_toy", {}))
    assert execute.require("01_toy", rate=0.5).id == required.id
    assert list(by_hand.manifest["requires"]) == [f"01_toy/{required.id}"]
    assert len(log()) == 2


def test_a_run_is_stale_where_what_it_requires_would_now_be_another_run(notebook, finished, tmp_path, monkeypatch):
    """k of the required run is of the sweep in force, or else its notebook's default."""
    for name in ("01_toy", "02_toy"):
        notebook(name)
    monkeypatch.setenv(parameters.TIER, toml(tmp_path, "[01_toy]\nk = 6\n"))
    finished("01_toy", seed=3)
    caller = start_run("02_toy", parameters.resolve("02_toy", {"seed": 3}))
    assert execute.require("01_toy").parameters["k"] == 6
    caller.finish({})
    params = parameters.resolve("02_toy", {"seed": 3})
    assert find_run("02_toy", params).stale() == ""
    for text in ("[01_toy]\nk = 7\n", "[02_toy]\n"):
        toml(tmp_path, text)
        assert "other parameters" in find_run("02_toy", params).stale()
    notebook("01_toy", parameters=PARAMETERS.replace("k: int = 8", "k: int = 6"))
    assert find_run("02_toy", params).stale() == ""
    notebook("01_toy", parameters=PARAMETERS.replace("seed", "seeds"))
    assert "other parameters" in find_run("02_toy", params).stale()


def test_a_run_is_stale_where_a_module_of_its_own_has_changed(notebook, log, tmp_path):
    module = tmp_path / "mine.py"
    module.write_text("def f():\n    return 1\n")
    notebook("01_toy", f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport mine")
    done = execute.run("01_toy")
    assert str(module.resolve()) in done.manifest["sources"] and done.stale() == ""
    module.write_text('def f():\n    """A docstring changes nothing."""\n    return 1\n')
    assert find_run("01_toy", done.parameters).stale() == ""
    module.write_text("def f():\n    return 2\n")
    assert find_run("01_toy", done.parameters).stale() == f"made by other sources: {module.resolve()}"
    module.unlink()
    assert "mine.py" in find_run("01_toy", done.parameters).stale()


def test_the_failure_of_a_required_run_is_shown_where_it_was_required(notebook, tmp_path):
    notebook("01_toy", "inverse = 1 / (k - 8)")
    with pytest.raises(execute.RunFailed, match="01_toy failed: ZeroDivisionError"):
        execute.require("01_toy")
    with pytest.raises(KeyError, match="no parameter 'kk'"):
        execute.require("01_toy", kk=1)


def test_key_metrics_are_those_listed_or_the_first_numbers(tmp_path):
    manifest = {"notebook": "01_toy", "run_id": "0", "parameters": {}}
    run = runs.Run(tmp_path, manifest)
    metrics = {"a": 1, "b": {"c": 2}, "d": 0.123456, "e": 3, "f": 4}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert sweep.key_metrics(run) == "a=1 d=0.1235 e=3"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"key": ["f", "a"]}))
    assert sweep.key_metrics(run) == "f=4 a=1"


@pytest.mark.ray
def test_ray_executes_two_at_once_and_goes_on_after_failures(notebook, tmp_path, log, monkeypatch, capfd):
    clock = "import time; open(run.dir.parents[1] / 'clock', 'a').write(f'{seed} {time.time()}\\n')"
    notebook(
        "slow",
        clock,
        "import os, time; time.sleep(3)",
        "assert seed != 2, 'two is too many'",
        "if seed == 3: os._exit(1)",
        clock,
    )
    path = toml(tmp_path, "[slow]\nseed = [0, 1, 2, 3]\n")
    assert main(path, "--engine", "ray") == 1
    printed = capfd.readouterr()
    assert "two is too many" in printed.err and printed.out.count("FAILED") == 2 and printed.out.count(": done") == 2
    times = [line.split() for line in (tmp_path / "runs" / "clock").read_text().splitlines()]
    first = {seed: min(float(t) for s, t in times if s == seed) for seed in "0123"}
    last = {seed: max(float(t) for s, t in times if s == seed) for seed in "01"}
    assert max(first["0"], first["1"]) < min(last.values()), "the first two did not overlap"
    assert main(path, "--list") == 0
    states = capfd.readouterr().out
    assert states.count("finished") == 2 and states.count("missing") == 2, states
    assert sorted(log()) == [f"slow 8 {seed}" for seed in range(4)]


@pytest.fixture(scope="module")
def cluster():
    """A Ray that runs already, with a GPU as if: nothing here needs one. Its start takes longer than a test."""
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 3, "num_gpus": 1, "include_dashboard": False}
    try:
        head = Cluster(initialize_head=True, head_node_args=settings)
    except Exception:  # a start may take 30 s, and on a busy machine the first one does
        head = Cluster(initialize_head=True, head_node_args=settings)
    yield head
    head.shutdown()


@pytest.mark.ray
def test_on_ray_two_runs_share_a_gpu_and_a_third_waits(notebook, tmp_path, monkeypatch, cluster):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    note = "import os, time; open(run.dir.parents[1] / 'clock', 'a').write(f'{time.time()} %s {os.environ[\"CUDA_VISIBLE_DEVICES\"]}\\n')"
    notebook("slow", note % "1", "time.sleep(5)", note % "-1")
    assert main(toml(tmp_path, "[slow]\nseed = [0, 1, 2]\n"), "--engine", "ray", "--gpus", "0.5") == 0
    events = sorted(line.split() for line in (tmp_path / "runs" / "clock").read_text().splitlines())
    at_once = list(itertools.accumulate(int(change) for _, change, _ in events))
    assert max(at_once) == 2 and len(events) == 6, events
    assert {gpu for *_, gpu in events} == {"0"}


@pytest.mark.ray
@pytest.mark.parametrize("gpus", ["2", "-1"])
def test_on_ray_more_gpus_than_there_are_is_an_error(notebook, tmp_path, monkeypatch, capfd, cluster, gpus):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    notebook("one")
    assert main(toml(tmp_path, "[one]\n"), "--engine", "ray", "--gpus", gpus) == 2
    assert f"error: --gpus {gpus}: a run can have from 0 to the 1 GPUs" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[01_toy", None])
def test_a_sweep_file_that_cannot_be_read_is_said_in_a_line(tmp_path, capsys, content):
    path = tmp_path / "sweep.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert main(str(path), "--list") == 2
    assert capsys.readouterr().err.startswith(f"error: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Nothing silent
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["['a'", "'a']", "'a',,'b'", "][", "[['a']]", "a,b"])
def test_a_list_of_texts_that_is_cut_or_has_a_hole_is_refused(notebook, text):
    notebook("01_toy", parameters=PARAMETERS + "names = ['a']\n")
    with pytest.raises((ValueError, TypeError), match="names.* is declared (list|str)"):
        sweep.parse_values("01_toy", [("names", text)])


def test_a_list_of_texts_may_be_empty_or_in_brackets(notebook):
    notebook("01_toy", parameters=PARAMETERS + "names = ['a']\n")
    read = {
        text: sweep.parse_values("01_toy", [("names", text)])["names"] for text in ("", "[]", "['a', 'b']", "'a','b'")
    }
    assert list(read.values()) == [[], [], ["a", "b"], ["a", "b"]]


def test_a_parameter_given_twice_is_refused(notebook):
    notebook("01_toy")
    with pytest.raises(ValueError, match="-p k is given more than once"):
        sweep.parse_values("01_toy", [("k", "8"), ("rate", "0.1"), ("k", "16")])


def test_what_a_notebook_warns_of_is_said_also_by_who_requires_it(notebook, capfd):
    notebook("01_toy", "import warnings\nfor _ in range(2): warnings.warn('text was left out')")
    notebook("02_toy", "from sae_utils import require\nrequire('01_toy')")
    assert main("run", "02_toy") == 0
    assert capfd.readouterr().err.count("warning: 02_toy: 01_toy: text was left out") == 1
    assert main("run", "01_toy", "-p", "seed", "7") == 0
    assert capfd.readouterr().err.count("warning: 01_toy: text was left out") == 1


@pytest.mark.parametrize(
    "toml_text, message",
    [
        ("", "plans no run: write a table for each notebook"),
        ("[shared]\nk = 2\n", "plans no run"),
        ("[01_toy]\nk = [1, 1]\n", "k = [1, 1] holds a value twice"),
        ("[shared]\nother = 2\n[01_toy]\n", "no notebook declares 'other'"),
    ],
)
def test_a_sweep_that_plans_something_else_than_it_says_is_refused(notebook, tmp_path, capsys, toml_text, message):
    notebook("01_toy")
    notebook("02_toy", parameters="other = 1\nseed = 0\noutput_dir = ''")
    assert main(toml(tmp_path, toml_text), "--list") == 2
    assert message in capsys.readouterr().err


def test_a_notebook_that_no_table_names_may_be_broken(notebook, tmp_path):
    notebook("01_toy")
    (tmp_path / "09_broken.ipynb").write_text("{")
    assert main(toml(tmp_path, "[shared]\nk = 2\n[01_toy]\n"), "--list") == 0


def test_paths_beyond_the_system_cost_nothing(notebook, finished, capsys):
    notebook("01_toy")
    done = finished()
    write_json(done.dir / "manifest.json", done.manifest | {"sources": {"x" * 5000: "h"}})
    assert main("runs") == 0
    assert "a=1.5" in (out := capsys.readouterr().out) and "made by other sources: xxx" in out


def test_a_run_whose_saes_are_gone_says_what_to_delete(notebook, finished):
    notebook("01_toy")
    done = finished()
    with pytest.raises(FileNotFoundError, match=f"holds no SAE.*Delete {done.dir}, and the run is made again"):
        done.sae("topk")
