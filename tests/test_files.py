"""Code hashed by its meaning; files replaced whole, arrays with checksums, and disks that are full."""

import errno
import os
import random
import re
import resource
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import exit_code, kill_me, killed, start_child, word_tokenizer
from PIL import Image

from sae_utils import ActivationStore, TopKSAE, files, load_sae, save_sae, tokens, train
from sae_utils.code import code_hash, meaning
from sae_utils.files import array_writer, build_once, open_array, read_json, replacing, write_json
from sae_utils.training.checkpoint import load_checkpoint, save_checkpoint
from sae_utils.training.optimizer import Optimizer

FUNCTION = '''
def f(x, n=2):
    """What it does."""
    # why
    return x * n
'''


@pytest.mark.parametrize(
    "same",
    [
        FUNCTION.replace("What it does.", "Other words.\n\n    And more of them."),
        FUNCTION.replace('    """What it does."""\n', ""),
        FUNCTION.replace("# why", "# because"),
        '"""A module\'s docstring."""\n' + FUNCTION,
        FUNCTION.replace("x * n", "(x *\n            n)  # over two lines"),
    ],
)
def test_docstrings_comments_and_layout_have_no_meaning(same):
    assert same != FUNCTION and code_hash(same) == code_hash(FUNCTION)


@pytest.mark.parametrize("change", [("x * n", "x + n"), ("n=2", "n=3"), ("def f", "def g"), ("return", "print")])
def test_what_code_does_has_meaning(change):
    assert code_hash(FUNCTION.replace(*change)) != code_hash(FUNCTION)


def test_a_string_that_is_no_docstring_has_meaning():
    assert code_hash("def f():\n    return 'a'") != code_hash("def f():\n    return 'b'")
    assert meaning("def f():\n    'only a docstring'") == meaning("def f():\n    pass")


@pytest.mark.parametrize(
    "one, other", [("%time f(1)", "%time f(2)"), ("!ls a", "!ls b"), ("%%bash\nls", "%%bash\npwd")]
)
def test_magics_are_transformed_before_they_are_compared(one, other):
    assert code_hash(one) != code_hash(other) and "get_ipython()" in meaning(one)
    assert code_hash(f"{one}\n") == code_hash(one)
    assert code_hash("%time f(1)\nx = 1  # one") == code_hash("%time f(1)\n\nx = 1")


def test_cells_may_await_and_broken_code_counts_as_it_is_written():
    assert code_hash("await f()  # now") == code_hash("await f()")
    assert code_hash("x = (") != code_hash("x = ((") and meaning("x = (") == "x = ("


def test_code_that_is_too_deep_counts_as_it_is_written():
    source = "x = " + " + ".join(["1"] * 2000)
    assert meaning(source) == source and code_hash(source) != code_hash(source + " + 1")


def test_cells_are_told_apart():
    assert code_hash("a = 1", "b = 2") != code_hash("a = 1\nb = 2") != code_hash("b = 2", "a = 1")


# ---------------------------------------------------------------------------------------------------------------------
# Replacing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def umask():
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path, umask, mask):
    umask(mask)
    save_sae(TopKSAE(4, 8, k=2), tmp_path / "sae")
    save_sae(TopKSAE(4, 8, k=2), tmp_path / "sae")
    train(TopKSAE(4, 8, k=2), [torch.randn(8, 4)], n_steps=1, checkpoint=tmp_path / "checkpoint", progress=False)
    write_json(tmp_path / "x.json", [1])
    found = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(found) == 6 and found == {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in found}


def test_a_symlink_to_a_file_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "x.json").symlink_to(tmp_path / "big" / "y.json")
    for i in range(2):
        write_json(tmp_path / "x.json", [i])
        assert (tmp_path / "x.json").is_symlink() and read_json(tmp_path / "big" / "y.json") == [i]


def test_the_next_save_removes_what_a_killed_one_left_and_only_that(tmp_path):
    """The living writer waits in the middle of its work until the dead one's leftovers are gone."""
    path = tmp_path / "x.json"

    def die():
        with replacing(path) as new:
            new.write_text("half")
            kill_me()

    def wait():
        with replacing(path) as new:
            new.write_text("living")
            (tmp_path / "begun").touch()
            while not (tmp_path / "go").exists():
                time.sleep(0.01)

    assert killed(die)
    (dead,) = tmp_path.iterdir()
    (tmp_path / ".x.json.mine").mkdir()
    child = start_child(wait)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    write_json(path, "new")
    assert not dead.exists() and read_json(path) == "new"
    (tmp_path / "go").touch()
    assert exit_code(child) == 0 and path.read_text() == "living"
    assert {p.name for p in tmp_path.iterdir()} == {"begun", "go", "x.json", ".x.json.mine"}


def test_hidden_directories_of_users_stay(tmp_path):
    """Only what is named and locked as ours is, and empty ones of our name, go away."""
    ours = ".x.json.0123abcd.unfinished"
    for name in (".notes.unfinished", ".x.json.0123abcz.unfinished", ours):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    (tmp_path / ".y.json.0123abcd.unfinished").mkdir()
    write_json(tmp_path / "x.json", 1)
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", ".notes.unfinished", ".x.json.0123abcz.unfinished", ours}


def test_kills_at_any_moment(tmp_path):
    """Old or new, whole, and no leftovers after the next save: of an SAE, a checkpoint, a figure and an array built once."""
    sae = TopKSAE(32, 64, k=2)
    sae_dir, checkpoint, png, npy = (tmp_path / name for name in ("sae", "checkpoint", "x.png", "a.npy"))
    png.parent.mkdir(exist_ok=True)
    figure = plt.figure()
    plt.close(figure)
    rows = np.arange(30_000, dtype=np.uint16).reshape(-1, 4)

    def build(path):
        with array_writer(path, rows.shape, rows.dtype) as append:
            append(rows)

    def save_all():
        save_sae(sae, sae_dir)
        save_checkpoint(checkpoint, {"": (sae, None)}, {"": Optimizer(sae, (0.9, 0.999))}, {"lr": "1"}, 1, [])
        with replacing(png) as new:
            figure.savefig(new, format="png", dpi=20)
        npy.unlink(missing_ok=True)
        build_once(npy, build)

    def work():
        while True:
            save_all()

    save_all()
    rng = random.Random(0)
    for _ in range(25):
        child = start_child(work)
        time.sleep(0.03 + 0.12 * rng.random())
        child.kill()
        child.join()
        assert load_sae(sae_dir).k == 2
        load_checkpoint(checkpoint, {"": (sae, None)}, {"": Optimizer(sae, (0.9, 0.999))}, {"lr": "1"})
        Image.open(png).load()
        assert np.array_equal(open_array(build_once(npy, build)), rows)
    save_all()
    assert {p.name for p in tmp_path.iterdir()} == {"sae", "checkpoint", "x.png", "a.npy", "a.npy.lock"}
    assert len(list(sae_dir.iterdir())) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Arrays and their checksums
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def array(tmp_path):
    """A file of 3 × 4 × 5 numbers, written in two blocks."""
    numbers = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    with array_writer(tmp_path / "a.npy", numbers.shape, numbers.dtype) as append:
        append(numbers[:1])
        append(numbers[1:])
    return tmp_path / "a.npy"


def test_an_array_is_read_as_it_was_written_and_verified_once(array):
    for mode in ("r", "c", "r"):
        assert np.array_equal(open_array(array, mode), np.arange(60).reshape(3, 4, 5))
    assert np.array_equal(np.load(array), open_array(array)) and open_array(array).dtype == np.uint16
    before = files.verified.cache_info().misses
    open_array(array)
    assert files.verified.cache_info().misses == before
    os.utime(array, ns=(1, 1))
    open_array(array)
    assert files.verified.cache_info().misses == before + 1


def test_every_damage_of_an_array_is_refused_by_path(array):
    content = array.read_bytes()
    damaged = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(len(content))]
    damaged += [content[:-20], content[:-1], content + b"\0", content[:-60] + bytes(60), content[:-24] + content[-20:]]
    for i, other in enumerate(damaged):
        array.write_bytes(other)
        os.utime(array, ns=(i, i))  # the clock of a disk is too coarse for these
        with pytest.raises(ValueError, match=f"{array} is not a whole .npy file .*: delete it"):
            open_array(array)
    array.write_bytes(content)
    assert open_array(array).shape == (3, 4, 5)


def test_blocks_that_do_not_fill_an_array_are_an_error(tmp_path):
    with (
        pytest.raises(ValueError, match="do not make an array of shape"),
        array_writer(tmp_path / "a", (3, 2), "u2") as append,
    ):
        append(np.ones((2, 2)))


@pytest.mark.parametrize("system", ["without", "that refuses"])
def test_an_array_is_written_where_space_cannot_be_reserved(system, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    if system == "without":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with array_writer(tmp_path / "a.npy", (2, 2), np.uint16) as append:
        append(np.ones((2, 2)))
    assert np.array_equal(open_array(tmp_path / "a.npy"), np.ones((2, 2)))


def test_every_damage_of_a_checkpoint_is_refused_by_path(tmp_path):
    path = tmp_path / "checkpoint"
    x = torch.randn(8, 4)

    def resume():
        torch.manual_seed(0)
        return train(TopKSAE(4, 8, k=2), [x], n_steps=2, checkpoint=path, progress=False)

    resume()
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=f"{path} is not a whole checkpoint.*delete it to train from the start"):
            resume()
    path.write_bytes(content)
    assert len(resume()) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------------


def harvest(path, lm):
    ActivationStore(lm, np.zeros((7, 6), np.uint16), "blocks.1.hook_resid_pre")


def token_cache(path, lm):
    (path.parent / "text.txt").write_text("a b " * 50)
    tokens(str(path.parent / "text.txt"), word_tokenizer("ab"), 4)


def figure(path, lm):
    with replacing(path) as new:
        plt.figure().savefig(new, format="png")


WRITERS = {
    "an SAE": lambda path, lm: save_sae(TopKSAE(4, 8, k=2), path),
    "a checkpoint": lambda path, lm: train(
        TopKSAE(4, 8, k=2), [torch.randn(8, 4)], n_steps=1, checkpoint=path, progress=False
    ),
    "activations": harvest,
    "token rows": token_cache,
    "a figure": figure,
    "JSON": lambda path, lm: write_json(path, list(range(1000))),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_an_error_that_names_path_need_and_what_is_free(what, tmp_path, tiny_gpt2):
    """A limit on the size of files stands for the disk: the system refuses what goes beyond it in the same calls."""
    read, write = os.pipe()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))
        try:
            WRITERS[what](tmp_path / "here", tiny_gpt2)
        except OSError as error:
            os.write(write, str(error).encode())

    assert exit_code(start_child(work)) == 0
    os.close(write)
    with os.fdopen(read) as f:
        message = f.read()
    unit = r"[\d.]+ ([KMGT]iB|bytes)"
    needs = "" if what == "a figure" else rf"It needs {unit}, and "  # how large a figure gets is not known before
    assert re.match(rf"{tmp_path}.* cannot be written: File too large. {needs}{unit} are free", message)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".lock", ".txt")]


@pytest.mark.parametrize("what", WRITERS)
def test_a_place_that_cannot_be_is_named(what, tmp_path, tiny_gpt2, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("SAE_UTILS_CACHE", str(tmp_path / "file" / "here"))
    (tmp_path / "text").mkdir()
    path = tmp_path / ("text" if what == "token rows" else "file") / "here"
    with pytest.raises(OSError, match=f"{tmp_path / 'file' / 'here'}.* cannot be written: .* free there"):
        WRITERS[what](path, tiny_gpt2)


def test_only_a_full_disk_needs_room(tmp_path):
    (tmp_path / "file").write_text("no directory")
    for number, advice in ((errno.ENOSPC, "Make room, or choose another place"), (errno.EROFS, "Choose another place")):
        with pytest.raises(OSError, match=f"are free there. {advice}"), replacing(tmp_path / "x"):
            raise OSError(number, "no", str(tmp_path / "x"))
    with pytest.raises(OSError, match="are free there. Choose another place"):
        write_json(tmp_path / "file" / "x", [])


def test_a_users_own_file_is_not_to_be_deleted(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON .*: mend it"):
        read_json(tmp_path / "config.json")


def test_errors_that_are_not_of_the_disk_stay_as_they_are(tmp_path):
    for error in (
        ValueError("mine"),
        FileNotFoundError(errno.ENOENT, "gone", "x"),
        PermissionError(errno.EACCES, "no", "/etc/x"),
    ):
        with pytest.raises(type(error)) as raised, replacing(tmp_path / "x"):
            raise error
        assert raised.value is error
