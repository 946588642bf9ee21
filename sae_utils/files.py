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
import re
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from .values import near

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
ASSETS = PACKAGE / "assets"
OUTPUTS = ROOT / "outputs"
BUILTIN_MODEL = "python-lm"
TOKENIZERS = ["tokenizer.json", "vocab.*", "*.model", "*.tiktoken"]  # a tokenizer's words are in one of these
MODEL_FILES = ["config.json", "*.safetensors", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
MODEL_FILES += ["*.safetensors.index.json", "added_tokens.json", *TOKENIZERS[1:]]  # all that a result depends on
OTHER_WEIGHTS = ["pytorch_model*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf"]


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
    local directory, else its hub name (`name` or `name@revision`). Raises as `find_model` and `check_formats` do."""
    directory = find_model(model)
    if not directory:
        return str(model)
    check_formats(directory)
    return digest([(file.name, file_hash(file)) for file in model_files(directory)])


def find_model(model: str) -> Path | None:
    """The directory of the built-in or a local model, or None for a name that only the hub can know; no network is asked.

    Raises FileNotFoundError for a path that is not there, and for a bare word close to the built-in name or a directory here.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise ValueError(f"model={model!r}: it has to be {BUILTIN_MODEL!r}, a directory, or a hub name")
    path = ASSETS / BUILTIN_MODEL if model == BUILTIN_MODEL else Path(model).expanduser()
    if model == BUILTIN_MODEL or path.is_dir():
        if not (path / "config.json").exists():
            raise no_model(model, f"no config.json in {path}; it has to be a Hugging Face directory")
        return path.resolve()
    if path.exists():
        raise no_model(model, "it is a file, not a directory")
    beside = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    bare = str(model) == path.name
    guess = near(path.name, beside + [BUILTIN_MODEL] * bare, 0.8)
    if path.is_absolute() or str(model).startswith(".") or len(path.parts) > 2 or guess and not bare:
        raise no_model(model, f"no such directory{guess}")
    if guess and "@" not in path.name:
        raise no_model(model, f"no such directory{guess}; if you mean a model of the hub, name its organisation too")
    return None


def no_model(model, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"model={model!r}: {reason}. Allowed: {BUILTIN_MODEL!r}, a Hugging Face directory, or a hub name such as "
        f"'openai-community/gpt2'."
    )


def model_files(directory: Path) -> list[Path]:
    """The files of a model directory on which its results depend."""
    files = [file for pattern in MODEL_FILES for file in sorted(directory.glob(pattern)) if file.is_file()]
    return list(dict.fromkeys(files))


def check_formats(directory: Path) -> None:
    """Raise ValueError for a model directory whose weights are not safetensors, or which holds code or an adapter of its own.

    Nothing else is ever read: other formats can run code, and no hash covers what code and adapters do.
    """
    if code := sorted(directory.glob("*.py")):
        raise ValueError(
            f"{directory} holds code ({code[0].name}), which is never run. If transformers itself has this family, remove the "
            f"code; otherwise the model cannot be used here"
        )
    if (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{directory} holds an adapter. Merge it into its model first (PEFT's merge_and_unload) and save that"
        )
    if any(directory.glob("model.safetensors*")):  # one file, or an index
        return
    other = [file for pattern in OTHER_WEIGHTS for file in sorted(directory.glob(pattern))]
    if other:
        torchs = other[0].name.startswith("pytorch_model")
        again = conversion(directory) if torchs else "Save it anew with the code that wrote it (save_pretrained)"
        raise ValueError(
            f"{directory}: its weights ({other[0].name}) are not safetensors, and nothing else is loaded. {again}"
        )


def conversion(model) -> str:
    """The command that writes a model anew as safetensors."""
    new = Path(str(model).partition("@")[0]).name + "-safetensors"
    return (
        'If you trust the file, convert it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"old, new = {str(model)!r}, {new!r}; M.from_pretrained(old).save_pretrained(new); "
        f'T.from_pretrained(old).save_pretrained(new)" and use {new!r}'
    )


def write_sums(directory) -> None:
    """Write SHA256SUMS, as `sha256sum` does, for a model directory's files: they are verified whenever the model is loaded."""
    directory = Path(directory)
    lines = [f"{file_hash(file)}  {file.name}\n" for file in model_files(directory)]
    with replacing(directory / "SHA256SUMS") as new:
        new.write_text("".join(lines))


def verify(directory: Path) -> None:
    """Raise ValueError for a damaged model file: one with another hash than SHA256SUMS of its directory has, or the hub's cache,
    where large files are named by their hash. A directory without either is not verified. Once per process and file."""
    sums = directory / "SHA256SUMS"
    if sums.exists():
        lines = [re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line) for line in sums.read_text().splitlines()]
        if not all(lines):
            raise ValueError(f"{sums} has a line that sha256sum does not write: write it anew, or delete it")
        wanted = {line[2]: line[1] for line in lines if line[2] != sums.name}
        if unknown := [f.name for f in model_files(directory) if f.suffix == ".safetensors" and f.name not in wanted]:
            raise ValueError(f"{sums} has no line for {unknown[0]}: write it anew with sha256sum, or delete it")
    else:
        blobs = {file.name: file.resolve().name for file in model_files(directory) if file.is_symlink()}
        wanted = {name: blob for name, blob in blobs.items() if re.fullmatch("[0-9a-f]{64}", blob)}
    for name, sha in wanted.items():
        file = directory / name
        if not file.exists() or hash_now(file, file.stat().st_mtime_ns, file.stat().st_size) != sha:
            raise ValueError(
                f"{file} is {'damaged: its bytes are not those' if file.exists() else 'missing: it is one'} that "
                f"{sums if sums.exists() else 'its name in the hub cache'} names. Delete the model and fetch it again"
            )


@functools.cache
def hash_now(file: Path, changed: int, size: int) -> str:
    """`file_hash` of a file as it is now, computed once."""
    return file_hash(file)


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
