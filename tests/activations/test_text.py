import bz2
import gzip
import hashlib
import http.server
import json
import os
import re
import runpy
import sysconfig
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import exit_code, kill_me, killed, start_child, word_tokenizer
from tokenizers.normalizers import Replace

from sae_utils import files, held_out, tokens
from sae_utils.activations import corpus, sources
from sae_utils.activations import text as text_module
from sae_utils.activations.corpus import BUILTIN, MANIFEST, builtin_documents, left_out
from sae_utils.activations.text import corpus_hash, distinct, documents, split_of
from sae_utils.code import source_hashes
from sae_utils.lab.parameters import notebooks_dir, parameters_of

LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(LETTERS)


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def by_name_hash(names):
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def cached_arrays(cache):
    return sorted(cache.rglob("*.npy"))


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def test_packing_by_hand(words, tmp_path):
    """Train is the first 90% of the characters: a ... i, then end of text; what does not fill a row is dropped."""
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h i j")
    rows = tokens(str(path), words, 4)
    assert rows.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert tokens(str(path), words, 5).tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert rows.dtype == np.uint16 and isinstance(rows, np.memmap) and not rows.flags.writeable


def test_documents_are_joined_by_end_of_text_and_rows_start_anywhere(words, tmp_path):
    texts = [f"{letter} " * (3 + i) for i, letter in enumerate(LETTERS[:24])]
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    order = by_name_hash([f"texts.jsonl:{i}" for i in range(24)])[: 24 * 90 // 100]
    flat = []
    for name in order:
        i = int(name.split(":")[1])
        flat += [1 + i] * (3 + i) + [0]
    n_rows = len(flat) // 7
    rows = tokens(path, words, 7)
    assert rows.flatten().tolist() == flat[: n_rows * 7]
    assert len(set(rows[:, 0].tolist())) > 3 and 0 in rows[:, 1:-1]


def test_bos_starts_every_row_and_takes_a_place(tmp_path):
    tokenizer = word_tokenizer([*LETTERS, "<bos>"], bos_token="<bos>")
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h i j")
    assert tokens(str(path), tokenizer, 4, bos=True).tolist() == [[27, 1, 2, 3], [27, 4, 5, 6], [27, 7, 8, 9]]
    assert tokens(str(path), tokenizer, 4, n_tokens=8, bos=True).tolist() == [[27, 1, 2, 3], [27, 4, 5, 6]]
    assert tokens(str(path), tokenizer, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]  # not the same cache


def test_rows_are_spread_over_more_text(words, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(LETTERS))  # six rows and a half
    letters = [[4 * i + j for j in range(1, 5)] for i in range(6)]
    assert tokens(str(tmp_path / "a.txt"), words, 4, 8).tolist() == letters[:2]
    assert tokens(str(tmp_path / "a.txt"), words, 4, 8, spread=2).tolist() == letters[:4:2]
    assert tokens(str(tmp_path / "a.txt"), words, 4, 8, spread=16).tolist() == letters[::3]  # there is no more
    assert tokens(str(tmp_path / "a.txt"), words, 4, 20, spread=16).tolist() == letters[:5]
    with pytest.raises(ValueError, match="spread=0"):
        tokens(str(tmp_path / "a.txt"), words, 4, 8, spread=0)


def test_held_out_rows_are_spread(words, tmp_path):
    path = str(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("a b c d " * 100)
    everything = tokens(path, words, 4, split="test")
    rows = held_out(path, words, 4, 8, spread=3)
    assert rows.tolist() == everything[[0, 2]].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asking for 16 times as much is not the reader's mistake
        assert len(held_out(path, words, 4, 8)) == 2
        assert len(held_out(path, words, 4, 4_000)) == len(everything)


def test_n_tokens_takes_whole_rows_and_warns_of_fewer(words, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h i j")
    assert tokens(str(path), words, 4, n_tokens=4).tolist() == [[1, 2, 3, 4]]
    assert tokens(str(path), words, 4, n_tokens=7).tolist() == [[1, 2, 3, 4]]
    for _ in range(2):  # from the cache too
        with pytest.warns(UserWarning, match="has 8 tokens, fewer than n_tokens=400"):
            assert tokens(str(path), words, 4, n_tokens=400).shape == (2, 4)


def test_only_as_many_documents_are_read_as_needed(words, tmp_path, monkeypatch):
    read = []
    endless = (read.append(i) or "a b c" for i in range(10**9))
    monkeypatch.setattr(text_module, "documents", lambda *_: endless)
    path = tmp_path / "text.txt"
    path.write_text("a")
    assert tokens(str(path), words, 4, n_tokens=100).shape == (25, 4)
    assert len(read) < 200


def test_uint32_where_token_ids_exceed_uint16(tmp_path):
    tokenizer = word_tokenizer([f"w{i}" for i in range(70_000)])
    path = tmp_path / "text.txt"
    path.write_text("w65535 w69999 w0 w65534 " * 4)
    rows = tokens(str(path), tokenizer, 4)
    assert rows.dtype == np.uint32 and rows[0].tolist() == [65536, 70000, 1, 65535]
    assert tokens(str(path), word_tokenizer([f"w{i}" for i in range(65_535)]), 4).dtype == np.uint16


def test_a_byte_level_tokenizer_round_trips(tokenizer, tmp_path):
    text = "def f(x):\n    return 'café, 日本'\n" * 20
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    rows = tokens(str(path), tokenizer, 8)
    packed = tokenizer.decode(rows.flatten().tolist()).removesuffix("<|endoftext|>").rstrip("�")
    assert len(packed) > 500 and text.startswith(packed)


def test_a_tokenizer_set_to_pad_or_truncate_packs_the_same(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [f"word{i} " * (i + 1) for i in range(12)])
    before = np.array(tokens(path, tokenizer, 8))
    texts = ["one", "one two three four five six seven eight nine ten"]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(texts, padding=True, truncation=True, max_length=4)
    for array in cached_arrays(files.cache_dir()):
        array.unlink()
    assert np.array_equal(tokens(path, tokenizer, 8), before)
    tokenizer.pad_token = None


# ---------------------------------------------------------------------------------------------------------------------
# Splits and duplicates
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 21, 40, 300])
def test_twenty_or_more_documents_are_split_whole(n, tmp_path):
    texts = [f"document {i} has a line of its own" for i in range(n)]
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    parts = [list(documents(path, split)) for split in SPLITS]
    assert sorted(sum(parts, [])) == sorted(texts)
    assert [len(part) for part in parts] == pytest.approx([0.9 * n, 0.05 * n, 0.05 * n], abs=1)
    assert all(parts)
    assert parts[0] != sorted(parts[0], key=texts.index)  # mixed


def test_few_documents_are_cut(tmp_path):
    texts = [f"{i}" * 10 + "".join(chr(65 + (i + j) % 26) for j in range(90)) for i in range(3)]
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    parts = [list(documents(path, split)) for split in SPLITS]
    assert [[len(text) for text in part] for part in parts] == [[90] * 3, [5] * 3, [5] * 3]
    assert sorted(map("".join, zip(*parts, strict=True))) == sorted(texts)


def test_nineteen_short_documents_give_no_empty_ones(words, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [letter for letter in LETTERS[:19]])
    assert [list(documents(path, split)) for split in SPLITS[:2]] == [[], []]
    assert len(list(documents(path, "test"))) == 19
    with pytest.raises(ValueError, match="split='train' holds 0 tokens: not one row"):
        tokens(path, words, 4)


def test_near_duplicates_are_dropped():
    line = "this line is long enough to count: {:02}".format
    first = "\n".join(map(line, range(10)))
    named = [
        ("a", first),
        ("b", "\n".join(map(line, range(4, 14)))),  # 6 of 10 lines are known
        ("c", "\n".join(map(line, range(5, 15)))),  # 5 of 10
        ("d", "ok"),
        ("e", " ok\n"),
        ("f", ""),
        ("g", " \n\t"),
        ("h", f"short\n{line(3)}"),
    ]
    assert [name for name, _ in distinct(named)] == ["a", "c", "d"]


RNG = np.random.default_rng(0)
SHARED = "One long header line that all documents have in common."


@pytest.mark.parametrize(
    "texts",
    [
        [f"{SHARED}\n" + "\n".join(f"a {i} b {j}" for j in range(20)) for i in range(30)],
        ["\n".join(RNG.choice(LETTERS[:12], 20)) for _ in range(300)],
        ["\n".join(RNG.choice(["return x", "else:", "pass", "x += 1"], 20)) for _ in range(30)],
        [f"{SHARED}\n{'other words ' * 5}{i}" for i in range(30)],
    ],
    ids=["one long line in common", "short lines in another order", "short lines of code", "half in common"],
)
def test_documents_that_are_mostly_different_are_kept(texts, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    assert sorted(text for split in SPLITS for text in documents(path, split)) == sorted(texts)


def test_what_is_left_out_is_said_each_time(words, tmp_path):
    """Also of rows from the cache. 60 documents of 30 tokens, 40 of them copies: 1,200 tokens and as many ends."""
    texts = [" ".join(LETTERS[(i + j) % 26] for j in range(30)) for i in range(20)]
    path = write_jsonl(tmp_path / "texts.jsonl", texts * 3 + ["", None])
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            rows = tokens(path, words, 6)
        (message,) = {str(warning.message) for warning in caught}
        assert "left out of 62 documents" in message and "40 near-duplicates, about 1,240 tokens" in message
        assert "2 empty or null" in message and path in message and "deduplicate=False" in message
    with pytest.warns(UserWarning) as caught:
        copies = tokens(path, words, 6, deduplicate=False)
    assert "near-duplicates" not in str(caught[0].message) and rows.size < copies.size == 54 * 31


def test_no_text_is_in_two_splits(tmp_path):
    """Every document stands three times in the source; once is kept."""
    texts = [f"a short one {i}" for i in range(30)] + [f"a line of more than twenty characters {i}" for i in range(30)]
    path = write_jsonl(tmp_path / "texts.jsonl", texts * 3)
    parts = [list(documents(path, split)) for split in SPLITS]
    assert sorted(sum(parts, [])) == sorted(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


def test_the_same_texts_from_every_format(words, tmp_path):
    texts = ["a b c", "d e\nf", "g"]
    pq.write_table(pa.table({"n": [1, 2, 3], "text": texts}), tmp_path / "x.parquet")
    write_jsonl(tmp_path / "x.jsonl", texts)
    for name in ("x.parquet", "x.jsonl"):
        assert list(sources.read_local(tmp_path / name, "text")) == [
            (f"{name}:{i}", text) for i, text in enumerate(texts)
        ]
    pq.write_table(pa.table({"text": ["a b c d e f g h i j"]}), tmp_path / "y.parquet")
    assert tokens(str(tmp_path / "y.parquet"), words, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_directory_mixes_formats_and_names_by_relative_path(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "a.txt").write_text("one\r\ntwo")
    (tmp_path / "d" / "sub" / "a.txt").write_text("three")
    (tmp_path / "d" / "folder.txt").mkdir()
    (tmp_path / "d" / "notes.md").write_text("no")
    write_jsonl(tmp_path / "d" / "b.jsonl", ["four", "five"], field="body")
    (tmp_path / "d" / "b.jsonl").open("a").write("\n\n")
    found = dict(sources.read_local(tmp_path / "d", "body"))
    assert found == {"a.txt": "one\ntwo", "sub/a.txt": "three", "b.jsonl:0": "four", "b.jsonl:1": "five"}


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}
PACK[".zst"] = lambda content: pa.Codec("zstd").compress(content, asbytes=True)


def test_a_directory_says_what_it_does_not_read(words, tmp_path):
    """Suffixes count in any case, compressed text is read, and a link that leads back ends nowhere."""
    folder = tmp_path / "d"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "a.txt").write_text("hidden")
    for i, (suffix, pack) in enumerate(PACK.items()):
        (folder / f"{i}.TXT{suffix.upper()}").write_bytes(pack(f"a b {LETTERS[i]}".encode()))
        (folder / f"{i}.jsonl{suffix}").write_bytes(pack(f'{{"text": "c d {LETTERS[i]}"}}\n'.encode()))
    for name in ("notes.md", "more.MD", "table.csv.gz", "a.txt.xz", "plain", ".hidden.txt"):
        (folder / name).write_text("no")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    found = dict(sources.read_local(folder, "text"))
    assert sorted(found.values()) == sorted(f"{start} {letter}" for letter in LETTERS[:4] for start in ("a b", "c d"))
    for _ in range(2):
        with pytest.warns(
            UserWarning, match="not read: 1 .gz, 2 .md, 1 .txt, 1 .xz, 2 hidden, 1 linked folder, 1 without a suffix"
        ):
            tokens(folder, words, 4, deduplicate=False)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_a_damaged_compressed_file_is_refused_by_path(suffix, words, tmp_path):
    content = PACK[suffix](json.dumps({"text": " ".join(map(str, range(2000)))}).encode())
    for damaged in (content[: len(content) // 2], b"no archive"):
        (tmp_path / f"x.jsonl{suffix}").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"x.jsonl{suffix} cannot be read as .jsonl{suffix} "):
            tokens(tmp_path / f"x.jsonl{suffix}", words, 4)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_every_stream_of_a_compressed_file_is_read_or_refused(suffix, tmp_path):
    text = "".join(f"line {i}\n" for i in range(20_000))
    first, second = (PACK[suffix](part.encode()) for part in (text[:700], text[700:]))
    file = tmp_path / f"x.txt{suffix}"
    file.write_bytes(first + second)
    assert dict(sources.read_local(file, "text")) == {file.name: text}
    for damaged in (bytes([second[0] ^ 1]) + second[1:], second[:-9], b"more", bytes(4) + second):
        file.write_bytes(first + damaged)
        with pytest.raises(ValueError, match=f"{file.name} cannot be read as .txt{suffix} "):
            list(sources.read_local(file, "text"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_text_with_zero_bytes_is_refused(encoding, words, tmp_path):
    zero = "a".encode(encoding).index(0)
    (tmp_path / "a.txt").write_text("a b c d e f g h", encoding=encoding)
    with pytest.raises(ValueError, match=f"a.txt: byte {zero} is 0, as in UTF-16 or a file cut short"):
        tokens(tmp_path / "a.txt", words, 4)
    (tmp_path / "a.txt").write_bytes(b"a b c d e f g h" + bytes(5000))
    with pytest.raises(ValueError, match="a.txt: byte 15 is 0"):
        tokens(tmp_path / "a.txt", words, 4)


def test_columns_of_one_name(tmp_path):
    """Two of them are refused; a column "a.b" is told from the field b of a column "a"."""
    column = pa.array(TEXTS)
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet cannot be read as .parquet .*exists 2 times"):
        all_texts(str(tmp_path / "x.parquet"))
    pq.write_table(pa.table({"a": [{"b": "no"}] * 40, "a.b": TEXTS}), tmp_path / "y.parquet")
    assert sorted(all_texts(str(tmp_path / "y.parquet"), text_field="a.b")[0]) == sorted(TEXTS)


def test_a_file_whose_name_is_not_utf8_is_read_and_named(words, tmp_path):
    lines = [json.dumps({"text": f"{text} a"}) for text in TEXTS] + ["{"]
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text("\n".join(lines))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"the first in .*/caf.*jsonl, line 41"):
            assert tokens(str(tmp_path), words, 4).size


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('\n{"text": "two"}', encoding="utf-8-sig")
    assert [text for _, text in sources.read_local(tmp_path, "text")] == ["one", "two"]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    """JSON allows U+2028 and U+0085 inside a string; str.splitlines would cut there."""
    text = "one\u2028two\u0085three"
    path = Path(write_jsonl(tmp_path / "x.jsonl", [text, "four"]))
    content = path.read_bytes()
    for newline in (b"\n", b"\r\n"):
        path.write_bytes(content.replace(b"\n", newline))
        assert [t for _, t in sources.read_local(path, "text")] == [text, "four"]
    path.write_bytes(content.replace(b"\n", b"\r"))
    with pytest.raises(ValueError, match="x.jsonl, line 1: Extra data"):
        list(sources.read_local(path, "text"))


def test_text_field(words, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a b c d e f", "body": "g h i j k l"}\n')
    assert tokens(str(tmp_path / "x.jsonl"), words, 4, text_field="body").tolist() == [[7, 8, 9, 10]]
    assert tokens(str(tmp_path / "x.jsonl"), words, 4).tolist() == [[1, 2, 3, 4]]


# ---------------------------------------------------------------------------------------------------------------------
# Rows and columns, of local files and from the hub
# ---------------------------------------------------------------------------------------------------------------------

LOAD_DATASET = datasets.load_dataset
TEXTS = [f"Sentence {i} has {7 * i} words of its own" for i in range(40)]


@pytest.fixture(params=["jsonl", "parquet", "hub"])
def rows_source(request, tmp_path, monkeypatch):
    """A function that stores rows in one of the three ways and returns the name of the data set."""

    def store(rows, name="x"):
        if request.param == "parquet":
            path = tmp_path / f"{name}.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if request.param == "hub":
            as_hub(monkeypatch, {f"owner/{name}": {"data_files": str(path)}})
        return f"owner/{name}" if request.param == "hub" else str(path)

    return store


def as_hub(monkeypatch, sets):
    """Let `owner/name` mean local files, read by the real `datasets`."""

    def load(name, config=None, **options):
        return LOAD_DATASET(**({"path": "json", "name": config} | sets[name]), streaming=options["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "find_on_hub", lambda *_: None)
    monkeypatch.setattr(sources, "offline", lambda: False)


def all_texts(dataset, **options):
    texts = []
    for split in SPLITS:
        lost = Counter(first="")
        texts += documents(dataset, split, **options, lost=lost)
    return texts, lost


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut of', "line 18: Unterminated string starting at: line 1 column 10"),
        (
            b'{"meta": 1}',
            "line 18: no column 'text'. The columns are meta: choose one, or a field of one, with text_field=",
        ),
        (b'{"text": 3}', "line 18: column 'text' holds int, not text"),
        (b'["text"]', "line 18: the row is a list"),
        (b'{"text": "\\ud83d half"}', "line 18: .* position 0: surrogates not allowed"),
        (b'{"text": "caf\xe9"}', "line 18: 'utf-8' codec can't decode byte 0xe9 in position 13"),
        (b"[" * 100_000, "line 18: "),
    ],
)
def test_a_bad_row_is_left_out_and_named_many_are_refused(line, reason, words, tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"{text} a"}).encode() for text in TEXTS]
    for content, pattern in ((lines[:17] + [line] + lines[18:], "1 unreadable, the first in "), ([line] * 40, "")):
        path.write_bytes(b"\n".join(content))
        if pattern:
            with pytest.warns(UserWarning, match=f"left out of 40 documents: {pattern}{path}, {reason}"):
                assert tokens(path, words, 4).size
        else:
            with pytest.raises(ValueError, match=f"{path}, {reason.replace('18', '1')}.*40 of 40 rows"):
                tokens(path, words, 4)


def test_rows_that_are_no_text(rows_source):
    """A null is an empty document. A column of numbers is refused with its name."""
    texts, lost = all_texts(rows_source([{"text": text} for text in [*TEXTS, None]]))
    assert sorted(texts) == sorted(TEXTS) and lost["empty"] == 1
    dataset = rows_source([{"text": 1}, {"text": 2}], "numbers")
    with pytest.raises(ValueError, match=f"{dataset}, (line|row) 1: column 'text' holds int, not text"):
        all_texts(dataset)


def test_invalid_text_in_a_parquet_column(tmp_path):
    texts = pa.array([text.encode() for text in TEXTS] + [b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet cannot be read as .parquet .* can't decode byte 0xe9"):
        all_texts(str(tmp_path / "x.parquet"))


def test_columns(rows_source):
    """A nested field by its dots, chat messages by their contents; a missing column lists those there are."""
    role = {"role": "user"}
    rows = [
        {"data": {"body": t, "id": 1}, "a.b": t, "turns": [role | {"content": t}, role | {"content": "ok"}]}
        for t in TEXTS
    ]
    dataset = rows_source(rows)
    assert sorted(all_texts(dataset, text_field="data.body")[0]) == sorted(TEXTS)
    assert sorted(all_texts(dataset, text_field="a.b")[0]) == sorted(TEXTS)
    assert sorted(all_texts(dataset, text_field="turns")[0]) == sorted(f"{text}\nok" for text in TEXTS)
    for field in ("text", "data.text", "data.body.text"):
        columns = "columns are (data|data, a.b, turns): choose one, or a field of one, with text_field="
        with pytest.raises(ValueError, match=f"{dataset}.* no column '{field}'. The {columns}"):
            all_texts(dataset, text_field=field)
    with pytest.raises(ValueError, match="'data' holds dict, not text"):
        all_texts(dataset, text_field="data")
    with pytest.raises(ValueError, match="'turns' holds list, not text .each message of a list needs role and content"):
        all_texts(rows_source([{"turns": [text]} for text in TEXTS], "lists"), text_field="turns")


def test_messages_of_parts(rows_source):
    """Text parts are read, others have none; a content of another kind is named."""
    rows = [{"turns": [{"role": "user", "content": [{"type": "text", "text": t}, {"type": "image"}]}]} for t in TEXTS]
    assert sorted(all_texts(rows_source(rows), text_field="turns")[0]) == sorted(TEXTS)
    rows = [{"turns": [{"role": "user", "content": 3}]}] * 40
    with pytest.raises(ValueError, match="a message's content is 3: it has to be text, or a list of parts with 'text'"):
        all_texts(rows_source(rows, "numbers"), text_field="turns")


def test_configurations_and_splits_of_the_hub(words, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    for name in ("one", "two"):
        write_jsonl(tmp_path / "set" / f"{name}.jsonl", [f"{name} {text} a" for text in TEXTS])
    card = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    files = {split: str(tmp_path / "set" / "one.jsonl") for split in ("dev", "test")}
    as_hub(
        monkeypatch,
        {
            "owner/set": {"path": str(tmp_path / "set")},
            "owner/dev": {"data_files": {"dev": files["dev"]}},
            "owner/splits": {"data_files": files},
        },
    )
    assert all(text.startswith("two") for text in all_texts("owner/set", config="two")[0])
    names = {tokens("owner/set", words, 4, 40, config=config).filename for config in ("one", "two")}
    assert len(names) == 2 and corpus_hash("owner/set", "one") != corpus_hash("owner/set", "two") != corpus_hash(
        "owner/set"
    )
    for config in ("", "three"):
        with pytest.raises(ValueError, match=f"owner/set', config='{config}' cannot be read.*one.*two"):
            all_texts("owner/set", config=config)
    assert len(all_texts("owner/dev")[0]) == 40
    with pytest.raises(ValueError, match="owner/splits'.*it has no split 'train' but several others: dev, test"):
        all_texts("owner/splits")
    with pytest.raises(ValueError, match="config='one'"):
        tokens(tmp_path / "set" / "one.jsonl", words, 4, config="one")


@pytest.mark.parametrize("answer", ["404", "silence", "refused"])
def test_the_hub_is_asked_for_seconds_only(answer, monkeypatch):
    """By a server that does not have the data set, one that never answers, and none at all."""
    from huggingface_hub import constants

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if answer == "silence":
                return time.sleep(3)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        log_message = print

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = 1 if answer == "refused" else server.server_port
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sources, "offline", lambda: False)
        monkeypatch.setattr(sources, "HUB_SECONDS", 0.3)
        start = time.monotonic()
        reason = "the hub gives no such data set" if answer == "404" else "the hub is not reached"
        with pytest.raises(FileNotFoundError, match=f"dataset='owner/nothing'.*{reason}"):
            all_texts("owner/nothing")
        assert time.monotonic() - start < 3
        server.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h i j " * 20)  # 180 tokens of train: 45 rows of 4
    return str(path)


def test_the_second_call_does_not_tokenise(words, text, monkeypatch):
    rows = tokens(text, words, 4)
    monkeypatch.setattr(text_module, "token_stream", lambda *_: pytest.fail("tokenised again"))
    again = tokens(text, words, 4)
    assert again.filename == rows.filename and np.array_equal(rows, again)


def test_what_changes_the_rows_changes_the_cache(text):
    names = set()

    def add(tokenizer=None, n_ctx=181, **kwargs):  # 181 tokens, the last of them <eos>
        rows = tokens(text, tokenizer or word_tokenizer(LETTERS), n_ctx, **kwargs)
        names.add(rows.filename)
        return rows

    add()
    add()
    assert len(names) == 1
    add(n_ctx=180)
    add(n_tokens=181)
    add(n_ctx=11)
    add(split="test", n_ctx=11)
    add(text_field="body")
    add(tokenizer=word_tokenizer(LETTERS[::-1]))
    changed = word_tokenizer(LETTERS)
    changed.eos_token = "z"  # same vocabulary, other rows
    assert 26 in add(tokenizer=changed) and len(names) == 8
    lower = word_tokenizer(LETTERS)
    lower.backend_tokenizer.normalizer = Replace("a", "z")
    assert 26 in add(tokenizer=lower) and len(names) == 9
    Path(text).write_text("z y x w v u t s r q " * 20)
    assert add()[0, :3].tolist() == [26, 25, 24] and len(names) == 10


def test_rows_of_other_rules_are_made_anew(words, text, monkeypatch):
    """Rows come from three modules, and from nothing else of the package that could change them."""
    before = tokens(text, words, 4).filename
    for module in ("text", "sources", "corpus"):
        changed = source_hashes() | {f"activations/{module}.py": "other code"}
        monkeypatch.setattr(text_module, "source_hashes", lambda changed=changed: changed)
        assert tokens(text, words, 4).filename != before
    monkeypatch.setattr(text_module, "source_hashes", lambda: source_hashes() | {"training/loop.py": "other code"})
    assert tokens(text, words, 4).filename == before


def test_a_file_moved_within_a_directory_is_another_corpus(tmp_path):
    """Its name decides its split."""
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "a.txt").write_text("one")
    before = corpus_hash(str(tmp_path / "d"))
    (tmp_path / "d" / "a.txt").rename(tmp_path / "d" / "sub" / "a.txt")
    assert corpus_hash(str(tmp_path / "d")) != before


def test_a_tokenizer_loaded_with_a_model_finds_the_cache(tiny_gpt2, tokenizer, text):
    """TransformerLens makes it add BOS to single texts, which packing does not use."""
    assert tiny_gpt2.tokenizer("a")["input_ids"] != tokenizer("a")["input_ids"]
    assert tokens(text, tiny_gpt2.tokenizer, 8).filename == tokens(text, tokenizer, 8).filename


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text", "shape", "dtype", "pickle", "zip"])
def test_a_damaged_or_foreign_cache_file_is_refused_by_path(damage, words, text, own_cache):
    tokens(text, words, 4)
    (path,) = cached_arrays(own_cache)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-2])
    elif damage == "header":
        path.write_bytes(content[:40])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not an array" * 100)
    elif damage == "shape":
        np.save(path, np.zeros((5, 5), np.uint16))
    elif damage == "dtype":
        np.save(path, np.zeros((5, 4), np.int64))
    elif damage == "pickle":
        np.save(path, np.array([[print]], dtype=object), allow_pickle=True)
    elif damage == "zip":
        np.savez(path.with_suffix(".npz"), rows=np.zeros((5, 4), np.uint16))
        path.with_suffix(".npz").replace(path)
    with pytest.raises(ValueError) as error:
        tokens(text, words, 4)
    assert str(path) in str(error.value) and "delete it" in str(error.value)
    path.unlink()
    assert tokens(text, words, 4).shape == (45, 4)


def test_a_failed_build_leaves_nothing(text, words, own_cache, monkeypatch):
    def broken(*_):
        yield [1, 2, 3]
        raise RuntimeError("the disk is on fire")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on fire"):
        patch.setattr(text_module, "token_stream", broken)
        tokens(text, words, 4)
    assert [p.suffix for p in own_cache.rglob("*") if p.is_file()] == [".lock"]
    assert tokens(text, words, 4).shape == (45, 4)


def test_two_processes_build_one_cache_once(words, text, tmp_path):
    real, log = text_module.token_stream, tmp_path / "log"

    def slow(*args):
        with open(log, "a") as f:
            f.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        yield from real(*args)

    def work(out):
        text_module.token_stream = slow  # in the child only
        np.save(out, tokens(text, words, 4))

    outs = [tmp_path / f"{i}.npy" for i in range(2)]
    children = [start_child(work, out) for out in outs]
    assert [exit_code(child) for child in children] == [0, 0]
    assert len(log.read_text().splitlines()) == 1
    assert np.array_equal(*map(np.load, outs)) and len(np.load(outs[0])) == 45


@pytest.mark.parametrize("moment", ["half written", "before the rename"])
def test_a_kill_while_building_leaves_nothing_that_loads(moment, words, text, own_cache):
    def work():
        if moment == "half written":

            def half(path, *_):
                path.write_bytes(b"half an array")
                kill_me()

            text_module.array_writer = half
        else:
            files.os.replace = kill_me
        tokens(text, words, 4)

    assert killed(work)
    assert not [path for path in (own_cache / "tokens").glob("*") if path.suffix == ".npy" and path.is_file()]
    left = [path for path in (own_cache / "tokens").iterdir() if path.is_dir()]
    assert len(left) == 1
    assert tokens(text, words, 4).shape == (45, 4)
    assert not left[0].exists()


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "valid"}, ValueError, "split='valid' .did you mean 'validation'.*allowed are 'train'"),
        ({"n_ctx": 1}, ValueError, "n_ctx=1"),
        ({"n_tokens": 3}, ValueError, "n_tokens=3 is less than one row of n_ctx=4"),
        ({"n_tokens": -8}, ValueError, "n_tokens=-8"),
        ({"n_ctx": 32.0}, ValueError, "n_ctx=32.0: it has to be a whole number"),
        ({"n_tokens": 1e4}, ValueError, "n_tokens=10000.0: it has to be a whole number"),
        ({"n_tokens": "8"}, ValueError, "n_tokens='8'"),
        ({"n_tokens": True}, ValueError, "n_tokens=True"),
        ({"spread": 1.5}, ValueError, "spread=1.5"),
        ({"bos": "false"}, ValueError, "bos='false': it has to be True or False"),
        ({"deduplicate": 1}, ValueError, "deduplicate=1"),
        ({"split": None}, ValueError, "split=None"),
        ({"text_field": None}, ValueError, "text_field=None"),
        ({"text_field": ["a"]}, ValueError, "text_field="),
        ({"config": "en"}, ValueError, r"config='en' \(dataset_config of a notebook\): "),
        ({"config": None}, ValueError, "config=None"),
        ({"tokenizer": None}, ValueError, "tokenizer=None is not a fast tokenizer of transformers: pass lm.tokenizer"),
        ({"tokenizer": "gpt2"}, ValueError, "tokenizer='gpt2' is not a fast tokenizer"),
        ({"dataset": None}, ValueError, "dataset=None: it has to be one name or path"),
        ({"dataset": ["a.txt"]}, ValueError, "dataset=.'a.txt'.: it has to be one name or path"),
        ({"dataset": b"a.txt"}, ValueError, "dataset=b'a.txt'"),
        ({"dataset": "a b " * 1000}, FileNotFoundError, "dataset='a b .{70,80}: no such file"),
        ({"dataset": "~nobody/a.txt"}, FileNotFoundError, "dataset='~nobody/a.txt'"),
        ({"dataset": "python_sorce"}, FileNotFoundError, "did you mean 'python-source'"),
        ({"bos": True}, ValueError, "no bos_token"),
        ({"dataset": "nowhere.txt"}, FileNotFoundError, "dataset='nowhere.txt': no such file.*Allowed"),
        ({"dataset": "/nowhere"}, FileNotFoundError, "dataset='/nowhere': no such file"),
        ({"dataset": "./nowhere"}, FileNotFoundError, "no such file"),
        ({"dataset": "a/b/c"}, FileNotFoundError, "no such file"),
        ({"dataset": ""}, FileNotFoundError, "dataset='': no such file"),
        ({"dataset": "Skylion007/openwebtext"}, FileNotFoundError, "HF_HUB_OFFLINE forbids the hub.*Allowed"),
        ({"dataset": "imdb"}, FileNotFoundError, "no such file.*a hub name owner/name"),
    ],
)
def test_bad_arguments(arguments, error, message, words, text, own_cache):
    with pytest.raises(error, match=message):
        tokens(**{"dataset": text, "tokenizer": words, "n_ctx": 4} | arguments)
    assert not cached_arrays(own_cache)


def test_a_name_near_a_local_one_is_answered_at_once(words, tmp_path, monkeypatch):
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "offline", lambda: False)
    monkeypatch.setattr(sources, "find_on_hub", lambda *_: pytest.fail("the hub was asked"))
    for wrong in ("texs", "texs.TXT", f"{tmp_path}/texs"):
        with pytest.raises(FileNotFoundError, match="no such file or directory .did you mean 'texts'"):
            corpus_hash(wrong)
    with pytest.raises(FileNotFoundError, match="no such file or directory. Allowed"):
        corpus_hash(f"{tmp_path}/other")


@pytest.mark.parametrize("value", ["0", "", "false", "no"])
def test_a_hub_name_needs_a_number_of_tokens(value, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(ValueError, match="n_tokens=0.*streamed"):
        tokens("Skylion007/openwebtext", words, 4)


def test_a_slow_tokenizer_is_refused(text, tmp_path):
    from transformers import CTRLTokenizer

    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "</s>": 1, "a@@": 2, "b": 3}')
    (tmp_path / "merges.txt").write_text("#version\na b\n")
    slow = CTRLTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt", eos_token="</s>")
    with pytest.raises(ValueError, match="tokenizer=CTRLTokenizer.* is not a fast tokenizer"):
        tokens(text, slow, 4)


def test_a_tokenizer_without_end_of_text_is_refused(text):
    tokenizer = word_tokenizer(LETTERS)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokens(text, tokenizer, 4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("x.jsonl", b'{"body": "a"}\n'),
        ("x.jsonl", b'{"text": null}\n'),
        ("x.jsonl", b'{"text": 3}\n'),
        ("x.jsonl", b'["text"]\n'),
        ("x.jsonl", b"3\n"),
        ("x.txt", b"caf\xe9"),
        ("x.jsonl", b'{"text": "caf\xe9"}\n'),
        ("x.parquet", b"PAR1 not really"),
        ("x.parquet", b""),
    ],
)
def test_an_unreadable_file_is_named(name, content, words, tmp_path, own_cache):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        tokens(str(tmp_path / name), words, 4)
    assert str(tmp_path / name) in str(error.value) and len(str(error.value)) < 400
    assert not cached_arrays(own_cache)


def test_nothing_to_read(words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("a b c d")
    for name in ("empty", "notes.md"):
        with pytest.raises(ValueError, match=f"{name}': no .txt, .jsonl, .parquet file there"):
            tokens(str(tmp_path / name), words, 4)
    for name, content in (("a.txt", ""), ("b.txt", " \n "), ("c.jsonl", ""), ("d.jsonl", '{"text": ""}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="holds no text"):
            tokens(str(tmp_path / name), words, 4)
    (tmp_path / "e.txt").write_text("a b")
    with pytest.raises(ValueError, match="holds 2 tokens: not one row of 4"):
        tokens(str(tmp_path / "e.txt"), words, 4)


# ---------------------------------------------------------------------------------------------------------------------
# The built-in corpus
# ---------------------------------------------------------------------------------------------------------------------


def characters_only(**settings):
    """A BPE tokenizer of the 26 letters, without byte level."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", *LETTERS, "<unk>"])}
    bpe = Tokenizer(BPE(vocabulary, [], **{name: "<unk>" for name in settings}))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", **settings)


def test_text_that_the_tokenizer_drops_is_said(tmp_path):
    """Of 9 characters of each, 5 documents have 9 that are known, 5 have none: 45 of 90; 5 ends more are tokens too."""
    path = write_jsonl(tmp_path / "x.jsonl", ["abcdefghij"] * 5 + ["日本語日本語日本語日"] * 5)
    for _ in range(2):
        with pytest.warns(UserWarning, match="5 documents give no token: .*; the tokenizer drops 50% of the first"):
            assert tokens(path, characters_only(), 5, deduplicate=False).size == 55
    with pytest.warns(UserWarning, match="': 45% of the tokens are the tokenizer's token for unknown text"):
        assert tokens(path, characters_only(unk_token="<unk>"), 5, deduplicate=False).size == 100
    path = write_jsonl(tmp_path / "y.jsonl", ["日本語", "中文"] * 30)
    with pytest.raises(ValueError, match="y.jsonl', split='train': the tokenizer makes no token of any document"):
        tokens(path, characters_only(), 4, deduplicate=False)


def test_the_manifest_is_unique_and_whole_here():
    lines = corpus.manifest_lines(MANIFEST)
    hashes, paths = zip(*lines, strict=True)
    assert len(set(hashes)) == len(set(paths)) == len(lines) > 5000
    assert not [
        path for path in paths if re.search(r"(^|/)(tests?|_?vendor(ed)?)/|(^|/)(test_[^/]*|conftest)\.py$", path)
    ]
    assert left_out(MANIFEST, corpus.site_packages()) == []


def test_splits_of_the_built_in_corpus():
    """Disjoint, all of it, about 90/5/5 in files and in bytes, and the same bytes twice."""
    sizes = {path: (corpus.site_packages() / path).stat().st_size for _, path in corpus.manifest_lines(MANIFEST)}
    of = {split: {path for path in sizes if split_of(path) == split} for split in SPLITS}
    assert set.union(*of.values()) == set(sizes) and sum(map(len, of.values())) == len(sizes)
    for split, share in zip(SPLITS, (0.9, 0.05, 0.05), strict=True):
        assert len(of[split]) / len(sizes) == pytest.approx(share, abs=0.01)
        assert sum(sizes[path] for path in of[split]) / sum(sizes.values()) == pytest.approx(share, abs=0.01)
    sha = [hashlib.sha256("\0".join(documents(BUILTIN, "validation")).encode()).hexdigest() for _ in range(2)]
    assert sha[0] == sha[1]
    assert len(list(documents(BUILTIN, "validation"))) == len(of["validation"])


def test_tokens_of_the_built_in_corpus(tokenizer):
    first = next(documents(BUILTIN, "test"))
    rows = tokens(BUILTIN, tokenizer, 16, n_tokens=160, split="test")
    assert rows.shape == (10, 16) and first.startswith(tokenizer.decode(rows.flatten().tolist()).rstrip("�"))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site directory with a corpus of its own."""
    paths = [f"package{i % 3}/module{i}.py" for i in range(60)]
    for i, path in enumerate(paths):
        (tmp_path / "site" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / path).write_bytes(f'"""Module {i}."""\r\nx = {i}\n'.encode())
    lines = [f"{hashlib.sha256((tmp_path / 'site' / path).read_bytes()).hexdigest()}  {path}\n" for path in paths]
    (tmp_path / "manifest").write_text("".join(lines))
    monkeypatch.setattr(corpus, "MANIFEST", tmp_path / "manifest")
    monkeypatch.setattr(corpus, "site_packages", lambda: tmp_path / "site")
    return tmp_path / "site"


def test_a_missing_or_changed_file_is_left_out_and_reported(site, tokenizer):
    whole = dict(builtin_documents())
    assert len(whole) == 60 and whole["package1/module1.py"] == '"""Module 1."""\r\nx = 1\n'
    before = corpus_hash(BUILTIN)
    rows = tokens(BUILTIN, tokenizer, 8)
    (site / "package1/module1.py").write_bytes(b'"""Module 1."""\nx = 2\n')
    (site / "package2/module5.py").unlink()
    left_out.cache_clear()  # another process
    with pytest.warns(UserWarning, match=r"2 files are missing or differ.*package1.*package2.*requirements.txt"):
        fewer = tokens(BUILTIN, tokenizer, 8)
    assert fewer.filename != rows.filename
    assert corpus_hash(BUILTIN) != before
    with pytest.warns(UserWarning, match="2 files are missing"):
        found = dict(builtin_documents())
    assert set(whole) - set(found) == {"package1/module1.py", "package2/module5.py"}
    assert all(whole[path] == text for path, text in found.items())
    with pytest.warns(UserWarning, match="2 files are missing"):  # of rows from the cache too
        tokens(BUILTIN, tokenizer, 8)


@pytest.fixture(scope="module")
def built_in_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.ASSETS / "python-lm")


def test_the_shipped_rows_are_those_of_the_packages(built_in_tokenizer, monkeypatch, tmp_path):
    shipped = held_out(BUILTIN, built_in_tokenizer, 256, 16_384)
    assert Path(shipped.filename).parent == corpus.ROWS and not shipped.flags.writeable
    monkeypatch.setattr(corpus, "ROWS", tmp_path)
    built = held_out(BUILTIN, built_in_tokenizer, 256, 16_384)
    assert Path(built.filename).read_bytes() == Path(shipped.filename).read_bytes()


def test_the_chapters_find_their_rows_whatever_is_installed(built_in_tokenizer, monkeypatch, tmp_path):
    """With none of the packages' text, and without a word."""
    shipped = runpy.run_path(files.ROOT / "benchmarks" / "ship_rows.py")["SHIPPED"]
    asked = {("train", 1_024_000, 1), ("validation", 16_384, 1)}  # by chapter 00
    for path in sorted(notebooks_dir().glob("0[1-8]*.ipynb")):
        parameters = {name: parameter.default for name, parameter in parameters_of(path).items()}
        sizes = {parameters.get("n_eval_tokens", 16_384), parameters.get("n_rule_tokens", 32_768) // 2}
        asked |= {("train", parameters["n_tokens"], 16), *(("test", size, 16) for size in sizes)}
        if "validation" in path.read_text():
            asked |= {("validation", size, 16) for size in sizes}
    assert asked <= set(shipped) and len(list(corpus.ROWS.iterdir())) == len(shipped)
    monkeypatch.setattr(corpus, "site_packages", lambda: tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for split, n_tokens, spread in shipped:
            rows = tokens(BUILTIN, built_in_tokenizer, 256, n_tokens, split, spread=spread)
            assert rows.shape == (n_tokens // 256, 256)
    with pytest.warns(UserWarning, match="files are missing"), pytest.raises(ValueError, match="holds 0 tokens"):
        tokens(BUILTIN, built_in_tokenizer, 256, 512)


def test_the_corpus_is_that_of_this_interpreter():
    assert corpus.site_packages() == Path(sysconfig.get_paths()["purelib"])


def test_a_text_that_spells_the_end_of_text_token_does_not_end_there(tmp_path, tokenizer):
    text = "before <|endoftext|> after, " * 20
    (tmp_path / "a.txt").write_text(text)
    rows = tokens(tmp_path / "a.txt", tokenizer, 8)
    assert (rows != tokenizer.eos_token_id).all()
    assert text.startswith(tokenizer.decode(rows[0]))
