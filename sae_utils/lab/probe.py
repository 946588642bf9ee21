"""What planned runs will take: each notebook runs for a few steps at its real shapes, and its needs are extrapolated.

A run is made at two small token counts, `STEPS` batches of the plan's largest `batch_size`; every other parameter is as planned. Through
its seconds, peak memory and disk at the two goes a line, a + b · n_tokens, that is read off at the planned `n_tokens`.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import runs
from .execute import RunFailed, run_apart
from .parameters import label

STEPS = 32, 96
GIB = 2**30
LEFT_OUT = """Extrapolated linearly in n_tokens from short runs, each with an empty cache of its own. In all: hours and disk are sums, memory is the largest.
Left out: what a notebook asserts of its results, memory of a GPU, checkpoints (gone when a run ends), the start of kernels, what several runs at once cost each other, and
whatever does not grow linearly. Activations that runs share are counted for each, so a sweep may take less time and disk."""


class Needs(NamedTuple):
    """What one run took, or will take."""

    seconds: float
    memory: float  # bytes: the largest resident set of its kernel
    disk: float  # bytes that it leaves: its directory and its caches

    def row(self) -> tuple[str, ...]:
        return f"{self.seconds / 3600:.3g}", f"{self.memory / GIB:.3g}", f"{self.disk / GIB:.3g}"


def size(*places: Path) -> int:
    """Bytes of the files in these places, but for those that go meanwhile."""
    total = 0
    for place in places:
        for directory, _, names in [*os.walk(place)] or [(place.parent, [], [place.name])]:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(directory, name)).st_size
    return total


def token_counts(plan, params: dict) -> list[int]:
    """The two counts to probe a run at: at most what is planned, so that a small run is measured as it is."""
    batch = max(p.get("batch_size", 1024) for _, p in plan)
    return sorted({min(n * batch, params["n_tokens"]) for n in STEPS})


def measure(name: str, params: dict, scratch: Path) -> Needs:
    """Make a run with an empty cache in a process of its own; RunFailed with its message if it fails.

    Its `assert`s are off: what a notebook checks of trained SAEs is not so after a few steps.
    """
    cache = Path(tempfile.mkdtemp(dir=scratch))
    done = run_apart(name, params, SAE_UTILS_CACHE=str(cache), PYTHONOPTIMIZE="1")
    found = runs.find_run(name, params)
    if done.returncode or not found:
        raise RunFailed(done.stderr.strip())
    needs = Needs(found.manifest["wall_seconds"], found.manifest["peak_memory"] or 0, size(cache, found.dir))
    shutil.rmtree(cache)
    return needs


def extrapolated(counts, measured: list[Needs], n_tokens: int) -> Needs:
    """The line through the needs at the two counts, at n tokens; noise makes no line fall."""
    if len(counts) == 1:
        return measured[0]
    steps = (n_tokens - counts[1]) / (counts[1] - counts[0])
    return Needs(*(more + steps * max(0.0, more - less) for less, more in zip(*measured)))


def probe(plan) -> tuple[list[tuple], list[str]]:
    """A row for each planned run and one for all of them, and the messages of those that failed.

    plan: (notebook, all parameters) of each. A required run that the plan has before is found, as it will be in the sweep. Work goes
    on in a temporary directory (`$TMPDIR`).
    """
    rows, failures, needs, known = [], [], [], {}
    with tempfile.TemporaryDirectory(prefix="sae-utils-probe-", ignore_cleanup_errors=True) as scratch:
        for i, (name, params) in enumerate(plan, start=1):
            counts, measured = token_counts(plan, params), []
            try:
                for n in counts:
                    at = params | {"n_tokens": n, "output_dir": f"{scratch}/outputs"}
                    print(f"[{i}/{len(plan)}] {name} at {n:,} tokens", file=sys.stderr, flush=True)
                    if str((name, at)) not in known:  # runs that differ in n_tokens alone are probed once
                        known[str((name, at))] = measure(name, at, Path(scratch))
                    measured.append(known[str((name, at))])
            except RunFailed as error:
                failures.append(str(error))
                rows.append((label(name, params), "failed", "", "", ""))
            else:
                needs.append(extrapolated(counts, measured, params["n_tokens"]))
                rows.append((label(name, params), " and ".join(f"{n:,}" for n in counts), *needs[-1].row()))
    seconds, memory, disk = zip(*needs) if needs else ([0], [0], [0])
    return [*rows, ("in all", "", *Needs(sum(seconds), max(memory), sum(disk)).row())], failures
