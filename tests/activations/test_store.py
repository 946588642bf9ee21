import errno
import os
import re
import time
from itertools import islice

import numpy as np
import pytest
import torch
from helpers import exit_code, kill_me, killed, start_child

from sae_utils import ActivationStore, files, load_language_model
from sae_utils.activations import store as activations
from sae_utils.activations.hooks import run_prefix
from sae_utils.files import array_writer

PRE, MLP, Z = "blocks.2.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def rows():
    """[7, 6] tokens; 299 stands in row 5 only."""
    rows = np.random.default_rng(0).integers(0, 299, (7, 6)).astype(np.uint16)
    rows[5, 3] = 299
    return rows


@pytest.fixture
def clean(tiny_gpt2, rows):
    """What the model has at the three hooks."""
    return run_prefix(tiny_gpt2, torch.from_numpy(rows.astype(np.int64)), [PRE, MLP, Z])


@pytest.fixture
def forwards(monkeypatch):
    """The hook names of every forward of the model."""
    calls = []

    def counted(lm, tokens, names):
        calls.append(list(names))
        return run_prefix(lm, tokens, names)

    monkeypatch.setattr(activations, "run_prefix", counted)
    return calls


def fp16(x):
    return x.half().float()


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_the_model_has(tiny_gpt2, rows, clean):
    store = ActivationStore(tiny_gpt2, rows, [PRE, MLP, Z], batch_rows=3)
    assert len(store) == 7 * 5 and store.d_in == 16
    batch = store.take([0, 4, 5, 34])
    assert batch["row"].tolist() == [0, 0, 1, 6] and batch["position"].tolist() == [1, 5, 1, 5]
    assert batch["tokens"].tolist() == [rows[0, 1], rows[0, 5], rows[1, 1], rows[6, 5]]
    assert batch["x"].dtype == torch.float32 and torch.equal(batch["x"], batch[PRE])
    for name in (PRE, MLP, Z):
        expected = fp16(clean[name])[[0, 0, 1, 6], [1, 5, 1, 5]]
        torch.testing.assert_close(batch[name], expected, atol=1e-6, rtol=1e-3)
        assert (batch[name] - clean[name][[0, 0, 1, 6], [1, 5, 1, 5]]).abs().max() < 1e-2


def test_position_0_is_skipped_or_not(tiny_gpt2, rows, clean):
    skipping = ActivationStore(tiny_gpt2, rows, PRE).activations()
    torch.testing.assert_close(skipping, fp16(clean[PRE][:, 1:].flatten(0, 1)), atol=1e-6, rtol=1e-3)
    store = ActivationStore(tiny_gpt2, rows, PRE, skip_first=False)
    assert len(store) == 42 and store.take([6])["position"].tolist() == [0]
    torch.testing.assert_close(store.activations(), fp16(clean[PRE].flatten(0, 1)), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(store.activations(8), store.activations()[:8], atol=0, rtol=0)
    assert store.activations(1000).shape == (42, 16)


def test_one_hook_of_several_is_x(tiny_gpt2, rows):
    store = ActivationStore(tiny_gpt2, rows, [MLP, PRE])
    batch = store.take([3])
    assert torch.equal(batch["x"], batch[MLP]) and not torch.equal(batch["x"], batch[PRE])
    for names in (MLP, (MLP, MLP)):
        assert set(ActivationStore(tiny_gpt2, rows, names).take([3])) == {"x", MLP, "row", "position", "tokens"}


def test_a_batch_is_a_copy(tiny_gpt2, rows):
    store = ActivationStore(tiny_gpt2, rows, PRE)
    before = store.activations()
    store.take(np.arange(5))["x"].zero_()
    store.take_rows([0])["x"].zero_()
    assert torch.equal(store.activations(), before) and before.abs().max() > 0


def test_whole_rows(tiny_gpt2, rows, clean):
    store = ActivationStore(tiny_gpt2, rows, [PRE, Z])
    batch = store.take_rows([5, 2])
    assert batch["tokens"].tolist() == rows[[5, 2]].tolist() and batch["tokens"].dtype == torch.int64
    assert batch["row"].tolist() == [5, 2] and batch["position"].tolist() == list(range(6))
    torch.testing.assert_close(batch["x"], fp16(clean[PRE][[5, 2]]), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(batch[Z], fp16(clean[Z][[5, 2]]), atol=1e-6, rtol=1e-3)
    seen = [batch["row"].tolist() for batch in islice(store.batches(3, whole_rows=True), 4)]
    for epoch in (seen[:2], seen[2:]):
        assert len(set(sum(epoch, []))) == 6  # a permutation of 7 rows, less the partial batch
    assert [b["x"].shape for b in islice(store.batches(7, whole_rows=True), 1)] == [(7, 6, 16)]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 35])
def test_every_epoch_is_a_new_permutation(tiny_gpt2, rows, batch_size):
    store = ActivationStore(tiny_gpt2, rows, PRE)
    per_epoch = 35 // batch_size
    batches = islice(store.batches(batch_size, seed=3), 2 * per_epoch)
    seen = [list(zip(b["row"].tolist(), b["position"].tolist(), strict=True)) for b in batches]
    assert {len(batch) for batch in seen} == {batch_size}
    for epoch in (seen[:per_epoch], seen[per_epoch:]):
        entries = sum(epoch, [])
        assert len(set(entries)) == len(entries) == per_epoch * batch_size
        assert set(entries) <= {(row, position) for row in range(7) for position in range(1, 6)}
    if batch_size < 35:
        assert seen[:per_epoch] != seen[per_epoch:]
        assert seen[:per_epoch] != sorted(seen[:per_epoch])


def test_batches_hold_the_activations_of_their_entries(tiny_gpt2, rows, clean):
    store = ActivationStore(tiny_gpt2, rows, [PRE, Z])
    for batch in islice(store.batches(8, seed=1), 9):
        at = batch["row"], batch["position"]
        torch.testing.assert_close(batch["x"], fp16(clean[PRE][at]), atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(batch[Z], fp16(clean[Z][at]), atol=1e-6, rtol=1e-3)
        assert batch["tokens"].tolist() == rows[batch["row"], batch["position"]].tolist()


def test_seeds(tiny_gpt2, rows):
    store = ActivationStore(tiny_gpt2, rows, PRE)

    def first(n, **kwargs):
        return [batch["x"] for batch in islice(store.batches(4, **kwargs), n)]

    torch.testing.assert_close(first(20, seed=1), first(20, seed=1), atol=0, rtol=0)
    assert not torch.equal(torch.cat(first(3, seed=1)), torch.cat(first(3, seed=2)))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first(3)
    assert torch.equal(torch.get_rng_state(), state)
    batches = store.batches(4, seed=1)  # iterating again begins again
    torch.testing.assert_close(next(iter(batches))["x"], next(iter(batches))["x"], atol=0, rtol=0)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("step", [0, 1, 7, 8, 9, 16, 30])
def test_from_step_is_skipping(tiny_gpt2, rows, step, whole_rows):
    """8 batches an epoch of 35 activations, 3 of 7 rows; also over epochs' ends."""
    batches = ActivationStore(tiny_gpt2, rows, PRE).batches(2 if whole_rows else 4, seed=5, whole_rows=whole_rows)
    skipped = [batch["x"] for batch in islice(batches, step, step + 10)]
    jumped = [batch["x"] for batch in islice(batches.from_step(step), 10)]
    torch.testing.assert_close(jumped, skipped, atol=0, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def test_a_second_store_runs_no_model(tiny_gpt2, rows, forwards):
    first = ActivationStore(tiny_gpt2, rows, [PRE, MLP], batch_rows=3)
    assert forwards == [[PRE, MLP]] * 3  # 7 rows by threes
    forwards.clear()
    again = ActivationStore(tiny_gpt2, np.array(rows), [PRE, MLP], batch_rows=5, skip_first=False)
    one = ActivationStore(tiny_gpt2, rows, MLP)
    assert not forwards
    assert torch.equal(again.take_rows([3])["x"], first.take_rows([3])["x"])
    assert torch.equal(one.activations(), first.take(np.arange(35))[MLP])


def test_another_hook_harvests_that_one_only(tiny_gpt2, rows, forwards, clean):
    ActivationStore(tiny_gpt2, rows, PRE)
    forwards.clear()
    store = ActivationStore(tiny_gpt2, rows, [PRE, Z, MLP])
    assert forwards == [[Z, MLP]]
    torch.testing.assert_close(store.take_rows([0])[MLP], fp16(clean[MLP][:1]), atol=1e-6, rtol=1e-3)


def test_what_changes_the_activations_changes_the_cache(tiny_gpt2, tiny_neox, rows, model_directories):
    paths = [ActivationStore(tiny_gpt2, rows, PRE).path]
    changed = load_language_model(str(model_directories["gpt2"]), device="cpu")
    assert ActivationStore(changed, rows, PRE).path == paths[0]
    with torch.no_grad():
        changed.original_model.get_parameter("transformer.h.2.mlp.c_fc.bias")[3] += 1e-3
    other = rows.copy()
    other[0, 0] += 1
    paths += [ActivationStore(changed, rows, PRE).path]
    paths += [ActivationStore(tiny_neox, rows, PRE).path, ActivationStore(tiny_gpt2, other, PRE).path]
    paths += [
        ActivationStore(tiny_gpt2, rows[:, :3], PRE).path,
        ActivationStore(tiny_gpt2, rows, PRE, dtype="bfloat16").path,
    ]
    paths += [ActivationStore(tiny_gpt2, rows.reshape(14, 3), PRE).path]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    "damage", ["flipped", "zeroed", "truncated", "empty", "text", "no checksum", "rows", "dtype", "zip"]
)
def test_a_damaged_or_foreign_cache_file_is_refused_by_path(tiny_gpt2, rows, damage):
    name = PRE + activations.GRAD
    path = ActivationStore(tiny_gpt2, rows, PRE, gradients=True).file(name)
    content = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    elif damage == "zeroed":
        path.write_bytes(content[:-500] + bytes(500))
    elif damage == "no checksum":
        np.save(path, np.load(path))
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not an array" * 100)
    elif damage in ("rows", "dtype"):
        array = np.zeros((6, 6, 16), np.uint16) if damage == "rows" else np.zeros((7, 6, 16), np.float16)
        with array_writer(path, array.shape, array.dtype) as append:
            append(array)
    elif damage == "zip":
        np.savez(path.with_suffix(".npz"), x=np.zeros((7, 6, 16), np.uint16))
        path.with_suffix(".npz").replace(path)
    with pytest.raises(ValueError) as error:
        ActivationStore(tiny_gpt2, rows, PRE, gradients=True)
    assert str(path) in str(error.value) and "delete it" in str(error.value)
    path.unlink()
    assert ActivationStore(tiny_gpt2, rows, PRE, gradients=True).take([3])["grad"].any()


@pytest.mark.parametrize("moment", ["second batch", "written", "one of two renamed"])
def test_a_kill_while_harvesting_leaves_nothing_that_loads(tiny_gpt2, rows, clean, moment, own_cache, forwards):
    def work():
        if moment == "second batch":
            calls = []
            activations.run_prefix = lambda *args: (
                calls.append(1) or (kill_me() if len(calls) > 2 else run_prefix(*args))
            )
        elif moment == "written":
            files.os.replace = kill_me
        else:
            replace = files.os.replace
            files.os.replace = lambda new, to: kill_me() if PRE in str(to) else replace(new, to)
        ActivationStore(tiny_gpt2, rows, [PRE, Z], batch_rows=3)

    assert killed(work)
    (path,) = [p for p in (own_cache / "activations").iterdir() if p.is_dir()]
    assert [p.name for p in path.glob("*.npy")] == ([f"{Z}.npy"] if moment == "one of two renamed" else [])
    assert len(list(path.glob(".*"))) == (1 if moment == "one of two renamed" else 2)
    store = ActivationStore(tiny_gpt2, rows, [PRE, Z], batch_rows=3)
    assert forwards[0] == ([PRE] if moment == "one of two renamed" else [PRE, Z])
    for name in (PRE, Z):
        torch.testing.assert_close(store.take_rows(range(7))[name], fp16(clean[name]), atol=1e-6, rtol=1e-3)
    assert sorted(p.name for p in path.iterdir()) == sorted([f"{PRE}.npy", f"{Z}.npy"])


def test_two_processes_harvest_once(tiny_gpt2, rows, tmp_path):
    log = tmp_path / "log"

    def work(out):
        def slow(*args):
            with open(log, "a") as f:
                f.write(f"{os.getpid()}\n")
            time.sleep(0.1)
            return run_prefix(*args)

        activations.run_prefix = slow  # in the child only
        np.save(out, ActivationStore(tiny_gpt2, rows, PRE, batch_rows=3).activations().numpy())

    outs = [tmp_path / f"{i}.npy" for i in range(2)]
    children = [start_child(work, out) for out in outs]
    assert [exit_code(child) for child in children] == [0, 0]
    lines = log.read_text().splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1
    assert np.array_equal(*map(np.load, outs)) and np.abs(np.load(outs[0])).max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"hook_names": "blocks.2.hook_resid_per"},
            r"'blocks.2.hook_resid_per' is not a hook.*blocks\.2\.hook_resid_pre",
        ),
        ({"hook_names": [PRE, "blocks.9.hook_mlp_out"]}, "blocks.9.hook_mlp_out"),
        ({"hook_names": []}, "name at least one hook"),
        ({"dtype": "float32"}, "dtype='float32'.*: allowed are 'float16', 'bfloat16'"),
        ({"rows": np.zeros((2, 33), np.uint16)}, "n_ctx=33 is longer than the model's context of 32"),
        ({"rows": np.zeros((0, 8), np.uint16)}, r"tokens are uint16 \[0, 8\]: they have to be whole numbers"),
        ({"rows": np.zeros(8, np.uint16)}, r"tokens are uint16 \[8\]: they have to be whole numbers"),
        ({"rows": np.full((2, 8), 300, np.uint16)}, "token 300, and the model's vocabulary has 300"),
        ({"rows": np.full((2, 8), -1)}, "token -1, and the model's vocabulary has 300"),
        ({"rows": np.zeros((2, 8))}, r"tokens are float64 \[2, 8\]: they have to be whole numbers"),
        ({"rows": torch.zeros(2, 8, dtype=torch.bool)}, r"tokens are bool \[2, 8\]: they have to be whole numbers"),
        ({"rows": [[1, 2], [3]]}, "inhomogeneous shape"),
        ({"rows": [["a", "b"]]}, "they have to be whole numbers"),
        ({"rows": None}, r"tokens are object \[\]: they have to be whole numbers"),
        ({"rows": np.zeros((2, 1), np.uint16)}, "n_ctx=1: position 0 is left out"),
        (
            {"rows": np.zeros((2, 1), np.uint16), "skip_first": False, "gradients": True},
            "a gradient needs a next token",
        ),
        ({"hook_names": None}, "hook_name='None' is not a hook"),
        ({"hook_names": [3]}, "hook_name='3' is not a hook"),
        ({"dtype": torch.float16}, "dtype=torch.float16 .*allowed are"),
        ({"skip_first": 1}, "skip_first=1: it has to be True or False"),
        ({"gradients": "yes"}, "gradients='yes': it has to be True or False"),
        ({"batch_rows": 0}, "batch_rows=0: it has to be a whole number of at least 1"),
    ],
)
def test_bad_arguments(tiny_gpt2, rows, arguments, message, own_cache, forwards):
    with pytest.raises(ValueError, match=message):
        ActivationStore(tiny_gpt2, **{"rows": rows, "hook_names": PRE} | arguments)
    assert not forwards and not own_cache.exists()


@pytest.mark.parametrize("form", [torch.from_numpy, np.ndarray.tolist, np.int64, np.asfortranarray])
def test_rows_of_any_form_are_the_same_rows(tiny_gpt2, rows, form, forwards):
    x = ActivationStore(tiny_gpt2, rows, PRE).activations()
    forwards.clear()
    assert torch.equal(ActivationStore(tiny_gpt2, form(rows), PRE).activations(), x) and not forwards


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda store: store.batches(36), "batch_size=36: this store holds 35 activations"),
        (lambda store: store.batches(8, whole_rows=True), "batch_size=8: this store holds 7 rows"),
        (lambda store: store.batches(0), "batch_size=0: it has to be a whole number"),
        (lambda store: store.batches(-1, whole_rows=True), "batch_size=-1: it has to be a whole number"),
        (lambda store: store.batches(4.0), "batch_size=4.0: it has to be a whole number"),
        (lambda store: store.batches(True), "batch_size=True: it has to be a whole number"),
        (lambda store: store.batches(4, seed=-1), "seed=-1: it has to be a whole number"),
        (lambda store: store.batches(4, whole_rows=2), "whole_rows=2: it has to be True or False"),
        (lambda store: store.activations(-3), "n=-3: it has to be a whole number"),
        (lambda store: store.take([35]), r"entries=\[35\]: they have to be whole numbers from 0 to 34"),
        (lambda store: store.take(np.array([-1])), r"entries=array\(\[-1\]\)"),
        (lambda store: store.take([0.5]), r"entries=\[0.5\]"),
        (lambda store: store.take_rows([7]), r"rows=\[7\]: they have to be whole numbers from 0 to 6"),
        (lambda store: store.take_rows([]), r"rows=\[\]"),
    ],
)
def test_bad_reads(tiny_gpt2, rows, use, message):
    with pytest.raises(ValueError, match=message):
        use(ActivationStore(tiny_gpt2, rows, PRE))


@pytest.fixture
def broken(model_directories):
    """A model of one's own whose embedding of token 299 can be changed."""
    lm = load_language_model(str(model_directories["gpt2"]), device="cpu")

    def embed(value):
        with torch.no_grad():
            lm.original_model.get_input_embeddings().weight[299, 4] = value
        return lm

    return embed


def test_too_large_for_float16(broken, rows, own_cache):
    lm = broken(1e5)
    with pytest.raises(
        FloatingPointError, match=r"resid_pre reaches 1e\+05 in row 5, too large for torch.float16: .*bfloat16"
    ):
        ActivationStore(lm, rows, "blocks.0.hook_resid_pre", batch_rows=4)
    assert not list(own_cache.rglob("*.npy"))
    store = ActivationStore(lm, rows, "blocks.0.hook_resid_pre", dtype="bfloat16")
    x = run_prefix(lm, torch.from_numpy(rows.astype(np.int64)), store.hook_names)[store.hook_names[0]]
    assert x.max() > 65_504
    torch.testing.assert_close(store.take_rows(range(7))["x"], x.bfloat16().float(), atol=0, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(broken, rows, value, own_cache):
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(FloatingPointError, match=f"{PRE} is NaN or infinite in row 5 of the tokens"):
            ActivationStore(broken(value), rows, PRE, dtype=dtype, batch_rows=2)
    assert not list(own_cache.rglob("*.npy"))


def test_a_disk_too_small(tiny_gpt2, rows, own_cache, monkeypatch, forwards):
    """Said when the space is reserved, after the first batch: 7 · 6 · 16 · 2 bytes, a header of 128 and a checksum of 20."""

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch, pytest.raises(OSError) as said:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        ActivationStore(tiny_gpt2, rows, PRE, batch_rows=3)
    assert re.search(
        rf"{PRE}.npy cannot be written: No space.* It needs 1.46 KiB, .* free there. Make room", str(said.value)
    )
    assert len(forwards) == 1 and not list(own_cache.rglob("*.npy")) and not list(own_cache.rglob("*.unfinished"))
    assert len(ActivationStore(tiny_gpt2, rows, PRE)) == 35


def test_a_model_with_hooks_of_its_own_is_not_stored(tiny_gpt2):
    rows = np.arange(24).reshape(3, 8)
    tiny_gpt2.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    try:
        with pytest.raises(ValueError, match=r"hooks of its own at blocks\.0\..*mlp.*reset_hooks"):
            ActivationStore(tiny_gpt2, rows, "blocks.1.hook_resid_pre")
    finally:
        tiny_gpt2.reset_hooks()
    assert len(ActivationStore(tiny_gpt2, rows, "blocks.1.hook_resid_pre")) == 21


def test_rows_that_change_afterwards_do_not_change_the_store(tiny_gpt2):
    rows = np.arange(24, dtype=np.uint16).reshape(3, 8)
    store = ActivationStore(tiny_gpt2, rows, "blocks.1.hook_resid_pre")
    rows[:] = 0
    assert store.take([0])["tokens"].tolist() == [1]
