"""Files that survive a kill and are shared by processes: paths, hashes, atomic writes, checksums, build-once.

Imports no torch before `tensors_hash` is called, so that the sweep runner can use it.
"""

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

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
ASSETS = PACKAGE / "assets"
OUTPUTS = ROOT / "outputs"
BUILTIN_MODEL = "python-lm"
UNFINISHED = ".unfinished"  # ends the name of a temporary directory
JOURNAL = ".sae_utils.new"  # in a directory: new files on their way to their places
MARK = b"sae_utils crc32:"  # at the end of an array's file, before the 4 bytes of its checksum
N_TRAILER = len(MARK) + 4
FULL = {getattr(errno, name, errno.ENOSPC) for name in ("ENOSPC", "EDQUOT", "EFBIG")}  # Windows lacks some
DISK = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
DISK |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


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


def file_hash(path, length: int = 64) -> str:
    """SHA-256 over the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:length]


def tensors_hash(tensors: dict, about: str = "") -> str:
    """SHA-256 over named tensors (names, types, shapes and bytes) and a text about them."""
    import torch

    sha = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): mend it, write it anew, or remove it") from None


def read_table(path: Path) -> dict:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: mend it, write it anew, or remove it")
    return found


@contextlib.contextmanager
def replacing(path, need: int = 0):
    """Yield a temporary path, for a file or a directory of files to be made there; put it in the place of `path` on success.

    A file is renamed over the old one. Files of a directory replace those of the same names and leave others alone, all in
    one step for readers that look through `current`. A kill or an error leaves the old or the new, whole; what a killed
    process left is removed by the next call in the same directory. A symlink stays, and what it points to is replaced. Files get
    the permissions that the umask says. An OSError of the disk names the path, the bytes it needs and those that are free.
    """
    path = Path(os.path.realpath(path))
    with disk_errors(path, need):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch, held = own_scratch(path)
        new = scratch / "new"
        try:
            yield new
            (scratch / "usual").touch()
            mode = (scratch / "usual").stat().st_mode
            for file in [new] if new.is_file() else new.glob("*"):
                with open(file, "r+b") as f:
                    os.fsync(f.fileno())
                os.chmod(file, mode & 0o777)  # safetensors lets nobody but the owner read
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
    for left in directory.glob(f".*.????????{UNFINISHED}"):
        with contextlib.suppress(OSError):
            if not (left / "lock").exists():
                left.rmdir()  # if it is empty: killed before it had a lock; else it is a user's own
            else:
                with FileLock(left / "lock", timeout=0):
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def allowed(*numbers: int):
    """Pass over an OSError of these numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


def install(new: Path, directory: Path) -> None:
    """Give the files of directory `new` their places in `directory`.

    The rename to `JOURNAL` is the step that counts: from then on `current` finds the new files, and any process can move them
    to their places. So two processes need no lock, and a kill in between leaves a whole directory.
    """
    while new.exists():
        settle(directory)
        with allowed(errno.ENOTEMPTY, errno.EEXIST):  # those say that another process was quicker
            os.replace(new, directory / JOURNAL if directory.is_dir() else directory)
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
def disk_errors(path, need: int = 0):
    """Let an error of the disk name `path`, the bytes that it needs, where that is known, and the bytes that are free."""
    path = Path(os.path.realpath(path))
    try:
        yield
    except Exception as error:
        of_safetensors = re.search(r"\(os error (\d+)\)", str(error))
        number = int(of_safetensors[1]) if of_safetensors else getattr(error, "errno", None)
        about = Path(os.path.realpath(getattr(error, "filename", None) or path))
        elsewhere = path.parent not in about.parents and about not in path.parents
        if number not in DISK or elsewhere or getattr(error, "explained", False):
            raise
        need = getattr(error, "need", need)
        free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free
        kind = type(error) if isinstance(error, OSError) else OSError
        message = kind(
            f"{path} cannot be written: {os.strerror(number)}. "
            f"{f'It needs {in_bytes(need)}, and ' if need else ''}{in_bytes(free)} are free there. "
            f"{'Make room, or choose' if number in FULL else 'Choose'} another place: SAE_UTILS_CACHE is that of caches, "
            f"SAE_UTILS_OUTPUT that of runs"
        )
        message.errno, message.explained = number, True
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
            if hasattr(os, "posix_fallocate"):
                with allowed(errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    os.posix_fallocate(file.fileno(), 0, size)
            put(header.getvalue())
            yield lambda block: put(np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8))
            file.write(MARK + checksum.to_bytes(4, "little"))
            if file.tell() != size:
                raise ValueError(f"the blocks for {path} do not make an array of shape {list(shape)}")
    except OSError as error:
        error.need = size
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
