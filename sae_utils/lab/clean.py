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
        run = runs.run_at(directory)
        with idle(directory):
            return "unfinished" if not run.manifest["finished"] else "stale" if run.stale() else "finished"
    except Timeout:  # an OSError, as those of damaged files
        return "in progress"
    except runs.DAMAGED:
        return "damaged"


def found(output_dir: str = "") -> dict[str, list[Path]]:
    """{kind: what there is of it}. What a link leads to is not in these directories, and so not among it."""
    caches, base = cache_dir().resolve(), runs.output_dir(output_dir)
    entries = [path for kind in ("tokens", "activations") for path in sorted((caches / kind).glob("[!.]*"))]
    of_kind = {kind: [] for kind in KINDS}
    of_kind["caches"] = [path for path in entries if path.suffix != ".lock" and path.resolve() == path]
    for manifest in sorted(base.glob("*/*/manifest.json")):
        if manifest.parent.resolve() == manifest.parent:
            of_kind[kind_of(manifest.parent)].append(manifest.parent)
    return of_kind


def clean(remove=(), output_dir: str = "") -> list[tuple]:
    """Remove these `REMOVABLE` kinds; the rows of a table of what there was, and what went.

    A run in progress stays, and while there is one, caches stay too: it may read them.
    """
    rows, there = [("what", "number", "size", "")], found(output_dir)
    for kind, paths in there.items():
        taken, gone = size(*paths), 0
        for path in paths if kind in remove and not (kind == "caches" and there["in progress"]) else ():
            with contextlib.suppress(Timeout), idle(path):
                runs.remove(path)
                gone += 1
        said = f"{gone} removed" if gone else "kept: a run is in progress" if kind in remove and paths else ""
        rows.append((kind, len(paths), in_bytes(taken), said))
    return rows
