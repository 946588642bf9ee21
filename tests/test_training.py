"""The training loop: reproducible, resumable bit for bit, and clear about what stops it."""

import functools
import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sae_utils import SAEOutput, TopKSAE, train
from sae_utils.losses import reconstruction_loss
from sae_utils.training import skip, stream, undertrained


class Stream:
    """An endless stream with a cursor, as the ActivationStore gives it; can turn bad or raise at a step."""

    def __init__(self, bad_at=None, stop_at=None, slow=0.0):
        self.bad_at, self.stop_at, self.slow = bad_at, stop_at, slow

    def from_step(self, step):
        while True:
            if step == self.stop_at:
                raise KeyboardInterrupt
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
            if step == self.bad_at:
                x[3, 2] = float("nan")
            time.sleep(self.slow)
            yield {"x": x}
            step += 1

    def __iter__(self):
        return self.from_step(0)


def new_sae(seed=0, k=4, d_sae=32):
    torch.manual_seed(seed)
    return TopKSAE(8, d_sae, k=k)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


run = functools.partial(train, n_steps=60, lr=1e-2, progress=False)


def test_equal_seeds_give_equal_bits_and_the_loss_falls():
    a, b = new_sae(), new_sae()
    history = run(a, Stream())
    assert history.equals(run(b, Stream())) and same_bits(a, b)
    assert history["fvu"].iloc[-1] < 0.8 * history["fvu"].iloc[0]
    assert history["tokens"].iloc[-1] == 60 * 64 and not a.training
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("stop_at", [1, 20, 37])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_at):
    whole, interrupted, resumed = new_sae(), new_sae(), new_sae()
    history = run(whole, Stream())
    settings = {"checkpoint": tmp_path / "training", "checkpoint_every": 10}
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, Stream(stop_at=stop_at), **settings)
    again = run(resumed, Stream(), **settings)
    assert same_bits(whole, resumed)
    assert history.equals(again)


def test_a_foreign_iterable_is_fast_forwarded(tmp_path):
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(60)]

    def until(n):
        yield from batches[:n]

    whole, part = new_sae(), new_sae()
    history = run(whole, batches)
    settings = {"checkpoint": tmp_path / "training", "checkpoint_every": 10}
    with pytest.warns(UserWarning, match="ended after 33 of n_steps=60"):
        run(part, until(33), **settings)
    resumed = new_sae()
    assert history.equals(run(resumed, iter(batches), **settings)) and same_bits(whole, resumed)


def test_a_list_is_gone_through_again_and_an_empty_one_refused():
    x = torch.randn(3, 16, 8)
    first, iterator = stream(batches := list(x))
    assert first is batches[0]
    after = itertools.islice(skip(batches, iterator, 2, torch.get_rng_state()), 5)
    assert [float(b[0, 0]) for b in after] == [float(x[i % 3, 0, 0]) for i in range(2, 7)]
    with pytest.raises(ValueError, match="batches is empty"):
        run(new_sae(), [])


def test_several_side_by_side_equal_each_alone():
    alone = {k: new_sae(k=k) for k in (2, 4)}
    together = {k: new_sae(k=k) for k in (2, 4)}
    histories = {k: run(sae, Stream()) for k, sae in alone.items()}
    history = run({f"k{k}": (sae, reconstruction_loss) for k, sae in together.items()}, Stream())
    for k in (2, 4):
        assert same_bits(alone[k], together[k])
        mine = history[history["sae"] == f"k{k}"].drop(columns="sae").reset_index(drop=True)
        assert mine.equals(histories[k])


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(tmp_path):
    path = tmp_path / "training"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_training import *\n"
        "run(new_sae(), Stream(slow=0.02), checkpoint=sys.argv[2], checkpoint_every=5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, os.path.dirname(__file__), str(path)])
    deadline = time.time() + 60
    while not path.exists() and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    steps = []

    class Recorded(Stream):
        def from_step(self, step):
            steps.append(step)
            return super().from_step(step)

    whole, resumed = new_sae(), new_sae()
    history = run(whole, Stream())
    assert history.equals(run(resumed, Recorded(), checkpoint=path, checkpoint_every=5)) and same_bits(whole, resumed)
    assert steps[-1] >= 5, "of what was trained already, no more than the first batch is asked for"


def test_nan_names_the_batch_and_keeps_the_last_good_state(tmp_path):
    path = tmp_path / "training"
    with pytest.raises(FloatingPointError, match=rf"activations x .*in batch 23\. The last good state is in {path}"):
        run(new_sae(), Stream(bad_at=23), checkpoint=path, checkpoint_every=10)
    whole, resumed = new_sae(), new_sae()
    run(whole, Stream())
    run(resumed, Stream(), checkpoint=path, checkpoint_every=10)  # the data mended, it goes on
    assert same_bits(whole, resumed)


def test_a_loss_that_is_not_finite_is_named():
    def broken(sae, batch):
        terms = reconstruction_loss(sae, batch)
        return terms | {"loss": terms["loss"] / (batch["progress"] < 0.5)}

    with pytest.raises(FloatingPointError, match="'loss' of the objective of 'a' became NaN or infinite in batch 30"):
        run({"a": (new_sae(), broken)}, Stream())


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "training"
    run(new_sae(), Stream(), checkpoint=path)
    with pytest.raises(ValueError, match="another training"):
        run(new_sae(), Stream(), checkpoint=path, lr=1e-3)
    with pytest.raises(ValueError, match="another training"):
        run(new_sae(), Stream(), functools.partial(reconstruction_loss, alpha=0), checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"training is not a whole checkpoint.*delete it"):
        run(new_sae(), Stream(), checkpoint=path)


def test_fine_tuning_keeps_the_sae():
    sae = new_sae()
    run(sae, Stream())
    before = sae.b_dec.clone()
    train(sae, Stream(), n_steps=1, lr=1e-12, progress=False)
    torch.testing.assert_close(sae.b_dec, before)
    fresh = new_sae()
    train(fresh, Stream(), n_steps=1, lr=1e-12, progress=False)
    torch.testing.assert_close(fresh.b_dec, next(iter(Stream()))["x"].mean(0))


def test_dead_after_is_a_tenth_of_the_run():
    sae = new_sae()
    run(sae, Stream())
    assert sae.dead_after == 60 * 64 // 10


def test_learning_rate_rule_and_schedule():
    history = run(new_sae(d_sae=64), Stream(), lr=None, n_steps=100)
    peak = 2e-4 / (64 / 2**14) ** 0.5
    rates = history["lr"].to_numpy()
    assert rates[0] == pytest.approx(peak / 5)  # step 1 of a warm-up of 5
    assert rates[4] == rates[50] == pytest.approx(peak)
    assert rates[89] == pytest.approx(peak * 11 / 20) and rates[99] == pytest.approx(peak / 20)


@pytest.mark.parametrize(
    "bad, match", [({"n_steps": 0}, "n_steps=0"), ({"lr": -1.0}, "lr=-1"), ({"decay": 2}, "decay=2")]
)
def test_settings_out_of_range(bad, match):
    with pytest.raises(ValueError, match=match):
        run(new_sae(), Stream(), **bad)


def test_bf16_is_asked_for_and_close():
    exact, half = new_sae(), new_sae()
    a, b = run(exact, Stream()), run(half, Stream(), bf16=True)
    assert not same_bits(exact, half) and half.W_enc.dtype == torch.float32
    assert b["fvu"].iloc[-1] == pytest.approx(a["fvu"].iloc[-1], rel=0.1)


def test_undertrained():
    import pandas as pd

    falling = pd.DataFrame({"fvu": [1 / (i + 1) for i in range(100)]})
    flat = pd.DataFrame({"fvu": [0.3] * 100})
    assert undertrained(falling) and not undertrained(flat)


def test_the_scale_of_x_plays_no_part():
    """Trained on x and on 256 x the same SAE comes out, biases in the units of x."""

    class Scaled(Stream):
        def from_step(self, step):
            return (256 * (batch["x"] + 3) for batch in super().from_step(step))

    class Shifted(Stream):
        def from_step(self, step):
            return (batch["x"] + 3 for batch in super().from_step(step))

    small, large = new_sae(), new_sae()
    a, b = run(small, Shifted()), run(large, Scaled())
    assert b["fvu"].to_numpy() == pytest.approx(a["fvu"].to_numpy(), rel=1e-3)
    torch.testing.assert_close(large.b_dec / 256, small.b_dec, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(large.b_enc / 256, small.b_enc, rtol=1e-3, atol=1e-3)
    assert small.b_enc.abs().max() > 1e-3, "the biases should have moved"


def test_half_precision_activations_are_taken_and_do_not_overflow():
    class Half(Stream):
        def from_step(self, step):
            return ((1000 * batch["x"] + 3000).half() for batch in super().from_step(step))  # sums pass 65,504

    history = run(new_sae(), Half())
    assert history["fvu"].iloc[-1] < 0.8 * history["fvu"].iloc[0]


class DenseTopK(TopKSAE):
    """The same SAE written out densely, with autograd's gradients."""

    def forward(self, x, grad=None):
        z = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        top = z.topk(self.k, dim=1)
        f = torch.zeros_like(z).scatter(1, top.indices, top.values)
        self.count((f > 0).any(0).nonzero(), len(x))
        return SAEOutput(self.decode(f), dense=f)


def test_the_loss_curve_is_that_of_the_dense_form():
    torch.manual_seed(3)
    plane = torch.randn(3, 16)
    x = [torch.randn(64, 3) @ plane + 0.1 * torch.randn(64, 16) for _ in range(40)]
    sparse, dense = TopKSAE(16, 96, 2), DenseTopK(16, 96, 2)
    dense.load_state_dict(sparse.state_dict())
    objective = functools.partial(reconstruction_loss, alpha=1 / 4)  # AuxK acts
    histories = [train(sae, x, objective, n_steps=200, lr=3e-3, progress=False) for sae in (sparse, dense)]
    assert histories[0]["auxk"].max() > 0
    for column in ("fvu", "auxk", "l0", "dead"):
        np.testing.assert_allclose(histories[0][column], histories[1][column], rtol=2e-3, atol=2e-4, err_msg=column)
