"""Where text comes from: local files of several kinds, and data sets of the hub, row by row."""

import bz2
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections import Counter
from pathlib import Path

from ..files import offline
from ..values import near
from .corpus import BUILTIN

BAD_SHARE = 0.05
SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_SECONDS = 5


ALLOWED = (
    f"Allowed: {BUILTIN!r}, a {', '.join(SUFFIXES)} file, also compressed (.txt.gz), a directory of them, or a hub "
)
ALLOWED += "name owner/name[@revision]."


def named(dataset) -> str:
    """The data set's name or path as a string; ValueError for anything else."""
    if not isinstance(dataset, (str, os.PathLike)):
        raise ValueError(f"dataset={dataset!r:.80}: it has to be one name or path. {ALLOWED}")
    return os.fspath(dataset)


def local_path(dataset) -> Path | None:
    """The local path a data set name means, or None for a hub name (`owner/name`)."""
    try:
        path = Path(dataset).expanduser()
        if dataset and path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name too long, no permission, no home
        raise FileNotFoundError(f"dataset={dataset!r:.80}: {getattr(error, 'strerror', error)}. {ALLOWED}") from None
    reason = f" is no local path{similar(path)}, and HF_HUB_OFFLINE forbids the hub" if offline() else ""
    if kind_of(path)[0] in SUFFIXES or path.is_absolute() or dataset.startswith(".") or len(path.parts) != 2:
        reason = f": no such file or directory{similar(path)}"
    if reason:
        raise FileNotFoundError(f"dataset={dataset!r}{reason}. {ALLOWED}")
    return None


def similar(path) -> str:
    """A hint at the built-in corpus or a file or folder beside the path whose name is near."""
    beside = itertools.islice(path.parent.iterdir(), 1000) if path.parent.is_dir() else ()
    return near(path.name, [BUILTIN, *sorted(other.name for other in beside if not other.name.startswith("."))])


def kind_of(file) -> tuple[str, str]:
    """The kind of a file and how it is compressed, by its suffixes in any case: (".jsonl", ".gz") for `A.JSONL.GZ`."""
    stem, last = os.path.splitext(file.name.lower())
    kind = os.path.splitext(stem)[1]
    return (kind, last) if last in COMPRESSED and kind in (".txt", ".jsonl") else (last, "")


def open_zst(file, mode):
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


def open_streams(new, file, mode):
    """What all streams of a file hold, with zeros between them or not. Python's own readers stop at a damaged later stream."""
    text, stream, rest = io.BytesIO(), new(), b""
    with open(file, mode) as f:
        while block := rest or f.read(1 << 20):
            rest = b""
            if stream.eof and (block := block.lstrip(b"\0")):
                stream = new()
            if block:
                text.write(stream.decompress(block))
                rest = stream.unused_data
    if not stream.eof:
        raise EOFError("a stream in it has no end")
    text.seek(0)
    return text


COMPRESSED = {".gz": gzip.open, ".zst": open_zst}
COMPRESSED[".bz2"] = functools.partial(open_streams, bz2.BZ2Decompressor)
COMPRESSED[".xz"] = functools.partial(open_streams, lzma.LZMADecompressor)


def local_files(path) -> tuple[list[Path], Counter]:
    """The files to read, sorted, and a count of what is not read: other suffixes, hidden entries, linked folders."""
    files, others, errors = [path] if path.is_file() else [], Counter(), []
    for directory, folders, names in os.walk(path, onerror=errors.append) if path.is_dir() else ():
        hidden = {name for name in [*folders, *names] if name.startswith(".")}
        linked = {name for name in folders if os.path.islink(os.path.join(directory, name))} - hidden
        others.update(["hidden"] * len(hidden) + ["linked folder"] * len(linked))
        folders[:] = set(folders) - hidden  # linked ones are not entered: they may lead back
        files += [Path(directory, name) for name in names if name not in hidden]
    if errors:  # a folder that may not be read
        raise errors[0]
    good = sorted(file for file in files if kind_of(file)[0] in SUFFIXES and file.is_file())
    others.update(kind_of(file)[0] or "without a suffix" for file in set(files).difference(good))
    if not good:
        found = f", but {', '.join(others)}" if others else ""
        raise ValueError(f"dataset={str(path)!r}: no {', '.join(SUFFIXES)} file there{found}. {ALLOWED}")
    return good, others


def document_name(file, path) -> str:
    return file.name if path.is_file() else file.relative_to(path).as_posix()


def read_local(path, text_field, lost=None):
    """Yield (name, text): one document a .txt file, one a row of .jsonl and .parquet."""
    for file in local_files(path)[0]:
        yield from readable(rows_of(file, document_name(file, path), text_field), text_field, lost)


def rows_of(file, name, text_field):
    """Yield (name of the document, place, function that returns the row) of a local file."""
    kind, compression = kind_of(file)
    try:
        if kind == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(file) as table:
                columns = skeleton(table.schema_arrow)
                try:
                    text_of(columns, text_field)
                except ValueError:
                    yield name, file, lambda: columns
                    return
                column = text_field if text_field in columns else text_field.split(".")[0]
                # by name, as "a.b" may be a column and also a field of a column
                values = itertools.chain.from_iterable(b[column] for b in table.iter_batches(columns=[column]))
                for i, value in enumerate(values):
                    yield f"{name}:{i}", f"{file}, row {i + 1}", lambda value=value: {column: value.as_py()}
            return
        with COMPRESSED.get(compression, open)(file, "rb") as f:
            if kind == ".txt":
                content = f.read()
                yield name, file, lambda: {text_field: decoded(content).replace("\r\n", "\n").replace("\r", "\n")}
                return
            lines = itertools.chain.from_iterable(line.rstrip(b"\r\n").split(b"\r") for line in f)
            full = ((number, line) for number, line in enumerate(lines, 1) if line.strip(b" \t\xef\xbb\xbf"))
            for i, (number, line) in enumerate(full):
                yield f"{name}:{i}", f"{file}, line {number}", lambda line=line: parsed(line)
    except (EOFError, OSError, ValueError, KeyError, zlib.error, lzma.LZMAError) as error:  # KeyError: two of a name
        wrong = f"cannot be read as {kind}{compression} ({error})"
        raise ValueError(f"{file} {wrong}: it is damaged or of another kind, mend or remove it") from None


def skeleton(fields) -> dict:
    """The columns of an Arrow schema as a row of empty strings, with a dict for each struct."""
    from pyarrow.types import is_struct

    return {field.name: skeleton(field.type) if is_struct(field.type) else "" for field in fields}


def decoded(content: bytes) -> str:
    """UTF-8 text without its byte order mark; ValueError names the byte that is none."""
    if (zero := content.find(b"\0")) >= 0:
        raise ValueError(f"byte {zero:,} is 0, as in UTF-16 or a file cut short: save the text as UTF-8")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8: save the text as UTF-8") from None


def parsed(line: bytes):
    """A line of JSON; ValueError says where it is broken."""
    try:
        return json.loads(decoded(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"no valid JSON ({error.msg}: character {error.colno})") from None


def readable(rows, text_field, lost):
    """Yield (name, text) of the rows that can be read; count the others, and refuse what has more than BAD_SHARE of them."""
    lost, n, bad, first = Counter(first="") if lost is None else lost, 0, 0, ""
    for n, (name, place, read) in enumerate(rows, 1):
        try:
            text = text_of(read(), text_field)
        except (ValueError, RecursionError) as error:
            first = first or f"{place}: {error}"
            bad += 1
            lost["bad"] += 1
            lost["first"] = lost["first"] or first
            if bad > BAD_SHARE * max(n, 1000):  # a stream from the hub may have no end
                break
        else:
            yield name, text
    if bad > BAD_SHARE * n:
        raise ValueError(first + f" ({bad:,} of {n:,} rows cannot be read)" * (n > 1))


def text_of(row, text_field: str) -> str:
    """The text of a row, "" for a null; ValueError says why there is none. See `text_field` of `tokens`."""
    if not isinstance(row, dict | None):
        raise ValueError(f"the row is a {type(row).__name__}, not an object with columns")
    value = row
    for key in [text_field] if text_field in (row or ()) else text_field.split("."):
        if value is None:
            return ""
        if not isinstance(value, dict) or key not in value:
            there = f"The columns are {', '.join(columns_of(row)):.500}"
            raise ValueError(f"no column {text_field!r}. {there}: choose one with text_field='...'")
        value = value[key]
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        value = "\n".join(content_of(message["content"]) for message in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        chat = " (each message of a list needs role and content)" if isinstance(value, list) else ""
        raise ValueError(f"column {text_field!r} holds {type(value).__name__}, not text{chat}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start:,} of {text_field!r} is half of a surrogate pair, not text") from None
    return value


def content_of(content) -> str:
    """The text of a chat message, "" for one that only calls a tool; of a list of parts, that of the parts with text."""
    parts = content if isinstance(content, list) else [{"text": content}]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str | None) for part in parts):
        raise ValueError(f"a message's content is {content!r:.80}: it has to be text, or a list of parts with 'text'")
    return "".join(part.get("text") or "" for part in parts)


def columns_of(row: dict, above="") -> list[str]:
    """The names of a row's columns, those of nested fields with dots."""
    nested = [columns_of(v, f"{above}{k}.") if isinstance(v, dict) and v else [f"{above}{k}"] for k, v in row.items()]
    return list(itertools.chain.from_iterable(nested))


def hub_rows(dataset, config=""):
    """Yield (name of the document, place, function that returns the row) of a hub data set's split "train", or of its only split."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, revision = dataset.partition("@")
    find_on_hub(name, revision)
    try:
        streams = load_dataset(name, config or None, streaming=True, revision=revision or None)
        if "train" not in streams and len(streams) > 1:
            raise ValueError(f"it has no split 'train' but several others: {', '.join(streams)}")
        for i, row in enumerate(streams["train"] if "train" in streams else next(iter(streams.values()))):
            yield f"{name}:{i}", f"{dataset}, row {i + 1}", lambda row=row: row
    except (ValueError, RuntimeError, OSError, DatasetsError) as error:
        reason = " ".join(str(error).split("Example of usage")[0].split())
        raise ValueError(f"dataset={dataset!r}, config={config!r} cannot be read: {reason:.500}") from None


def find_on_hub(name: str, revision: str = "") -> None:
    """Ask the hub for a data set; FileNotFoundError if it has none of this name, or cannot be reached within seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, revision=revision or None, timeout=HUB_SECONDS)
    except Exception as error:  # of whatever library speaks HTTP
        reason = f"is no local path, and the hub is not reached ({error})"
        if isinstance(error, (HfHubHTTPError, HFValidationError)):
            reason = f"is no local path, and the hub gives no such data set ({' '.join(str(error).split()):.200})"
        raise FileNotFoundError(f"dataset={name!r}{similar(Path(name))} {reason}. {ALLOWED}") from None
