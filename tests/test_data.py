import hashlib
import json
import os
import sysconfig
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import exit_code, kill_me, killed, start_child, word_tokenizer
from tokenizers.normalizers import Replace

from sae_utils import data, files, held_out, tokens
from sae_utils.data import BUILTIN, MANIFEST, builtin_documents, corpus_hash, distinct, documents, left_out, split_of

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
    (tmp_path / "a.txt").write_text("a b c d " * 100)
    everything = tokens(str(tmp_path), words, 4, split="test")
    rows = held_out(str(tmp_path), words, 4, 8, spread=3)
    assert rows.tolist() == everything[[0, 2]].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asking for 16 times as much is not the reader's mistake
        assert len(held_out(str(tmp_path), words, 4, 8)) == 2
        assert len(held_out(str(tmp_path), words, 4, 4_000)) == len(everything)


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
    monkeypatch.setattr(data, "documents", lambda *_: endless)
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
        assert list(data.read_local(tmp_path / name, "text")) == [(f"{name}:{i}", text) for i, text in enumerate(texts)]
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
    found = dict(data.read_local(tmp_path / "d", "body"))
    assert found == {"a.txt": "one\ntwo", "sub/a.txt": "three", "b.jsonl:0": "four", "b.jsonl:1": "five"}


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    """JSON allows U+2028 and U+0085 inside a string; str.splitlines would cut there."""
    text = "one\u2028two\u0085three"
    path = write_jsonl(tmp_path / "x.jsonl", [text])
    assert [t for _, t in data.read_local(Path(path), "text")] == [text]


def test_text_field(words, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a b c d e f", "body": "g h i j k l"}\n')
    assert tokens(str(tmp_path / "x.jsonl"), words, 4, text_field="body").tolist() == [[7, 8, 9, 10]]
    assert tokens(str(tmp_path / "x.jsonl"), words, 4).tolist() == [[1, 2, 3, 4]]


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
    monkeypatch.setattr(data, "token_stream", lambda *_: pytest.fail("tokenised again"))
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
        patch.setattr(data, "token_stream", broken)
        tokens(text, words, 4)
    assert [p.suffix for p in own_cache.rglob("*") if p.is_file()] == [".lock"]
    assert tokens(text, words, 4).shape == (45, 4)


def test_two_processes_build_one_cache_once(words, text, tmp_path):
    real, log = data.token_stream, tmp_path / "log"

    def slow(*args):
        with open(log, "a") as f:
            f.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        yield from real(*args)

    def work(out):
        data.token_stream = slow  # in the child only
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

            data.array_writer = half
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
        ({"split": "valid"}, ValueError, "split='valid' is not one of train, validation, test"),
        ({"n_ctx": 1}, ValueError, "n_ctx=1"),
        ({"n_tokens": 3}, ValueError, "n_tokens=3 is less than one row of n_ctx=4"),
        ({"n_tokens": -8}, ValueError, "n_tokens=-8"),
        ({"bos": True}, ValueError, "no bos_token"),
        ({"dataset": "nowhere.txt"}, FileNotFoundError, "dataset='nowhere.txt': no such file.*Allowed"),
        ({"dataset": "/nowhere"}, FileNotFoundError, "dataset='/nowhere': no such file"),
        ({"dataset": "./nowhere"}, FileNotFoundError, "no such file"),
        ({"dataset": "a/b/c"}, FileNotFoundError, "no such file"),
        ({"dataset": ""}, FileNotFoundError, "dataset='': no such file"),
        ({"dataset": "Skylion007/openwebtext"}, FileNotFoundError, "HF_HUB_OFFLINE forbids the hub.*Allowed"),
        ({"dataset": "imdb"}, FileNotFoundError, "HF_HUB_OFFLINE"),
    ],
)
def test_bad_arguments(arguments, error, message, words, text, own_cache):
    with pytest.raises(error, match=message):
        tokens(**{"dataset": text, "tokenizer": words, "n_ctx": 4} | arguments)
    assert not cached_arrays(own_cache)


@pytest.mark.parametrize("value", ["0", "", "false", "no"])
def test_a_hub_name_needs_a_number_of_tokens(value, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(ValueError, match="n_tokens=0.*streamed"):
        tokens("Skylion007/openwebtext", words, 4)


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
    assert str(tmp_path / name) in str(error.value) and "'text'" in str(error.value)
    assert not cached_arrays(own_cache)


@pytest.mark.parametrize("column", [{"body": ["a"]}, {"text": [1]}, {"text": ["a", None]}])
def test_a_parquet_file_without_text_is_named(column, words, tmp_path):
    pq.write_table(pa.table(column), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet cannot be read as .parquet with text in 'text'"):
        tokens(str(tmp_path / "x.parquet"), words, 4)


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


def test_the_manifest_is_unique_and_whole_here():
    lines = data.manifest_lines(MANIFEST)
    hashes, paths = zip(*lines, strict=True)
    assert len(set(hashes)) == len(set(paths)) == len(lines) > 5000
    assert not [path for path in paths if data.NOT_SOURCE.search(path)]
    assert left_out(MANIFEST, data.site_packages()) == []


def test_splits_of_the_built_in_corpus():
    """Disjoint, all of it, about 90/5/5 in files and in bytes, and the same bytes twice."""
    sizes = {path: (data.site_packages() / path).stat().st_size for _, path in data.manifest_lines(MANIFEST)}
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
    monkeypatch.setattr(data, "MANIFEST", tmp_path / "manifest")
    monkeypatch.setattr(data, "site_packages", lambda: tmp_path / "site")
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
    found = dict(builtin_documents())
    assert set(whole) - set(found) == {"package1/module1.py", "package2/module5.py"}
    assert all(whole[path] == text for path, text in found.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(BUILTIN, tokenizer, 8)  # said once


def test_the_corpus_is_that_of_this_interpreter():
    assert data.site_packages() == Path(sysconfig.get_paths()["purelib"])


def test_a_text_that_spells_the_end_of_text_token_does_not_end_there(tmp_path, tokenizer):
    text = "before <|endoftext|> after, " * 20
    (tmp_path / "a.txt").write_text(text)
    rows = tokens(tmp_path / "a.txt", tokenizer, 8)
    assert (rows != tokenizer.eos_token_id).all()
    assert text.startswith(tokenizer.decode(rows[0]))
