"""Text to tokens: split, packed, memory-mapped.

A document goes to one split only: by the hash of its name, 90% train, 5% validation, 5% test (local documents, which may be
few: by the rank of that hash). A source of fewer than `FEW_DOCUMENTS` documents cannot be split that way; there each document
is cut in that order and proportion.

Text is not lost in silence. `tokens` warns of near-duplicates, of empty documents and nulls, of rows that cannot be read (more
than `BAD_SHARE` of them are refused), of files and folders that it does not read, and of text that the tokenizer drops or does
not know, also when its rows come from the cache.
"""

import copy
import hashlib
import itertools
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from ..code import source_hashes
from ..files import array_writer, build_once, cache_dir, digest, file_hash, open_array, replacing
from ..values import flag, one_of, whole
from .corpus import BUILTIN, builtin_documents, builtin_hash, report_left_out, shipped_rows
from .sources import find, hub_rows, local_files, read_local, readable

SPLITS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}
FEW_DOCUMENTS = 20
CONTEXT = 60
UNKNOWN_SHARE = 0.01  # of a text may be unknown to the tokenizer without a word


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
    Raises ValueError for a bad value, an empty data set or a bad file, FileNotFoundError for a data set that is not found.

    >>> tokens("python-source", lm.tokenizer, n_ctx=64, n_tokens=256).shape
    (4, 64)
    """
    source = find(dataset)
    one_of("split", split, SPLITS)
    n_ctx, n_tokens, spread = whole("n_ctx", n_ctx, 2), whole("n_tokens", n_tokens, 0), whole("spread", spread)
    bos, deduplicate = flag("bos", bos), flag("deduplicate", deduplicate)
    if not getattr(tokenizer, "is_fast", False):
        remedy = "pass lm.tokenizer, or transformers.AutoTokenizer.from_pretrained(name)"
        raise ValueError(f"tokenizer={tokenizer!r:.80} is not a fast tokenizer of transformers: {remedy}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, which joins documents: set tokenizer.eos_token")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos_token")
    if not isinstance(text_field, str) or not text_field:
        raise ValueError(f"text_field={text_field!r}: it has to be the name of a column, such as 'text' or 'data.text'")
    n_rows = n_tokens // n_ctx
    if n_tokens and not n_rows:
        raise ValueError(f"n_tokens={n_tokens} is less than one row of n_ctx={n_ctx}")
    name, streamed = f"dataset={str(source)!r}", isinstance(source, str) and source != BUILTIN
    if streamed and not n_tokens:
        raise ValueError(f"n_tokens=0: {name} is streamed from the hub, so say how many tokens to take")
    spread = spread if n_tokens and not streamed else 1
    about = [tokenizer_hash(tokenizer), n_ctx, n_tokens, split, bos, spread]
    rules = [source_hashes()[f"activations/{module}.py"] for module in ("text", "sources", "corpus")]
    key = digest([corpus_hash(dataset, config), *about, text_field, deduplicate, rules])
    path = cache_dir() / "tokens" / f"{key}.npy"
    note, what = path.with_suffix(".lost"), f"{name}, split={split!r}"

    def build(new):
        lost = Counter()
        ids = token_stream(documents(dataset, split, text_field, config, deduplicate, lost), tokenizer, lost)
        dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
        rows = pack(ids, n_ctx, n_rows, spread, tokenizer.bos_token_id if bos else None, dtype)
        if lost["characters"] and lost["tokens"] == lost["silent"]:
            raise ValueError(f"{what}: the tokenizer makes no token of any document. Use that of a model of such text")
        said = losses(lost)
        if not len(rows):
            raise ValueError(f"{what} holds {lost['tokens']} tokens: not one row of {n_ctx}{said and '; '}{said}")
        if said:
            with replacing(note) as file:
                file.write_text(said, encoding="utf-8", errors="backslashreplace")
        with array_writer(new, rows.shape, dtype) as append:
            append(rows)

    if source == BUILTIN and (shipped := shipped_rows(*about)).is_file():
        path = shipped
    else:
        build_once(path, build)
        if source == BUILTIN:
            report_left_out()
    rows = open_array(path)
    said = [note.read_text(encoding="utf-8")] if note.exists() else []
    if isinstance(source, Path) and (others := local_files(source)[1]):
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
        said.append(f"files and folders not read: {kinds}")
    if said:
        warnings.warn(f"{name}: {'; '.join(said)}")
    if len(rows) < n_rows:
        warnings.warn(f"{what} has {rows.size:,} tokens, fewer than n_tokens={n_tokens:,}")
    return rows


def held_out(dataset, tokenizer, n_ctx: int, n_tokens: int, split: str = "test", spread: int = 16, **options):
    """Rows for evaluation, about n_tokens, spread over many documents: `tokens` of another split, without a warning if it is small.

    >>> held_out("python-source", lm.tokenizer, n_ctx=64, n_tokens=256).shape
    (4, 64)
    """
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


def losses(lost) -> str:
    """What `tokens` says about the text left out and unknown, "" if there is none."""
    about = lost["duplicate characters"] * lost["tokens"] // max(lost["characters"], 1)
    counts = {
        f"near-duplicates, about {about:,} tokens (tokens(..., deduplicate=False) keeps them)": lost["duplicates"],
        "empty or null": lost["empty"],
        f"unreadable, the first in {lost['first']}": lost["bad"],
    }
    found = "; ".join(f"{n:,} {why}" for why, n in counts.items() if n)
    said = [f"left out of {lost['documents'] + lost['bad']:,} documents: {found}"] if found else []
    if lost["silent"]:
        said.append(f"{lost['silent']:,} documents give no token: the tokenizer knows none of their characters")
    if (share := lost["dropped"] / max(lost["looked at"], 1)) > UNKNOWN_SHARE:
        said.append(f"the tokenizer drops {share:.0%} of the first documents' characters")
    if (share := lost["unknown"] / max(lost["tokens"], 1)) > UNKNOWN_SHARE:
        said.append(f"{share:.0%} of the tokens are the tokenizer's token for unknown text")
    return "; ".join(said)


def token_stream(texts, tokenizer, lost, batch=64):
    """Token ids of the documents, a list each, ended by the end-of-text token; what becomes of their text is counted."""
    texts = iter(texts)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    fast = copy.deepcopy(tokenizer.backend_tokenizer)  # a copy, as the tokenizer may be set to pad or truncate
    fast.no_padding()
    fast.no_truncation()
    fast.encode_special_tokens = True  # a text that spells "<|endoftext|>" does not end there
    while group := list(itertools.islice(texts, batch)):
        # 40% less work than encode_batch, which also locates every token in the text
        ids = [encoding.ids for encoding in fast.encode_batch_fast(group, add_special_tokens=False)]
        if not lost["characters"]:
            starts = [text[:10_000] for text in group]
            for text, encoding in zip(starts, fast.encode_batch(starts, add_special_tokens=False)):
                unseen = set(range(len(text))).difference(*(range(*place) for place in encoding.offsets))
                lost["dropped"] += sum(not text[i].isspace() for i in unseen)
                lost["looked at"] += len(text)
        lost["characters"] += sum(map(len, group))
        lost["tokens"] += sum(map(len, ids)) + len(ids)
        lost["silent"] += sum(not document and not text.isspace() for document, text in zip(ids, group))
        lost["unknown"] += sum(document.count(unknown) for document in ids)
        yield from ([*document, tokenizer.eos_token_id] for document in ids)


def tokenizer_hash(tokenizer) -> str:
    """What identifies a tokenizer: all that makes tokens of text, and the special tokens that `tokens` adds."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= dict.fromkeys(["truncation", "padding", "post_processor", "decoder"])
    return digest([state, tokenizer.eos_token_id, tokenizer.bos_token_id])


def documents(dataset, split, text_field="text", config="", deduplicate=True, lost=None):
    """Yield the texts of one split, in a fixed order that mixes the sources (that of the hash of their names).

    lost: a Counter to which what is left out is added, with the first bad row under "first".
    """
    source, lost = find(dataset), Counter() if lost is None else lost
    if source == BUILTIN:
        yield from (text for name, text in builtin_documents() if split_of(name) == split)
    elif isinstance(source, str):
        found = readable(hub_rows(source, config), text_field, lost)
        yield from (text for name, text in distinct(found, deduplicate, lost) if split_of(name) == split)
    else:
        found = distinct(read_local(source, text_field, lost), deduplicate, lost)
        texts = [text for _, text in sorted(found, key=lambda document: name_hash(document[0]))]
        if not texts:
            raise ValueError(f"dataset={str(source)!r} holds no text: documents are empty (text_field={text_field!r})")
        few = len(texts) < FEW_DOCUMENTS
        yield from filter(None, (part(text, split) for text in texts)) if few else part(texts, split)


def corpus_hash(dataset, config="") -> str:
    """What identifies the text: a hash of the bytes for the built-in corpus and local files, name@revision for the hub, with
    the configuration if there is one."""
    source = find(dataset)
    local = source == BUILTIN or isinstance(source, Path)
    if not isinstance(config, str) or config and local:
        allowed = "the name of a hub data set's configuration, '' for any other data set"
        raise ValueError(f"config={config!r} (dataset_config of a notebook): it has to be {allowed}")
    if source == BUILTIN:
        return builtin_hash()
    if local:
        return digest([(name, file_hash(file)) for name, file in local_files(source)[0].items()])
    return f"{source}:{config}" if config else source


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
        bare = text.strip()
        lines = marks(bare) if deduplicate else []
        repeated = sum(length for length, mark in lines if mark in seen)
        if not bare:
            lost["empty"] += 1
        elif deduplicate and (hash(bare) in seen or repeated > sum(length for length, _ in lines) / 2):
            lost["duplicates"] += 1
            lost["duplicate characters"] += len(text)
        else:
            seen.update([hash(bare)], (mark for _, mark in lines if mark is not None))
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
