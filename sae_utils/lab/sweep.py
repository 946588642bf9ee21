"""Whole sweeps of notebooks, and the command line.

    python -m sae_utils.sweep run NOTEBOOK [-p name value]...
    python -m sae_utils.sweep runs [NOTEBOOK] [--output-dir DIR]
    python -m sae_utils.sweep clean [--caches] [--stale] [--unfinished] [--output-dir DIR]
    python -m sae_utils.sweep SWEEP.toml [--engine local|ray] [--list] [--dry-run] [--probe] [--shard i/n] [--keep-stale]

A sweep is a TOML file: a `[shared]` table, applied to every notebook that declares the name, then one table per notebook
(`[01_train_topk]`) in the order of execution; an empty table is one run with the defaults. A list where the notebook
declares a scalar is swept over, several lists as their product. `runs` lists what is finished. Imports no torch.
"""

import argparse
import ast
import os
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

from . import runs
from .clean import REMOVABLE, clean
from .execute import KEEP_STALE, RunFailed, run
from .parameters import TIER, check_parameters, declared_in, label, notebook_path, notebooks, notebooks_dir, planned
from .probe import LEFT_OUT, probe
from .runs import DAMAGED, Run, in_words


def parse_values(name: str, pairs) -> dict:
    """The (name, text) pairs of the command line as parameters of a notebook, read as Python: `8`, `1e-4`, `true`, `[2, 4]` or `2,4`."""
    declared = declared_in(notebook_path(name), [key for key, _ in pairs])
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"-p {twice[0]} is given more than once: give it one value")
    values = {}
    for key, text in pairs:
        kind = declared[key].type
        python = text.capitalize() if kind == "bool" else text
        if kind.startswith("list") and not text.startswith("["):
            python = f"[{text}]"
        try:
            values[key] = text if kind == "str" else ast.literal_eval(python)
        except (SyntaxError, ValueError):
            raise ValueError(f"-p {key} {text}: {key} is declared {kind}") from None
    return check_parameters(notebook_path(name), values)


def notebook_name(text: str) -> str:
    """The name of a notebook given by name or by path; ValueError for a path outside of the notebooks' directory."""
    path = Path(text)
    if path.suffix == ".ipynb" and notebooks().get(path.stem) != path.resolve():
        raise ValueError(f"{text} is not in {notebooks_dir()}")
    return path.stem if path.suffix == ".ipynb" else text


def sweep(plan, engine: str = "local", gpus: float = 1.0) -> int:
    """Execute the planned runs; returns how many failed, after a table and the failures in full.

    engine: "local", one after the other, or "ray", as many at once as there are resources for (`gpus` each).
    """
    numbered = [(f"[{i}/{len(plan)}] ", name, params) for i, (name, params) in enumerate(plan, start=1)]
    rows, failures = [("run", "minutes", "metrics", "directory")], []
    for said, row, failure in on_ray(numbered, gpus) if engine == "ray" else map(attempt, numbered):
        print(said, flush=True)
        rows += row
        failures += failure
    print()
    print_table(rows)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return len(failures)


def attempt(planned_run: tuple[str, str, dict]) -> tuple[str, list, list]:
    """One run of a sweep: how it went in a line, its row of the table or none, its failure or none. Raises nothing."""
    prefix, name, params = planned_run
    start, row, failure = time.monotonic(), [], []
    try:
        done = run(name, params, needs_saes=False, tell=prefix)
        row = [(label(name, params), minutes_of(done), key_metrics(done), done.dir)]
    except Exception as error:
        why = in_words(error) if isinstance(error, DAMAGED) else repr(error)
        failure = [str(error) if isinstance(error, RunFailed) else f"{label(name, params)} failed: {why}"]
    minutes = (time.monotonic() - start) / 60
    return f"{prefix}{label(name, params)}: {'FAILED' if failure else 'done'}, {minutes:.1f} min", row, failure


def on_ray(plan, gpus: float):
    """`attempt` for every planned run, in workers of Ray: those of this machine, or of the cluster at `$RAY_ADDRESS`.

    Yields what `attempt` returns, as runs end. A run takes one CPU core, and a share `gpus` of a GPU where there is one.
    The cluster's machines need the repository and `outputs/` at the same path (a shared file system).
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install -e '.[ray]'") from None
    ours = {key: value for key, value in os.environ.items() if key.startswith(("SAE_UTILS_", "HF_", "OMP_WAIT"))}
    ray.init(runtime_env={"env_vars": ours}, include_dashboard=False, logging_level="ERROR")
    try:
        there = ray.cluster_resources().get("GPU", 0)
        if gpus < 0 or 0 < there < gpus:  # asking for what is not there would wait for ever
            raise ValueError(f"--gpus {gpus:g}: a run can have from 0 to the {there:g} GPUs that Ray has")
        share = gpus if there else 0
        remote = ray.remote(num_cpus=1, num_gpus=share, max_calls=1, max_retries=0)(attempt)
        running = {remote.remote(planned_run): planned_run for planned_run in plan}
        while running:
            (ended,), _ = ray.wait(list(running))
            prefix, *lost = running.pop(ended)
            try:
                yield ray.get(ended)
            except ray.exceptions.RayError as error:  # a worker that died
                yield f"{prefix}{label(*lost)}: FAILED", [], [f"{label(*lost)} failed: {error}"]
    finally:
        ray.shutdown()


def key_metrics(done: Run) -> str:
    """The metrics that the run lists under `"key"`, else its first three numbers."""
    metrics = done.metrics
    shown = {name: f"{name}={value:.4g}" for name, value in metrics.items() if type(value) in (int, float)}
    names = map(str, metrics["key"]) if isinstance(metrics.get("key"), list) else [*shown][:3]
    return " ".join(shown[name] for name in names if name in shown)


def minutes_of(done: Run) -> str:
    return f"{done.manifest['wall_seconds'] / 60:.1f}"


def listed(name: str = "", output_dir: str = "") -> list[tuple]:
    """A row for each finished run in a directory of runs, of one notebook if it is named, the newest first; damaged ones too."""
    base, rows = runs.output_dir(output_dir), []
    newest = sorted(base.glob(f"{name or '*'}/*/manifest.json"), key=lambda file: -os.lstat(file).st_mtime)
    for directory in (file.parent for file in newest):
        try:
            done = runs.run_at(directory)
            if done.manifest["finished"]:  # results are equal to the byte only where GPUs or threads are
                made_on = done.manifest.get("gpu") or f"CPU, threads: {done.manifest.get('threads')}"
                about = label(done.name, done.parameters), key_metrics(done), minutes_of(done), made_on
                rows.append((*about, done.state(), directory))
        except DAMAGED as error:
            rows.append((directory.parent.name, "", "", "", f"damaged ({in_words(error)})", directory))
    return rows


def print_table(rows) -> None:
    """The rows with their columns aligned; characters that are none to see, such as those that steer a terminal, as escapes."""
    rows = [["".join(c if c.isprintable() else repr(c)[1:-1] for c in str(item)) for item in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(item.ljust(width) for item, width in zip(row, widths)).rstrip())


def main(argv=None) -> int:
    """The command line; returns the exit code: 0, 1 when a run failed, 2 for a mistake in what was asked, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    with runs.plain_warnings():
        try:
            return command(argv)
        except RunFailed as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
        except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
            print(f"error: {in_words(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            said = "Interrupted. Finished runs are kept; the same command goes on where it stopped:"
            print(f"\n{said}", shlex.join(["python", "-m", "sae_utils.sweep", *argv]), file=sys.stderr)
            return 130


def command(argv) -> int:
    """Do what the first word says: `run`, `runs`, `clean`, or the runs of a sweep file."""
    about = {
        "run": "Execute one notebook.",
        "runs": "List finished runs.",
        "clean": "Show what caches and runs take; remove what is named.",
        "": "Execute the runs of a sweep file. Other commands: `run NOTEBOOK`, `runs [NOTEBOOK]`, `clean`.",
    }
    word = argv[0] if argv and argv[0] in about else ""
    parser = argparse.ArgumentParser(prog=f"python -m sae_utils.sweep {word}".rstrip(), description=about[word])
    add = parser.add_argument
    if word in ("runs", "clean"):
        add("--output-dir", default="", metavar="DIR", help="where the runs are, if not in outputs/")
    else:
        add("--keep-stale", action="store_true", help="use runs made by other sources")
    if word == "run":
        add("notebook", help="its name, such as 01_train_topk, or its path")
        add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="params")
    elif word == "runs":
        add("notebook", nargs="?", default="", help="only those of this one")
    elif word == "clean":
        for kind in REMOVABLE:
            add(f"--{kind}", action="append_const", const=kind, dest="remove", default=[])
    else:
        add("sweep", metavar="SWEEP.toml")
        add("--engine", choices=["local", "ray"], default="local")
        add("--gpus", type=float, default=1.0, help="share of a GPU for each run (engine ray)")
        add("--list", action="store_true", help="show the planned runs and their state")
        add("--dry-run", action="store_true", help="check all parameters; list what would be executed")
        add("--probe", action="store_true", help="a few steps of each run: hours, memory, disk of all of it")
        add("--shard", default="1/1", metavar="i/n", help="only every n-th planned run, from the i-th")
    args = parser.parse_args(argv[1:] if word else argv)
    if word == "runs":
        name = notebook_name(args.notebook)
        rows = listed(name and notebook_path(name).stem, args.output_dir)
        titles = [("run", "metrics", "minutes", "made on", "state", "directory")] if rows else []
        print_table(titles + rows or [(f"no finished run in {runs.output_dir(args.output_dir)}",)])
        return 0
    if word == "clean":
        print_table(clean(args.remove, args.output_dir))
        return 0
    if args.keep_stale:
        os.environ[KEEP_STALE] = "1"  # for `run` here, in workers and in the notebooks' own `require`
    if word == "run":
        name = notebook_name(args.notebook)
        done = run(name, parse_values(name, args.params), tell="")
        print_table([(label(name, done.parameters), key_metrics(done), done.dir)])
        return 0
    return run_sweep(args)


def run_sweep(args) -> int:
    """The command that is a sweep file with its options; returns the exit code."""
    i, _, n = args.shard.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--shard {args.shard}: it has to be i/n with 1 ≤ i ≤ n")
    if args.dry_run:  # asks no hub, so that one forbidden or not reached is no mistake
        os.environ.pop("HF_HUB_OFFLINE", None)
    if not (plan := planned(args.sweep)):
        raise ValueError(f"{args.sweep} plans no run: write a table for each notebook, such as [01_train_topk]")
    plan = plan[int(i) - 1 :: int(n)]
    os.environ[TIER] = str(Path(args.sweep).resolve())
    found = [runs.find_run(*run, needs_saes=False) for run in plan]  # reads all inputs, so that mistakes show at once
    states = [run.state() if run else "missing" for run in found]
    ready = ["finished"] + [s for s in states if args.keep_stale and s.startswith("stale")]
    shown = [(s, run) for s, run in zip(states, plan) if args.list or s not in ready]
    if args.probe and shown:
        rows, failures = probe([run for _, run in shown])
        print_table([("run", "probed at", "hours", "memory GiB", "disk GiB"), *rows])
        print(LEFT_OUT, *failures, sep="\n\n")
        return 1 if failures else 0
    if args.list or args.dry_run or args.probe:
        print_table([(s, label(*run)) for s, run in shown] or [("nothing to do",)])
        return 0
    return 1 if sweep(plan, args.engine, args.gpus) else 0


if __name__ == "__main__":
    sys.exit(main())
