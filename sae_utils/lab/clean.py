"""What caches and runs take on the disk, and their removal where it is asked for by name."""

import contextlib
from pathlib import Path

from filelock import Timeout

from ..files import cache_dir, in_bytes, lock
from . import runs
from .probe import size

REMOVABLE = "caches", "stale", "unfinished"
KINDS = *REMOVABLE, "finished", "in progress", "damaged"


@contextlib.contextmanager
def idle(path: Path):
    """Hold the locks on a run or on a cache meanwhile; Timeout if a process at work has one."""
    with contextlib.ExitStack() as held:
        for locked in (path, path / "run", path / "kernel"):
            if locked.with_name(locked.name + ".lock").exists():
                held.enter_context(lock(locked).acquire(timeout=0))
        yield


def kind_of(directory: Path) -> str:
    """One of `KINDS` for a directory of runs."""
    try:
        with idle(directory):
            return runs.run_at(directory).state().partition(" (")[0]
    except Timeout:  # an OSError, as those of damaged files
        return "in progress"
    except runs.DAMAGED:
        return "damaged"


def clean(remove=(), output_dir: str = "") -> list[tuple]:
    """Remove these `REMOVABLE` kinds; the rows of a table of what there was, and what went.

    A run in progress stays, and while there is one, caches stay too: it may read them. What a link leads to is left alone.
    """
    caches = [path for kind in ("tokens", "activations") for path in cache_dir().resolve().glob(f"{kind}/[!.]*")]
    there = {"caches": [path for path in caches if path.suffix != ".lock"]}
    for manifest in runs.output_dir(output_dir).glob("*/*/manifest.json"):
        there.setdefault(kind_of(manifest.parent), []).append(manifest.parent)
    rows = [("what", "number", "size", "")]
    for kind in KINDS:
        paths, gone = [path for path in there.get(kind, []) if path.resolve() == path], 0
        taken = in_bytes(size(*paths))
        for path in paths if kind in remove and not (kind == "caches" and "in progress" in there) else ():
            with contextlib.suppress(Timeout), idle(path):
                runs.remove(path)
                gone += 1
        said = f"{gone} removed" if gone else "kept: a run is in progress" if kind in remove and paths else ""
        rows.append((kind, len(paths), taken, said))
    return rows
