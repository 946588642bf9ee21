"""Files that survive a kill and are shared by processes: paths, hashes, atomic writes, checksums, build-once.

Imports no torch, so that the sweep runner can use it.
"""

import ast
import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

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
UNFINISHED = ".unfinished"  # ends the name of a temporary directory
JOURNAL = ".sae_utils.new"  # in a directory: new files on their way to their places
MARK = b"sae_utils crc32:"  # at the end of an array's file, before the 4 bytes of its checksum
N_TRAILER = len(MARK) + 4
DISK = {
    getattr(errno, name, None)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR EISDIR EEXIST ENAMETOOLONG".split()
} - {None}


def cache_dir() -> Path:
    """Where token and activation caches live: `$SAE_UTILS_CACHE`, or `outputs/cache` of the repository."""
    return Path(os.environ.get("SAE_UTILS_CACHE") or OUTPUTS / "cache").expanduser()


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
def replacing(path, need: int = 0):
    """Yield a temporary path, for a file or a directory of files to be made there; put it in the place of `path` on success.

    A file is renamed over the old one. Files of a directory replace those of the same names and leave others alone, all in
    one step for readers that look through `current`. A kill or an error leaves the old or the new, whole; what a killed
    process left is removed by the next call in the same directory. A symlink stays, and what it points to is replaced. Files get
    the permissions that the umask says. An OSError of the disk names the path, the bytes it needs (`need`, or those written
    so far) and those that are free.
    """
    path = Path(os.path.realpath(path))
    with disk_errors(path, need):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch, held = own_scratch(path)
        new = scratch / "new"
        try:
            with disk_errors(path, need, new):
                yield new
                (scratch / "usual").touch()
                mode = (scratch / "usual").stat().st_mode
                for file in files_of(new):
                    with open(file, "r+b") as f:
                        os.fsync(f.fileno())
                    if file.stat().st_mode != mode:  # safetensors lets nobody but the owner read
                        os.chmod(file, mode & 0o777)
                install(new, path) if new.is_dir() else os.replace(new, path)
        finally:
            held.release()
            shutil.rmtree(scratch, ignore_errors=True)


def own_scratch(path: Path) -> tuple[Path, FileLock]:
    """A new hidden directory beside the file `path`, or in the directory `path`, and a lock on it."""
    homes = [path.parent] + [path] * path.is_dir()
    for home in homes:
        remove_leftovers(home)
    while True:
        scratch = homes[-1] / f".{path.name[:60]}.{secrets.token_hex(4)}{UNFINISHED}"
        scratch.mkdir()
        held = FileLock(scratch / "lock", timeout=0)
        try:
            held.acquire()
        except (Timeout, FileNotFoundError, FileExistsError):  # another process just took it for a dead one's
            continue
        except OSError:  # a disk without locks: leftovers stay
            pass
        return scratch, held


def remove_leftovers(directory: Path) -> None:
    """Remove what dead processes left half made in a directory: nobody holds the locks of those."""
    for left in directory.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError), FileLock(left / "lock", timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def install(new: Path, directory: Path) -> None:
    """Give the files of directory `new` their places in `directory`.

    The rename to `JOURNAL` is the step that counts: from then on `current` finds the new files, and any process can move them
    to their places. So two processes need no lock, and a kill in between leaves a whole directory.
    """
    while new.exists():
        settle(directory)
        try:
            os.replace(new, directory / JOURNAL if directory.is_dir() else directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # those say that another process was quicker
                raise
    settle(directory)


def settle(directory: Path) -> None:
    """Move files that wait in the journal of `directory` to their places."""
    try:
        waiting = os.listdir(directory / JOURNAL)
    except FileNotFoundError:
        return
    for name in waiting:
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            os.replace(directory / JOURNAL / name, directory / name)
    with contextlib.suppress(OSError):  # another process was quicker, or has the next files there
        os.rmdir(directory / JOURNAL)


def current(directory: Path, name: str) -> Path:
    """Where a file is in a directory that `replacing` writes: in its place, or still in the journal after a kill."""
    waiting = directory / JOURNAL / name
    return waiting if waiting.exists() else directory / name


@contextlib.contextmanager
def disk_errors(path, need: int = 0, written: Path | None = None):
    """Let an error of the disk name `path`, the bytes it needs (at least those `written`) and the bytes that are free."""
    path = Path(os.path.realpath(path))
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors
            number = int(found[1])
        about = getattr(error, "filename", None)
        about = Path(os.path.realpath(about)) if isinstance(about, (str, Path)) else path
        elsewhere = path.parent not in about.parents and about not in path.parents
        explained = isinstance(error, OSError) and error.strerror is None
        if number not in DISK or elsewhere or explained:
            raise
        so_far = sum(file.stat().st_size for file in files_of(written)) if written else 0
        free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free + so_far
        needs = f"It needs more than {in_bytes(so_far)}, and " if so_far else ""
        if need := getattr(error, "need", need):
            needs = f"It needs {in_bytes(need)}, and "
        kind = type(error) if isinstance(error, OSError) else OSError
        message = kind(
            f"{path} cannot be written: {os.strerror(number)}. {needs}{in_bytes(free)} are free there. Make room, "
            f"or choose another place: SAE_UTILS_CACHE is that of caches, SAE_UTILS_OUTPUT that of runs"
        )
        message.errno = number
        raise message from error


def in_bytes(n: int) -> str:
    """`"1.50 GiB"`, in the largest unit of which there is at least one."""
    power = min(max(n, 1).bit_length() - 1, 40) // 10
    return f"{n / 2 ** (10 * power):.2f} {'KMGT'[power - 1]}iB" if power else f"{n} bytes"


@contextlib.contextmanager
def array_writer(path, shape, dtype):
    """Yield a function that appends blocks of rows to a new .npy file, which a checksum ends. NumPy passes over the checksum.

    The space is reserved first, so that a full disk is an error before the work. Systems that cannot (macOS, Windows, some
    network disks) reserve nothing: there the write that finds the disk full raises that error.
    """
    dtype, header, checksum = np.dtype(dtype), io.BytesIO(), 0
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(header, about)
    size = header.tell() + math.prod(shape) * dtype.itemsize + N_TRAILER

    def put(data) -> None:
        nonlocal checksum
        checksum = zlib.crc32(data, checksum)
        file.write(data)

    try:
        with open(path, "wb") as file:
            reserve(file, size)
            put(header.getvalue())
            yield lambda block: put(np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8))
            file.write(MARK + checksum.to_bytes(4, "little"))
            if file.tell() != size:
                raise ValueError(f"the blocks for {path} do not make an array of shape {list(shape)}")
    except OSError as error:
        error.need = size
        raise


def reserve(file, n_bytes: int) -> None:
    """Take the space for n bytes now, where the system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def open_array(path, mode="r") -> np.memmap:
    """Open a file of `array_writer` as a memory map ("r" read-only, "c" copy-on-write).

    The checksum is verified when a process first opens the file. ValueError with the path if the file is truncated, damaged
    or foreign.
    """
    try:
        stat = os.stat(path)
        if not verified(os.path.realpath(path), stat.st_ino, stat.st_mtime_ns, stat.st_size):
            raise ValueError("its checksum is missing or wrong")
        return np.lib.format.open_memmap(path, mode=mode)  # unlike np.load it knows no other format
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole .npy file ({error}): delete it and it will be made again") from None


@functools.cache
def verified(path: str, *version: int) -> bool:
    """Whether the checksum at the end of a file is that of the bytes before it; read once for each version of the file."""
    left, checksum = max(0, version[-1] - N_TRAILER), 0
    with open(path, "rb") as file:
        while block := file.read(min(left, 1 << 20)):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
        return file.read() == MARK + checksum.to_bytes(4, "little")


def write_json(path, obj) -> None:
    text = json.dumps(obj, indent=1, sort_keys=True) + "\n"
    with replacing(path, len(text)) as new:
        new.write_text(text)


def lock(path) -> FileLock:
    """A kernel lock beside `path`; the system frees it when its holder dies."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(path.name + ".lock"))


def build_once(path, build) -> Path:
    """Return `path`, made by `build(temporary_path)` if it is not there.

    Of several processes that want it one builds and the others wait for it.
    """
    path = Path(path)
    if not path.exists():
        with disk_errors(path), lock(path):
            if not path.exists():
                with replacing(path) as new:
                    build(new)
    return path
