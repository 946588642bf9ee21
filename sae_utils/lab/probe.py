"""What planned runs will take: each notebook runs for a few steps at its real shapes, and its needs are extrapolated.

A run is made at two small token counts, `STEPS` batches of the plan's largest `batch_size`; every other parameter is as planned. Through
its seconds, peak memory and disk at the two goes a line, a + b · n_tokens, that is read off at the planned `n_tokens`.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from .execute import RunFailed, run
from .parameters import label

STEPS = 32, 96
UNITS = np.array([3600, 2**30, 2**30])  # hours of seconds, GiB of bytes
LEFT_OUT = """Extrapolated linearly in n_tokens from short runs, each with an empty cache of its own. In all: hours and disk are sums, memory is the largest.
Left out: what a notebook asserts of its results, memory of a GPU, checkpoints (gone when a run ends), the start of kernels, what several runs at once cost each other, and
whatever does not grow linearly. Activations that runs share are counted for each, so a sweep may take less time and disk."""


def size(*places: Path) -> int:
    """Bytes of the files in these places, but for those that go meanwhile."""
    total = 0
    for place in places:
        for directory, _, names in [*os.walk(place)] or [(place.parent, [], [place.name])]:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(directory, name)).st_size
    return total


def measure(name: str, params: dict, scratch: Path) -> np.ndarray:
    """What a run takes with an empty cache: seconds, bytes of memory, and of disk in its directory and its caches.

    Its `assert`s are off: what a notebook checks of trained SAEs is not so after a few steps.
    """
    from unittest import mock  # only here: it takes a while

    cache = Path(tempfile.mkdtemp(dir=scratch))
    with mock.patch.dict(os.environ, SAE_UTILS_CACHE=str(cache), PYTHONOPTIMIZE="1"):
        done = run(name, params, tell="")
    needs = [done.manifest["wall_seconds"], done.manifest["peak_memory"] or 0, size(cache, done.dir)]
    shutil.rmtree(cache)
    return np.array(needs)


def probe(plan) -> tuple[list[tuple], list[str]]:
    """A row for each planned run and one for all of them, and the messages of those that failed.

    plan: (notebook, all parameters) of each. A required run that the plan has before is found, as it will be in the sweep. Work goes
    on in a temporary directory (`$TMPDIR`).
    """
    batch = max(params.get("batch_size", 1024) for _, params in plan)
    rows, failures, needs, known = [], [], [], {}
    with tempfile.TemporaryDirectory(prefix="sae-utils-probe-", ignore_cleanup_errors=True) as scratch:
        for name, params in plan:
            planned = params["n_tokens"]
            counts, measured = sorted({min(n * batch, planned) for n in STEPS}), []  # a small run is measured as it is
            try:
                for n in counts:
                    at = params | {"n_tokens": n, "output_dir": f"{scratch}/outputs"}
                    if (key := str((name, at))) not in known:  # runs that differ in n_tokens alone are probed once
                        known[key] = measure(name, at, Path(scratch))
                    measured.append(known[key])
            except RunFailed as error:
                failures.append(str(error))
                rows.append((label(name, params), "failed", "", "", ""))
                continue
            grows = np.maximum(0, measured[-1] - measured[0])  # noise makes no line fall
            needs.append(measured[-1] + grows * (planned - counts[-1]) / max(1, counts[-1] - counts[0]))
            rows.append((label(name, params), " and ".join(f"{n:,}" for n in counts), *in_units(needs[-1])))
    seconds, memory, disk = np.transpose(needs or [[0, 0, 0]])
    return [*rows, ("in all", "", *in_units([seconds.sum(), memory.max(), disk.sum()]))], failures


def in_units(needs) -> list[str]:
    return [f"{value:.3g}" for value in needs / UNITS]
