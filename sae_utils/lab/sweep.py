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
import json
import os
import re
import shlex
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from . import runs
from .clean import REMOVABLE, clean
from .execute import KEEP_STALE, PARENT, RunFailed, run
from .parameters import (
    TIER,
    check_together,
    combinations,
    declared_in,
    defaults,
    label,
    notebook_path,
    notebooks,
    notebooks_dir,
    read_sweep,
)
from .probe import LEFT_OUT, probe
from .runs import DAMAGED, Run, in_words


def parse_value(name: str, text: str, declared: str):
    """A value from the command line, by its declared type ("false" is False for a bool); ValueError if it has another."""
    kind, _, element = declared.rstrip("]").partition("[")
    try:
        if element:
            inner = re.fullmatch(r"\[([^\[\]]*)\]|([^\[\]]*)", text.strip())
            items = [item.strip().strip("'\"") for item in (inner[1] or inner[2] or "").split(",")] if inner else [""]
            if inner and items == [""]:
                return []
            if not all(items):
                raise ValueError("a bracket or an item is missing")
            return [parse_value(name, item, element) for item in items]
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return {"int": int, "float": float, "str": str, "list": json.loads, "dict": json.loads}[kind](text)
    except (KeyError, ValueError):
        raise ValueError(f"-p {name} {text}: {name} is declared {declared}") from None


def parse_values(name: str, pairs) -> dict:
    """The (name, text) pairs of the command line as parameters of a notebook."""
    declared = declared_in(notebook_path(name), [key for key, _ in pairs])
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"-p {twice[0]} is given more than once: give it one value")
    return {key: parse_value(key, text, declared[key].type) for key, text in pairs}


def planned(path) -> list[tuple[str, dict]]:
    """(notebook, all parameters) of every run of a sweep, in order."""
    tables = read_sweep(path)
    points = [(name, point) for name in tables if name != "shared" for point in combinations(tables, name)]
    return [(name, check_together(name, defaults(name) | point)) for name, point in points]


def notebook_name(text: str) -> str:
    """The name of a notebook given by name or by path; ValueError for a path outside of the notebooks' directory, or a sweep."""
    path = Path(text)
    if path.suffix == ".toml":
        raise ValueError(f"{text} is a sweep file, not a notebook: leave out `run`")
    if path.suffix == ".ipynb" and notebooks().get(path.stem) != path.resolve():
        raise ValueError(f"{text} is not in {notebooks_dir()}")
    return path.stem if path.suffix == ".ipynb" else text


def state(name: str, params: dict) -> str:
    """`"finished"`, `"stale (why)"` or `"missing"`; the runs committed as reference count."""
    return in_a_word(runs.find_run(name, params, needs_saes=False))


def in_a_word(found: Run | None) -> str:
    why = found.stale() if found else ""
    return f"stale ({why})" if why else "finished" if found else "missing"


def sweep(plan, engine: str = "local", gpus: float = 1.0) -> int:
    """Execute the planned runs; returns how many failed, after a table and the failures in full.

    engine: "local", one after the other, or "ray", as many at once as there are resources for (`gpus` each).
    """
    numbered = [(i, f"[{i}/{len(plan)}] ", *one) for i, one in enumerate(plan, start=1)]
    results = {}
    for number, said, *result in on_ray(numbered, gpus) if engine == "ray" else map(attempt, numbered):
        print(said, flush=True)
        results[number] = result
    results = [results[number] for number in sorted(results)]
    print()
    print_table([("run", "minutes", "metrics", "directory"), *(row for row, error in results if not error)])
    failures = [error for _, error in results if error]
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return len(failures)


def attempt(planned_run: tuple[int, str, str, dict]):
    """One run of a sweep: (its number there, how it went in a line, its row in the table, error or ""). Raises nothing."""
    number, prefix, name, params = planned_run
    start, there = time.monotonic(), state(name, params) == "finished"
    row = error = ""
    try:
        done = run(name, params, needs_saes=False, tell=prefix)
        row = label(name, params), minutes_of(done), key_metrics(done), done.dir
    except Exception as raised:
        why = in_words(raised) if isinstance(raised, DAMAGED) else repr(raised)
        error = str(raised) if isinstance(raised, RunFailed) else f"{label(name, params)} failed: {why}"
    outcome = "FAILED" if error else "found" if there else "done"
    return number, f"{prefix}{label(name, params)}: {outcome}, {(time.monotonic() - start) / 60:.1f} min", row, error


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
        gpus = gpus if there else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0)(attempt)
        running = {remote.remote(planned_run): planned_run for planned_run in plan}
        while running:
            (ended,), _ = ray.wait(list(running))
            number, prefix, *lost = running.pop(ended)
            try:
                yield ray.get(ended)
            except ray.exceptions.RayError as error:  # a worker that died
                yield number, f"{prefix}{label(*lost)}: FAILED", "", f"{label(*lost)} failed: {error}"
    finally:
        ray.shutdown()


def key_metrics(done: Run, n: int = 3) -> str:
    """The metrics that the run lists under `"key"`, else its first few numbers."""
    metrics = done.metrics
    numbers = {name: value for name, value in metrics.items() if type(value) in (int, float) and abs(value) < 1e300}
    shown = {name: f"{name}={value:.4g}" for name, value in numbers.items()}
    names = map(str, metrics["key"]) if isinstance(metrics.get("key"), list) else [*shown][:n]
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
            if done.manifest["finished"]:
                about = key_metrics(done), minutes_of(done), runs.made_on(done.manifest), in_a_word(done), directory
                rows.append((label(done.name, done.parameters), *about))
        except DAMAGED as error:
            rows.append((directory.parent.name, "", "", "", f"damaged ({in_words(error)})", directory))
    return rows


def print_table(rows) -> None:
    """The rows with their columns aligned; characters that are none to see, such as those that steer a terminal, as escapes."""
    rows = [["".join(c if c.isprintable() else repr(c)[1:-1] for c in str(item)) for item in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(item.ljust(width) for item, width in zip(row, widths)).rstrip())


def shard(text: str) -> tuple[int, int]:
    """`"i/n"`, 1 ≤ i ≤ n."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 1 ≤ i ≤ n")
    return int(i), int(n)


def end_with(parent: int) -> None:
    """End this process when its parent is gone, be it killed; the kernel it drives then ends itself."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


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
    tell = ""
    if PARENT in os.environ:  # `require` executes this; its caller says what it waits for
        threading.Thread(target=end_with, args=(int(os.environ.pop(PARENT)),), daemon=True).start()
        tell = None
    one = argparse.ArgumentParser(prog="python -m sae_utils.sweep run", description="Execute one notebook.")
    one.add_argument("notebook", help="its name, such as 01_train_topk, or its path")
    one.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="params")
    past = argparse.ArgumentParser(prog="python -m sae_utils.sweep runs", description="List finished runs.")
    past.add_argument("notebook", nargs="?", default="", help="only those of this one")
    about = "Show what caches and runs take; remove what is named."
    rid = argparse.ArgumentParser(prog="python -m sae_utils.sweep clean", description=about)
    for kind in REMOVABLE:
        rid.add_argument(f"--{kind}", action="append_const", const=kind, dest="remove", default=[])
    about = (
        "Execute the runs of a sweep file. One run: `run NOTEBOOK`. What is finished: `runs [NOTEBOOK]`. Disk: `clean`."
    )
    many = argparse.ArgumentParser(prog="python -m sae_utils.sweep", description=about)
    many.add_argument("sweep", metavar="SWEEP.toml")
    many.add_argument("--engine", choices=["local", "ray"], default="local")
    many.add_argument("--gpus", type=float, default=1.0, help="share of a GPU for each run (engine ray)")
    many.add_argument("--list", action="store_true", help="show the planned runs and their state")
    many.add_argument("--dry-run", action="store_true", help="check all parameters; list what would be executed")
    many.add_argument("--probe", action="store_true", help="a few steps of each run: hours, memory, disk of all of it")
    every = "only every n-th planned run, from the i-th"
    many.add_argument("--shard", type=shard, default=(1, 1), metavar="i/n", help=every)
    for parser in (past, rid):
        parser.add_argument("--output-dir", default="", metavar="DIR", help="where the runs are, if not in outputs/")
    for parser in (one, many):
        parser.add_argument("--keep-stale", action="store_true", help="use runs made by other sae_utils sources")
    if argv[:1] == ["runs"]:
        args = past.parse_args(argv[1:])
        name = notebook_name(args.notebook)
        rows = listed(name and notebook_path(name).stem, args.output_dir)
        titles = [("run", "metrics", "minutes", "made on", "state", "directory")] if rows else []
        print_table(titles + rows or [(f"no finished run in {runs.output_dir(args.output_dir)}",)])
        return 0
    if argv[:1] == ["clean"]:
        args = rid.parse_args(argv[1:])
        print_table(clean(args.remove, args.output_dir))
        return 0
    args = one.parse_args(argv[1:]) if argv[:1] == ["run"] else many.parse_args(argv)
    if args.keep_stale:
        os.environ[KEEP_STALE] = "1"  # for `run` here, in workers and in the notebooks' own `require`
    if argv[:1] == ["run"]:
        name = notebook_name(args.notebook)
        done = run(name, parse_values(name, args.params), tell=tell)
        print_table([(label(name, done.parameters), key_metrics(done), done.dir)])
        return 0
    i, n = args.shard
    if args.dry_run:  # asks no hub, so that one forbidden or not reached is no mistake
        os.environ.pop("HF_HUB_OFFLINE", None)
    if not (plan := planned(args.sweep)):
        raise ValueError(f"{args.sweep} plans no run: write a table for each notebook, such as [01_train_topk]")
    plan = plan[i - 1 :: n]
    os.environ[TIER] = str(Path(args.sweep).resolve())
    states = [state(name, params) for name, params in plan]  # reads all inputs, so that mistakes show at once
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
