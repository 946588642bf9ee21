"""Files that survive a kill and are shared by processes: paths, hashes, atomic writes, build-once.

Imports no torch, so that the sweep runner can use it.
"""

import ast
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
ASSETS = PACKAGE / "assets"
OUTPUTS = ROOT / "outputs"
BUILTIN_MODEL = "python-lm"
MODEL_FILES = ["config.json", "*.safetensors", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]


def cache_dir() -> Path:
    """Where token and activation caches live: `$SAE_UTILS_CACHE`, or `outputs/cache` of the repository."""
    return Path(os.environ.get("SAE_UTILS_CACHE") or OUTPUTS / "cache")


def offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the hub (the values that huggingface_hub takes for true)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def digest(obj, length: int = 16) -> str:
    """Hex digest of anything JSON can write (dict order does not matter)."""
    text = json.dumps(obj, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_hash(*paths: Path, length: int = 64) -> str:
    """SHA-256 over the bytes of the files, in the order given."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()[:length]


def code_hash(*sources: str, length: int = 16) -> str:
    """Hash of what Python code does: of its syntax trees without docstrings, comments and layout.

    Notebook magics and shell commands (`%time f()`, `!ls`) become the calls that IPython makes of them. Code that is not
    valid Python either way counts as it is written.
    """
    return digest([meaning(source) for source in sources], length)


@functools.cache
def meaning(source: str) -> str:
    """Python code written anew from its syntax tree without docstrings: equal for two sources that do the same by the same steps."""
    try:
        tree = parse(source)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager  # only where there are magics: it takes a while

        try:
            tree = parse(TransformerManager().transform_cell(source))
        except SyntaxError:
            return source
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def parse(source: str) -> ast.Module:
    """The syntax tree of a module or of a notebook's cell, which may `await` outside of a function."""
    return compile(source, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@functools.cache
def source_hashes() -> dict[str, str]:
    """`code_hash` of each `sae_utils` source file, as it is on disk when first asked for."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): code_hash(file.read_text(encoding="utf-8")) for file in files}


def model_hash(model: str) -> str:
    """What identifies a language model: a hash of its weights, configuration and tokenizer if it is `"python-lm"` or a
    local directory, else its hub name (`name` or `name@revision`)."""
    directory = ASSETS / model if model == BUILTIN_MODEL else Path(model).expanduser()
    if not directory.is_dir():
        return model
    named = [file for pattern in MODEL_FILES for file in sorted(directory.glob(pattern))]
    return digest([(file.name, file_hash(file)) for file in named])


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the file is damaged or not ours. Delete it.") from None


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` (file or directory to be made); rename it over `path` on success.

    A kill before the rename leaves `path` as it was. A directory is exchanged for the new one in one step where the system
    can; elsewhere in two renames, and a kill between them leaves the old one in the temporary directory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = scratch / "new"
        yield new
        for file in [new] if new.is_file() else [p for p in new.rglob("*") if p.is_file()]:
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.is_dir() and not exchange(new, path):
            os.replace(path, scratch / "old")
        if new.exists() and not path.is_dir():
            os.replace(new, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Give two existing paths each other's names in one step (renameat2, Linux); False if the system cannot."""
    try:
        at_fdcwd, rename_exchange = -100, 2
        return ctypes.CDLL(None).renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
    except (AttributeError, OSError, TypeError):
        return False


def write_json(path, obj) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(obj, indent=1, sort_keys=True) + "\n")


def lock(path) -> FileLock:
    """A kernel lock beside `path`; the system frees it when its holder dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(path.name + ".lock"))


def build_once(path, build) -> Path:
    """Return `path`, made by `build(temporary_path)` if it is not there.

    Of several processes that want it one builds and the others wait for it.
    """
    path = Path(path)
    if not path.exists():
        with lock(path):
            if not path.exists():
                for leftover in path.parent.glob(f".{path.name}.*"):  # of a builder that was killed: we hold the lock
                    shutil.rmtree(leftover, ignore_errors=True)
                with replacing(path) as new:
                    build(new)
    return path
