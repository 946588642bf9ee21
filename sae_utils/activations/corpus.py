"""The built-in corpus `"python-source"`: the source text of pinned packages that the requirements install anyway.

`assets/python-source.sha256` lists its files; a file that is missing or differs is left out and reported, so the corpus
is the same bytes wherever it is read. The token rows that the chapters ask for are in `assets/python-source-rows`, so that
they do not depend on the packages; `benchmarks/ship_rows.py` makes them.
"""

import functools
import hashlib
import sysconfig
import warnings
from pathlib import Path

from ..files import ASSETS, digest, file_hash

BUILTIN = "python-source"
MANIFEST = ASSETS / "python-source.sha256"
ROWS = ASSETS / "python-source-rows"


def site_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def manifest_lines(manifest: Path) -> list[tuple[str, str]]:
    """(sha256, path) of every file of the built-in corpus."""
    return [tuple(line.split("  ")) for line in manifest.read_text().splitlines()]


@functools.cache
def left_out(manifest: Path, site: Path) -> list[str]:
    """Paths of the manifest that are missing from the site directory or differ there; looked up once."""

    def differs(path: str, sha256: str) -> bool:
        try:
            with open(f"{site}/{path}", "rb") as file:  # for thousands of small files quicker than `file_hash`
                return hashlib.sha256(file.read()).hexdigest() != sha256
        except OSError:
            return True

    return [path for sha256, path in manifest_lines(manifest) if differs(path, sha256)]


def report_left_out() -> None:
    """Warn of the files of the built-in corpus that are left out."""
    if differ := left_out(MANIFEST, site_packages()):
        packages = sorted({path.split("/")[0] for path in differ})
        why = f"{len(differ)} files are missing or differ from the manifest and are left out (of {packages})"
        warnings.warn(f"{BUILTIN}: {why}: install the exact versions of requirements.txt for the same corpus")


def builtin_hash() -> str:
    """What identifies the built-in corpus: the manifest, and the files left out if there are any."""
    missing = left_out(MANIFEST, site_packages())
    return digest([file_hash(MANIFEST), missing]) if missing else file_hash(MANIFEST, length=16)


def builtin_documents():
    """Yield (path, text) of the built-in corpus as its manifest lists it, without the files left out."""
    report_left_out()
    site, missing = site_packages(), set(left_out(MANIFEST, site_packages()))
    for _, path in manifest_lines(MANIFEST):
        if path not in missing:
            yield path, (site / path).read_bytes().decode()


def shipped_rows(tokenizer_hash: str, n_ctx, n_tokens, split, bos, spread) -> Path:
    """Where these rows of the built-in corpus are if they ship with the repository; the name holds what determines them."""
    return ROWS / f"{split}-{n_tokens}-{digest([file_hash(MANIFEST), tokenizer_hash, n_ctx, bos, spread])}.npy"
