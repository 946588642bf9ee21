"""Where text comes from: local files of several kinds, and data sets of the hub, row by row."""

import io
import json
import os
import re
from collections import Counter
from pathlib import Path

from ..files import offline
from ..values import near
from .corpus import BUILTIN

BAD_SHARE = 0.05
SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
HUB_NAME = r"\w[\w.-]*/[\w.-]+(@.+)?"
HUB_SECONDS = 5  # how long the hub may take to answer whether it has a data set
ALLOWED = f"Allowed: {BUILTIN!r}, a {', '.join(SUFFIXES)} file, also compressed (.txt{', .txt'.join(COMPRESSED)}), "
ALLOWED += "a directory of them, or a hub name owner/name[@revision]."


def find(dataset) -> str | Path:
    """What a data set's name means: a local path if there is one, else the built-in corpus' or a hub data set's name."""
    if not isinstance(dataset, (str, os.PathLike)):
        raise ValueError(f"dataset={dataset!r:.80}: it has to be one name or path. {ALLOWED}")
    name = os.fspath(dataset)
    path = Path(os.path.expanduser(name))
    if name == BUILTIN:
        return name
    if name and os.path.exists(path):
        return path
    beside = os.listdir(path.parent)[:1000] if os.path.isdir(path.parent) else []
    guess = near(path.name, [BUILTIN, *sorted(beside)])
    impossible = kind_of(path)[0] in SUFFIXES or not re.fullmatch(HUB_NAME, name)  # on the hub
    if impossible or offline():
        hub = "" if impossible else ", and HF_HUB_OFFLINE forbids the hub"
        raise FileNotFoundError(f"dataset={name!r:.80}: no such file or directory{guess}{hub}. {ALLOWED}")
    return name


def kind_of(file: Path) -> tuple[str, str]:
    """The kind of a file and how it is compressed, by its suffixes in any case: (".jsonl", ".gz") for `A.JSONL.GZ`."""
    stem, last = os.path.splitext(file.name.lower())
    kind = os.path.splitext(stem)[1]
    return (kind, last) if last in COMPRESSED and kind in (".txt", ".jsonl") else (last, "")


def local_files(path: Path) -> tuple[dict[str, Path], Counter]:
    """The files to read, sorted, by their names within `path`, and a count of what is not read: files of other suffixes,
    hidden entries and linked folders, which may lead back."""
    files, others, errors = [path] if path.is_file() else [], Counter(), []
    for directory, folders, names in os.walk(path, onerror=errors.append) if path.is_dir() else ():
        hidden = {name for name in [*folders, *names] if name.startswith(".")}
        linked = {name for name in folders if os.path.islink(os.path.join(directory, name))} - hidden
        others.update(["hidden"] * len(hidden) + ["linked folder"] * len(linked))
        folders[:] = set(folders) - hidden
        files += [Path(directory, name) for name in names if name not in hidden]
    if errors:  # a folder that may not be read
        raise errors[0]
    good = sorted(file for file in files if kind_of(file)[0] in SUFFIXES and file.is_file())
    others.update(kind_of(file)[0] or "without a suffix" for file in set(files).difference(good))
    if not good:
        found = f", but {', '.join(others)}" if others else ""
        raise ValueError(f"dataset={str(path)!r}: no {', '.join(SUFFIXES)} file there{found}. {ALLOWED}")
    return {file.relative_to(path).as_posix() if file != path else file.name: file for file in good}, others


def read_local(path: Path, text_field: str, lost: Counter | None = None):
    """Yield (name, text): one document a .txt file, one a row of .jsonl and .parquet."""
    for name, file in local_files(path)[0].items():
        yield from readable(rows_of(file, name, text_field), text_field, lost)


def rows_of(file: Path, name: str, text_field: str):
    """Yield (name of the document, place, row) of a local file; a row of .jsonl as it is written."""
    import pyarrow

    kind, compression = kind_of(file)
    try:
        if kind == ".parquet":
            for i, row in enumerate(parquet_rows(file, text_field)):
                yield f"{name}:{i}", f"{file}, row {i + 1}", row
            return
        with open(file, "rb") as raw:
            # Python's own readers stop in silence at a damaged later stream of a compressed file; Arrow's do not
            stream = io.BufferedReader(pyarrow.input_stream(raw, compression=COMPRESSED.get(compression)))
            if kind == ".txt":
                yield name, file, {text_field: stream.read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")}
                return
            full = ((n, line) for n, line in enumerate(stream, 1) if line.strip(b" \t\r\n\xef\xbb\xbf"))
            for i, (n, line) in enumerate(full):
                yield f"{name}:{i}", f"{file}, line {n}", line.rstrip()
    except (OSError, ValueError, KeyError) as error:  # KeyError: two columns of one name
        wrong = f"cannot be read as {kind}{compression} ({error})"
        raise ValueError(f"{file} {wrong}: it is damaged or of another kind, mend or remove it") from None


def parquet_rows(file: Path, text_field: str):
    """Rows of a Parquet file with the column of the text only, or with all columns if that one is not there."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        columns = table.schema_arrow.names
        column = text_field if text_field in columns else text_field.split(".")[0]
        wanted = [column] if column in columns else columns
        for batch in table.iter_batches(1024, columns=wanted):
            # by name, as "a.b" may be a column and also a field of a column
            yield from batch.select(wanted).to_pylist()


def readable(rows, text_field: str, lost: Counter | None):
    """Yield (name, text) of the rows that can be read; count the others, and refuse what has more than BAD_SHARE of them."""
    lost, n, bad, first = Counter() if lost is None else lost, 0, 0, ""
    for n, (name, place, row) in enumerate(rows, 1):
        try:
            text = text_of(json.loads(decoded(row)) if isinstance(row, bytes) else row, text_field)
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


def decoded(content: bytes) -> str:
    """UTF-8 text without its byte order mark."""
    if (zero := content.find(b"\0")) >= 0:
        raise ValueError(f"byte {zero:,} is 0, as in UTF-16 or a file cut short: save the text as UTF-8")
    return content.decode("utf-8-sig")


def text_of(row, text_field: str) -> str:
    """The text of a row, "" for a null; ValueError says why there is none. See `text_field` of `tokens`."""
    if not isinstance(row, dict):
        raise ValueError(f"the row is a {type(row).__name__}, not an object with columns")
    value = row
    for key in [text_field] if text_field in row else text_field.split("."):
        if value is None:
            return ""
        if not isinstance(value, dict) or key not in value:
            there = f"The columns are {', '.join(row):.500}"
            raise ValueError(f"no column {text_field!r}. {there}: choose one, or a field of one, with text_field='...'")
        value = value[key]
    if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        value = "\n".join(content_of(message["content"]) for message in value)
    value = decoded(value) if isinstance(value, bytes) else "" if value is None else value
    if not isinstance(value, str):
        chat = " (each message of a list needs role and content)" if isinstance(value, list) else ""
        raise ValueError(f"column {text_field!r} holds {type(value).__name__}, not text{chat}")
    value.encode()  # refuses half of a surrogate pair, which JSON can hold
    return value


def content_of(content) -> str:
    """The text of a chat message, "" for one that only calls a tool; of a list of parts, that of the parts with text."""
    parts = content if isinstance(content, list) else [{"text": content}]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str | None) for part in parts):
        raise ValueError(f"a message's content is {content!r:.80}: it has to be text, or a list of parts with 'text'")
    return "".join(part.get("text") or "" for part in parts)


def hub_rows(dataset: str, config: str = ""):
    """Yield (name of the document, place, row) of a hub data set's split "train", or of its only split."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, revision = dataset.partition("@")
    find_on_hub(name, revision)
    try:
        streams = load_dataset(name, config or None, streaming=True, revision=revision or None)
        if "train" not in streams and len(streams) > 1:
            raise ValueError(f"it has no split 'train' but several others: {', '.join(streams)}")
        for i, row in enumerate(streams.get("train", next(iter(streams.values())))):
            yield f"{name}:{i}", f"{dataset}, row {i + 1}", row
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
        answered = isinstance(error, (HfHubHTTPError, HFValidationError))
        reason = f"the hub {'gives no such data set' if answered else 'is not reached'} ({error!s:.200})"
        raise FileNotFoundError(f"dataset={name!r} is no local path, and {reason}. {ALLOWED}") from None
