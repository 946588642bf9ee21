"""Text to tokens: the built-in corpus, local files, hub data sets; split, packed, memory-mapped.

The built-in corpus `"python-source"` is the source text of pinned packages that the requirements install anyway.
`assets/python-source.sha256` lists its files; a file that is missing or differs is left out and reported, so the corpus
is the same bytes wherever it is read. The token rows that the chapters ask for are in `assets/python-source-rows`, so that
they do not depend on the packages.

A document goes to one split only: by the hash of its name, 90% train, 5% validation, 5% test (local documents, which may be
few: by the rank of that hash). A source of fewer than `FEW_DOCUMENTS` documents cannot be split that way; there each document
is cut in that order and proportion.

Text is not lost in silence: `tokens` warns of what is left out, also when its rows come from the cache. That is
- near-duplicates: more than half of such a document, by characters, stands in documents before it (see `marks`);
- empty documents and nulls;
- rows that cannot be read (broken JSON, no such column, no text, no UTF-8). A file or hub data set with more than
  `BAD_SHARE` of them is refused;
- files of other kinds, hidden files and folders, and linked folders.
"""

import bz2
import copy
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sysconfig
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from .files import (
    ASSETS,
    BUILTIN_MODEL,
    array_writer,
    build_once,
    cache_dir,
    code_hash,
    digest,
    file_hash,
    offline,
    open_array,
    replacing,
)
from .values import flag, near, one_of, whole

BUILTIN = "python-source"
MANIFEST = ASSETS / "python-source.sha256"
ROWS = ASSETS / "python-source-rows"
# What the chapters ask for with their defaults, in rows of 256 tokens of `python-lm`: split, n_tokens, spread.
SHIPPED = [("train", 600_000, 16), ("train", 1_024_000, 1), ("validation", 16_384, 1)]
SHIPPED += [(split, n_tokens, 16) for split in ("validation", "test") for n_tokens in (16_384, 32_768, 65_536)]
PACKAGES = """torch transformers sympy pandas matplotlib numpy networkx transformer_lens huggingface_hub IPython datasets
    mpmath PIL tornado seaborn fsspec""".split()
SPLITS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}
FEW_DOCUMENTS = 20
BAD_SHARE = 0.05
CONTEXT = 60
SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_SECONDS = 5
# The functions that decide which rows a text gives: rows made by other code are not taken from the cache.
RULES = """pack token_stream documents split_of part name_hash distinct marks builtin_documents left_out read_local local_files
    kind_of document_name rows_of readable text_of skeleton parsed decoded hub_rows""".split()
NOT_SOURCE = re.compile(
    r"(^|/)(tests?|testing|_testing|_?vendor(ed)?|externals|third_party|_generated)/"
    r"|(^|/)(test_[^/]*|[^/]*_test|conftest|_?version|__config__|_distributor_init|[^/]*_pb2)\.py$"
)
GENERATED = re.compile(r"auto-?(matically )?-?generated|do not edit|generated (by|from|file)", re.IGNORECASE)


def tokens(
    dataset,
    tokenizer,
    n_ctx,
    n_tokens=0,
    split="train",
    bos=False,
    text_field="text",
    spread=1,
    config="",
    deduplicate=True,
) -> np.memmap:
    """Token rows of a data set, as a read-only memory map [rows, n_ctx] of uint16 (uint32 for a vocabulary over 65,536).

    dataset: `"python-source"`; a local .txt, .jsonl or .parquet file or a directory of them, also compressed; otherwise a hub
    name owner/name, streamed from its split "train" or its only split.
    n_tokens: how many to take, 0 for all (a hub data set needs a number). Fewer are returned, with a warning, if there are fewer.
    split: "train", "validation" or "test". bos: start every row with the tokenizer's BOS token (not the default).
    text_field: the column of the text, or a field within a column ("data.text"). A column of chat messages, a list of
    {"role", "content"}, is read as the contents joined by newlines.
    spread: take rows at equal steps from up to `spread` times as much text, so that they come from as many more documents; what
    is streamed from a hub, whose documents are short and many, is taken as it comes.
    config: the configuration of a hub data set. deduplicate: leave out near-duplicates of earlier documents; without it, copies
    of a document may be in several splits.

    Documents are joined by the end-of-text token and cut into rows, which start anywhere; the last partial row is dropped.
    A UserWarning counts the documents and files that are left out and says why.
    Raises ValueError for a bad value, an empty data set or a bad file, FileNotFoundError for a data set that is not found.
    """
    dataset = named(dataset)
    one_of("split", split, SPLITS)
    n_ctx, n_tokens, spread = whole("n_ctx", n_ctx, 2), whole("n_tokens", n_tokens, 0), whole("spread", spread)
    bos, deduplicate = flag("bos", bos), flag("deduplicate", deduplicate)
    if not all(hasattr(tokenizer, name) for name in ("eos_token_id", "get_vocab", "is_fast")):
        raise ValueError(
            f"tokenizer={tokenizer!r:.80} is not a tokenizer: pass lm.tokenizer, or transformers.AutoTokenizer.from_pretrained(name)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token), which joins documents: set tokenizer.eos_token"
        )
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos_token")
    if not isinstance(text_field, str) or not text_field:
        raise ValueError(f"text_field={text_field!r}: it has to be the name of a column, such as 'text' or 'data.text'")
    n_rows = n_tokens // n_ctx
    if n_tokens and not n_rows:
        raise ValueError(f"n_tokens={n_tokens} is less than one row of n_ctx={n_ctx}")
    corpus, local = corpus_hash(dataset, config), dataset != BUILTIN and local_path(dataset)
    streamed = local is None
    if streamed and not n_tokens:
        raise ValueError(f"n_tokens=0: dataset={dataset!r} is streamed from the hub, so say how many tokens to take")
    spread = spread if n_tokens and not streamed else 1
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    about = [tokenizer_hash(tokenizer), n_ctx, n_tokens, split, bos, spread]
    path = cache_dir() / "tokens" / f"{digest([corpus, *about, text_field, deduplicate, rules()])}.npy"
    note = path.with_suffix(".lost")

    def build(new):
        lost = Counter(first="")
        texts = documents(dataset, split, text_field, config, deduplicate, lost)
        ids = token_stream(texts, tokenizer, lost)
        rows = pack(ids, n_ctx, n_rows, spread, tokenizer.bos_token_id if bos else None, dtype)
        text = losses(lost)
        if not len(rows):
            held = f"dataset={dataset!r}, split={split!r} holds {lost['tokens']} tokens"
            raise ValueError(f"{held}: not one row of {n_ctx}{text and '; '}{text}")
        if text:
            with replacing(note) as file:
                file.write_text(text, encoding="utf-8", errors="backslashreplace")
        with array_writer(new, rows.shape, dtype) as append:
            append(rows)

    if dataset == BUILTIN and (shipped := shipped_rows(*about)).is_file():
        path = shipped
    else:
        build_once(path, build)
        if dataset == BUILTIN:
            report_left_out()
    rows = open_array(path)
    if rows.ndim != 2 or rows.shape[1] != n_ctx or rows.dtype != dtype:
        raise ValueError(f"{path} holds {rows.dtype}{list(rows.shape)}, not {dtype.__name__}[rows, {n_ctx}]: delete it")
    if lost := "; ".join(
        filter(None, [note.read_text(encoding="utf-8", errors="replace") if note.exists() else "", unread(local)])
    ):
        warnings.warn(f"dataset={dataset!r}: {lost}")
    if len(rows) < n_rows:
        warnings.warn(
            f"dataset={dataset!r}, split={split!r} has {rows.size:,} tokens, fewer than n_tokens={n_tokens:,}"
        )
    return rows


def held_out(dataset, tokenizer, n_ctx: int, n_tokens: int, split: str = "test", spread: int = 16, **options):
    """Rows for evaluation, about n_tokens, spread over many documents: `tokens` of another split, without a warning if it is small."""
    n_tokens = max(whole("n_tokens", n_tokens, 0), whole("n_ctx", n_ctx, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer than n_tokens")
        return tokens(dataset, tokenizer, n_ctx, n_tokens, split, spread=spread, **options)


def pack(ids, n_ctx, n_rows, spread, bos, dtype) -> np.ndarray:
    """Rows [n_rows, n_ctx] of the documents' token ids, at equal steps from `spread` times as much; n_rows=0 for all."""
    body = n_ctx - (bos is not None)
    flat = np.fromiter(itertools.islice(itertools.chain.from_iterable(ids), spread * n_rows * body or None), dtype)
    rows = flat[: len(flat) // body * body].reshape(-1, body)
    if n_rows:
        rows = rows[:: max(1, len(rows) // n_rows)][:n_rows]
    return rows if bos is None else np.insert(rows, 0, bos, axis=1)


@functools.cache
def rules() -> str:
    """A hash of the code that makes rows of text: rows that were made by other rules are made anew."""
    code = [inspect.getsource(globals()[name]) for name in RULES]
    return digest([code_hash(*code), SPLITS, FEW_DOCUMENTS, BAD_SHARE, CONTEXT, SUFFIXES])


def losses(lost) -> str:
    """What `tokens` says about the documents left out, "" if there are none."""
    about = lost["duplicate characters"] * lost["tokens"] // max(lost["characters"], 1)
    counts = {
        f"near-duplicates, about {about:,} tokens (deduplicate=False keeps them)": lost["duplicates"],
        "empty or null": lost["empty"],
        f"unreadable, the first in {lost['first']}": lost["bad"],
    }
    found = "; ".join(f"{n:,} {why}" for why, n in counts.items() if n)
    return f"left out of {lost['documents'] + lost['bad']:,} documents: {found}" if found else ""


def unread(path) -> str:
    """What `tokens` says about the files of a local directory that are not read, "" if there are none."""
    others = local_files(path)[1] if path else {}
    found = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
    return f"files and folders not read: {found}" if found else ""


def token_stream(texts, tokenizer, lost, batch=64):
    """Token ids of the documents, a list each, ended by the end-of-text token; their characters and tokens are counted."""
    texts = iter(texts)
    if tokenizer.is_fast:  # a copy, as the tokenizer may be set to pad or truncate
        fast = copy.deepcopy(tokenizer.backend_tokenizer)
        fast.no_padding()
        fast.no_truncation()
        fast.encode_special_tokens = True  # a text that spells "<|endoftext|>" does not end there
    while group := list(itertools.islice(texts, batch)):
        if tokenizer.is_fast:  # 40% less work than tokenizer(group), which also locates every token in the text
            ids = [encoding.ids for encoding in fast.encode_batch_fast(group, add_special_tokens=False)]
        else:
            ids = tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
        lost["characters"] += sum(map(len, group))
        lost["tokens"] += sum(map(len, ids)) + len(ids)
        yield from ([*document, tokenizer.eos_token_id] for document in ids)


def tokenizer_hash(tokenizer) -> str:
    """What identifies a tokenizer: all that makes tokens of text, and the special tokens that `tokens` adds."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    state |= dict.fromkeys(["truncation", "padding", "post_processor", "decoder"])
    return digest([state, tokenizer.eos_token_id, tokenizer.bos_token_id])


def documents(dataset, split, text_field="text", config="", deduplicate=True, lost=None):
    """Yield the texts of one split, in a fixed order that mixes the sources (that of the hash of their names).

    lost: a Counter to which what is left out is added, with the first bad row under "first".
    """
    dataset = named(dataset)
    if dataset == BUILTIN:
        yield from (text for name, text in builtin_documents() if split_of(name) == split)
    elif (path := local_path(dataset)) is not None:
        found = distinct(read_local(path, text_field, lost), deduplicate, lost)
        texts = [text for _, text in sorted(found, key=lambda document: name_hash(document[0]))]
        if not texts:
            raise ValueError(f"dataset={dataset!r} holds no text: every document is empty (text_field={text_field!r})")
        if len(texts) >= FEW_DOCUMENTS:
            yield from part(texts, split)
        else:
            yield from filter(None, (part(text, split) for text in texts))
    else:
        found = distinct(readable(hub_rows(dataset, config), text_field, lost), deduplicate, lost)
        yield from (text for name, text in found if split_of(name) == split)


def corpus_hash(dataset, config="") -> str:
    """What identifies the text: a hash of the bytes for the built-in corpus and local files, name@revision for the hub, with
    the configuration if there is one."""
    dataset = named(dataset)
    path = None if dataset == BUILTIN else local_path(dataset)
    if not isinstance(config, str) or config and (path or dataset == BUILTIN):
        raise ValueError(
            f"config={config!r}: it has to be the name of a hub data set's configuration, '' for any other"
        )
    if dataset == BUILTIN:
        missing = left_out(MANIFEST, site_packages())
        return digest([file_hash(MANIFEST), missing]) if missing else file_hash(MANIFEST, length=16)
    if path is not None:
        return digest([(document_name(file, path), file_hash(file)) for file in local_files(path)[0]])
    return f"{dataset}:{config}" if config else dataset


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
    hint = similar(path)
    if kind_of(path)[0] in SUFFIXES or path.is_absolute() or dataset.startswith(".") or len(path.parts) != 2:
        raise FileNotFoundError(f"dataset={dataset!r}: no such file or directory{hint}. {ALLOWED}")
    if offline():
        raise FileNotFoundError(
            f"dataset={dataset!r} is no local path{hint}, and HF_HUB_OFFLINE forbids the hub. {ALLOWED}"
        )
    return None


ALLOWED = (
    f"Allowed: {BUILTIN!r}, a {', '.join(SUFFIXES)} file, also compressed (.txt.gz), a directory of them, or a hub name "
    "owner/name[@revision]."
)


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


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


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
                values = itertools.chain.from_iterable(
                    batch.column(0) for batch in table.iter_batches(columns=[column])
                )
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
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(
            f"{file} cannot be read as {kind}{compression} ({error}): it is damaged or of another kind, mend or remove it"
        ) from None


def skeleton(fields) -> dict:
    """The columns of an Arrow schema as a row of empty strings, with a dict for each struct."""
    from pyarrow.types import is_struct

    return {field.name: skeleton(field.type) if is_struct(field.type) else "" for field in fields}


def decoded(content: bytes) -> str:
    """UTF-8 text without its byte order mark; ValueError names the byte that is none."""
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
    value = row
    for key in [text_field] if isinstance(row, dict) and text_field in row else text_field.split("."):
        if value is None:
            return ""
        if not isinstance(value, dict) or key not in value:
            if not isinstance(row, dict):
                raise ValueError(f"the row is a {type(row).__name__}, not an object with columns")
            raise ValueError(
                f"no column {text_field!r}. The columns are {', '.join(columns_of(row)):.500}: choose one with text_field='...'"
            )
        value = value[key]
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        contents = [m["content"] or "" for m in value]  # a message that calls a tool may have none
        value = "\n".join(contents) if all(isinstance(content, str) for content in contents) else value
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

    hint = similar(Path(name))
    try:
        HfApi().dataset_info(name, revision=revision or None, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"dataset={name!r}: the hub gives no such data set{hint} ({reason:.200})") from None
    except Exception as error:  # of whatever library speaks HTTP
        raise FileNotFoundError(
            f"dataset={name!r} is no local path{hint}, and the hub is not reached ({error}). {ALLOWED}"
        ) from None


def name_hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def split_of(name: str) -> str:
    percent = int(name_hash(name), 16) % 100
    return next(split for split, (start, end) in SPLITS.items() if start <= percent < end)


def part(sequence, split: str):
    """The split's part of a sequence (of documents, or of characters): the three parts make up the whole."""
    start, end = (len(sequence) * percent // 100 for percent in SPLITS[split])
    return sequence[start:end]


def distinct(named, deduplicate=True, lost=None):
    """Leave out empty documents and, if asked to, near-duplicates of earlier ones: those with more than half of their text
    (their lines, by characters) in earlier ones. What is left out is added to the Counter `lost`."""
    seen, lost = set(), Counter() if lost is None else lost
    for name, text in named:
        lost["documents"] += 1
        whole_text = text.strip()
        if not whole_text:
            lost["empty"] += 1
            continue
        if deduplicate:
            lines = marks(whole_text)
            repeated = sum(length for length, mark in lines if mark in seen)
            if hash(whole_text) in seen or repeated > sum(length for length, _ in lines) / 2:
                lost["duplicates"] += 1
                lost["duplicate characters"] += len(text)
                continue
            seen.add(hash(whole_text))
            seen.update(mark for _, mark in lines if mark is not None)
        yield name, text


def marks(text: str) -> list[tuple[int, int | None]]:
    """(length, hash) of each line that is not empty; lines are compared by these hashes.

    Short lines such as `return x` stand in many documents that have nothing else in common. A line of fewer than 20
    characters is therefore hashed with the lines before it, until they have `CONTEXT`; None where the text begins too late.
    """
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    found = []
    for i, line in enumerate(lines):
        start, length = i, len(line) if len(line) < 20 else CONTEXT
        while length < CONTEXT and start:
            start -= 1
            length += len(lines[start])
        found.append((len(line), hash("\n".join(lines[start : i + 1])) if length >= CONTEXT else None))
    return found


def site_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def manifest_lines(manifest: Path) -> list[tuple[str, str]]:
    """(sha256, path) of every file of the built-in corpus."""
    return [tuple(line.split("  ")) for line in manifest.read_text().splitlines()]


@functools.cache
def left_out(manifest: Path, site: Path) -> list[str]:
    """Paths of the manifest that are missing from the site directory or differ there; looked up once."""
    differ = []
    for sha256, path in manifest_lines(manifest):
        try:
            content = (site / path).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != sha256:
            differ.append(path)
    return differ


def report_left_out() -> None:
    """Warn of the files of the built-in corpus that are left out."""
    if differ := left_out(MANIFEST, site_packages()):
        warnings.warn(
            f"{BUILTIN}: {len(differ)} files are missing or differ from the manifest and are left out (of "
            f"{sorted({path.split('/')[0] for path in differ})}): install the exact versions of requirements.txt for the "
            f"same corpus"
        )


def builtin_documents():
    """Yield (path, text) of the built-in corpus as its manifest lists it, without the files left out."""
    report_left_out()
    site = site_packages()
    missing = set(left_out(MANIFEST, site))
    for _, path in manifest_lines(MANIFEST):
        if path not in missing:
            yield path, (site / path).read_bytes().decode()


def shipped_rows(tokenizer_hash: str, n_ctx, n_tokens, split, bos, spread) -> Path:
    """Where these rows of the built-in corpus are if they ship with the repository; the name holds what determines them."""
    return ROWS / f"{split}-{n_tokens}-{digest([file_hash(MANIFEST), tokenizer_hash, n_ctx, bos, spread])}.npy"


def write_shipped_rows() -> None:
    """Make the token rows that ship with the repository anew from the installed packages (for maintainers)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / BUILTIN_MODEL)
    for file in ROWS.glob("*.npy"):
        file.unlink()
    ROWS.mkdir(exist_ok=True)
    for split, n_tokens, spread in SHIPPED:
        rows = tokens(BUILTIN, tokenizer, 256, n_tokens, split, spread=spread)
        shutil.copyfile(rows.filename, shipped_rows(tokenizer_hash(tokenizer), 256, n_tokens, split, False, spread))


def write_builtin_manifest() -> None:
    """Make the manifest anew from the installed packages (`python -c` tool for maintainers; changes every later result).

    The manifest there is was made when `distinct` weighed only lines of at least 20 characters.
    """
    site = site_packages()
    found = [file for package in PACKAGES for file in (site / package).rglob("*.py")]
    names = sorted((file.relative_to(site).as_posix() for file in found), key=name_hash)
    named = ((name, (site / name).read_bytes().decode()) for name in names if not NOT_SOURCE.search(name))
    kept = [(name, text) for name, text in named if is_prose_or_code(text)]
    hashes = [(hashlib.sha256(text.encode()).hexdigest(), name) for name, text in distinct(kept)]
    MANIFEST.write_text("".join(f"{sha256}  {name}\n" for sha256, name in hashes))


def is_prose_or_code(text: str) -> bool:
    """False for stubs, generated files, data tables, and text that is hardly ASCII."""
    dense = re.sub(r"\s", "", text)
    digits, ascii_ = sum(map(str.isdigit, dense)), sum(map(str.isascii, dense))
    long_lines = sum(len(line) for line in text.split("\n") if len(line) > 400)
    return (
        len(text) >= 300
        and not GENERATED.search(text[:1000])
        and digits < 0.2 * len(dense)
        and ascii_ > 0.95 * len(dense)
        and long_lines < 0.2 * len(text)
    )
