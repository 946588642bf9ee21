"""Text to tokens: the built-in corpus, local files, hub data sets; split, packed, memory-mapped.

The built-in corpus `"python-source"` is the source text of pinned packages that the requirements install anyway.
`assets/python-source.sha256` lists its files; a file that is missing or differs is left out and reported, so the corpus
is the same bytes wherever it is read.

A document goes to one split only: by the hash of its name, 90% train, 5% validation, 5% test (local documents, which may be
few: by the rank of that hash). A source of fewer than `FEW_DOCUMENTS` documents cannot be split that way; there each document
is cut in that order and proportion. Near-duplicates are dropped: a document is one if more than half of its text (in lines of
≥ 20 characters; the whole text if it has none) stands in documents before it.
"""

import copy
import functools
import hashlib
import itertools
import json
import re
import sysconfig
import warnings
from pathlib import Path

import numpy as np

from .files import ASSETS, array_writer, build_once, cache_dir, digest, file_hash, offline, open_array

BUILTIN = "python-source"
MANIFEST = ASSETS / "python-source.sha256"
PACKAGES = """torch transformers sympy pandas matplotlib numpy networkx transformer_lens huggingface_hub IPython datasets
    mpmath PIL tornado seaborn fsspec""".split()
SPLITS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}
FEW_DOCUMENTS = 20
SUFFIXES = (".txt", ".jsonl", ".parquet")
NOT_SOURCE = re.compile(
    r"(^|/)(tests?|testing|_testing|_?vendor(ed)?|externals|third_party|_generated)/"
    r"|(^|/)(test_[^/]*|[^/]*_test|conftest|_?version|__config__|_distributor_init|[^/]*_pb2)\.py$"
)
GENERATED = re.compile(r"auto-?(matically )?-?generated|do not edit|generated (by|from|file)", re.IGNORECASE)


def tokens(dataset, tokenizer, n_ctx, n_tokens=0, split="train", bos=False, text_field="text", spread=1) -> np.memmap:
    """Token rows of a data set, as a read-only memory map [rows, n_ctx] of uint16 (uint32 for a vocabulary over 65,536).

    dataset: `"python-source"`; a local .txt, .jsonl or .parquet file or a directory of them; otherwise a hub name, streamed.
    n_tokens: how many to take, 0 for all (a hub data set needs a number). Fewer are returned, with a warning, if there are fewer.
    split: "train", "validation" or "test". bos: start every row with the tokenizer's BOS token (not the default).
    spread: take rows at equal steps from up to `spread` times as much text, so that they come from as many more documents; what
    is streamed from a hub, whose documents are short and many, is taken as it comes.

    Documents are joined by the end-of-text token and cut into rows, which start anywhere; the last partial row is dropped.
    Raises ValueError for an unknown split, an empty data set or a bad file, FileNotFoundError for a local path that is not there.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    if n_ctx < 2:
        raise ValueError(f"n_ctx={n_ctx}: a row needs at least 2 tokens to have one to predict")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token), which joins documents: set tokenizer.eos_token"
        )
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos_token")
    body = n_ctx - bos
    n_rows = n_tokens // n_ctx
    if n_tokens < 0 or n_tokens and not n_rows:
        raise ValueError(f"n_tokens={n_tokens} is less than one row of n_ctx={n_ctx}")
    if spread < 1:
        raise ValueError(f"spread={spread} is not at least 1, which takes the rows as they come")
    if not n_tokens and dataset != BUILTIN and local_path(dataset) is None:
        raise ValueError(f"n_tokens=0: dataset={dataset!r} is streamed from the hub, so say how many tokens to take")
    spread = spread if n_tokens and (dataset == BUILTIN or local_path(dataset)) else 1
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    key = digest([corpus_hash(dataset), tokenizer_hash(tokenizer), n_ctx, n_tokens, split, bos, text_field, spread])

    def build(path):
        stream = itertools.chain.from_iterable(token_stream(dataset, tokenizer, split, text_field))
        flat = np.fromiter(itertools.islice(stream, spread * n_rows * body or None), dtype)
        rows = flat[: len(flat) // body * body].reshape(-1, body)
        if n_rows:
            rows = rows[:: max(1, len(rows) // n_rows)][:n_rows]
        if not len(rows):
            raise ValueError(f"dataset={dataset!r}, split={split!r} holds {len(flat)} tokens: not one row of {n_ctx}")
        if bos:
            rows = np.insert(rows, 0, tokenizer.bos_token_id, axis=1)
        with array_writer(path, rows.shape, dtype) as append:
            append(rows)

    path = build_once(cache_dir() / "tokens" / f"{key}.npy", build)
    rows = open_array(path)
    if rows.ndim != 2 or rows.shape[1] != n_ctx or rows.dtype != dtype:
        raise ValueError(f"{path} holds {rows.dtype}{list(rows.shape)}, not {dtype.__name__}[rows, {n_ctx}]: delete it")
    if len(rows) < n_rows:
        warnings.warn(
            f"dataset={dataset!r}, split={split!r} has {rows.size:,} tokens, fewer than n_tokens={n_tokens:,}"
        )
    return rows


def held_out(dataset, tokenizer, n_ctx: int, n_tokens: int, split: str = "test", spread: int = 16, **options):
    """Rows for evaluation, about n_tokens, spread over many documents: `tokens` of another split, without a warning if it is small."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer than n_tokens")
        return tokens(dataset, tokenizer, n_ctx, max(n_tokens, n_ctx), split, spread=spread, **options)


def token_stream(dataset, tokenizer, split, text_field="text", batch=64):
    """Token ids of the split's documents, a list each, ended by the end-of-text token."""
    texts = documents(dataset, split, text_field)
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
        yield from ([*document, tokenizer.eos_token_id] for document in ids)


def tokenizer_hash(tokenizer) -> str:
    """What identifies a tokenizer: all that makes tokens of text, and the special tokens that `tokens` adds."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    state |= dict.fromkeys(["truncation", "padding", "post_processor", "decoder"])
    return digest([state, tokenizer.eos_token_id, tokenizer.bos_token_id])


def documents(dataset, split, text_field="text"):
    """Yield the texts of one split, in a fixed order that mixes the sources (that of the hash of their names)."""
    if dataset == BUILTIN:
        yield from (text for name, text in builtin_documents() if split_of(name) == split)
    elif (path := local_path(dataset)) is not None:
        named = sorted(distinct(read_local(path, text_field)), key=lambda document: name_hash(document[0]))
        if not named:
            raise ValueError(f"dataset={dataset!r} holds no text: it needs at least one non-empty document")
        texts = [text for _, text in named]
        if len(texts) >= FEW_DOCUMENTS:
            yield from part(texts, split)
        else:
            yield from filter(None, (part(text, split) for text in texts))
    else:
        from datasets import load_dataset

        name, _, revision = dataset.partition("@")
        stream = load_dataset(name, split="train", streaming=True, revision=revision or None)
        if text_field not in (columns := sorted(next(iter(stream), {}))):
            raise ValueError(f"dataset={dataset!r} has no column {text_field!r}: it has {columns}")
        named = ((f"{name}:{i}", row[text_field] or "") for i, row in enumerate(stream))
        yield from (text for name, text in distinct(named) if split_of(name) == split)


def corpus_hash(dataset) -> str:
    """What identifies the text: a hash of the bytes for the built-in corpus and local files, name@revision for the hub."""
    if dataset == BUILTIN:
        missing = left_out(MANIFEST, site_packages())
        return digest([file_hash(MANIFEST), missing]) if missing else file_hash(MANIFEST, length=16)
    if (path := local_path(dataset)) is not None:
        return digest([(document_name(file, path), file_hash(file)) for file in local_files(path)])
    return dataset


def local_path(dataset) -> Path | None:
    """The local path a data set name means, or None for a hub name (`owner/name`, or one bare word without a suffix)."""
    path = Path(dataset).expanduser()
    if dataset and path.exists():
        return path
    if path.suffix in SUFFIXES or path.is_absolute() or dataset.startswith(".") or not 1 <= len(path.parts) <= 2:
        raise FileNotFoundError(f"dataset={dataset!r}: no such file or directory. {ALLOWED}")
    if offline():
        raise FileNotFoundError(f"dataset={dataset!r} is no local path, and HF_HUB_OFFLINE forbids the hub. {ALLOWED}")
    return None


ALLOWED = (
    f"Allowed: {BUILTIN!r}, a {', '.join(SUFFIXES)} file, a directory of them, or a hub name owner/name[@revision]."
)


def local_files(path) -> list[Path]:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files or files[0].suffix not in SUFFIXES:
        raise ValueError(f"dataset={str(path)!r}: no {', '.join(SUFFIXES)} file there. {ALLOWED}")
    return files


def document_name(file, path) -> str:
    return file.name if path.is_file() else file.relative_to(path).as_posix()


def read_local(path, text_field):
    """Yield (name, text): one document a .txt file, one a row of .jsonl and .parquet."""
    for file in local_files(path):
        name = document_name(file, path)
        try:
            if file.suffix == ".txt":
                yield name, file.read_text(encoding="utf-8")
                continue
            if file.suffix == ".jsonl":
                lines = file.read_text(encoding="utf-8").split("\n")  # splitlines() also cuts at characters JSON allows
                texts = [json.loads(line)[text_field] for line in lines if line.strip()]
            else:
                from pyarrow.parquet import read_table

                texts = read_table(file, columns=[text_field])[text_field].to_pylist()
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{text_field!r} is not a string in every row")
            yield from ((f"{name}:{i}", text) for i, text in enumerate(texts))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{file} cannot be read as {file.suffix} with text in {text_field!r}: {error!r}") from None


def name_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def split_of(name: str) -> str:
    percent = int(name_hash(name), 16) % 100
    return next(split for split, (start, end) in SPLITS.items() if start <= percent < end)


def part(sequence, split: str):
    """The split's part of a sequence (of documents, or of characters): the three parts make up the whole."""
    start, end = (len(sequence) * percent // 100 for percent in SPLITS[split])
    return sequence[start:end]


def distinct(named):
    """Drop empty documents and near-duplicates of earlier ones."""
    seen = set()
    for name, text in named:
        lines = [line for line in map(str.strip, text.split("\n")) if len(line) >= 20] or [text.strip()]
        repeated = sum(len(line) for line in lines if hash(line) in seen)
        if text.strip() and repeated <= sum(map(len, lines)) / 2:
            seen.update(map(hash, lines))
            yield name, text


def site_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def manifest_lines(manifest: Path) -> list[tuple[str, str]]:
    """(sha256, path) of every file of the built-in corpus."""
    return [tuple(line.split("  ")) for line in manifest.read_text().splitlines()]


@functools.cache
def left_out(manifest: Path, site: Path) -> list[str]:
    """Paths of the manifest that are missing from the site directory or differ there; looked up, and reported, once."""
    differ = []
    for sha256, path in manifest_lines(manifest):
        try:
            content = (site / path).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != sha256:
            differ.append(path)
    if differ:
        warnings.warn(
            f"{BUILTIN}: {len(differ)} files are missing or differ from the manifest and are left out (of "
            f"{sorted({path.split('/')[0] for path in differ})}): install the exact versions of requirements.txt for the "
            f"same corpus"
        )
    return differ


def builtin_documents():
    """Yield (path, text) of the built-in corpus as its manifest lists it, without the files left out."""
    site = site_packages()
    missing = set(left_out(MANIFEST, site))
    for _, path in manifest_lines(MANIFEST):
        if path not in missing:
            yield path, (site / path).read_bytes().decode()


def write_builtin_manifest() -> None:
    """Make the manifest anew from the installed packages (`python -c` tool for maintainers; changes every later result)."""
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
