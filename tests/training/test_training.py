"""The training loop: reproducible, resumable bit for bit, and clear about what stops it."""

import contextlib
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
from helpers import exit_code, start_child
from torch.utils.data import DataLoader, TensorDataset

from sae_utils import (
    ActivationStore,
    FeatureChoiceSAE,
    GatedSAE,
    GradientSAE,
    JumpReluSAE,
    MutualChoiceSAE,
    ReluSAE,
    SAEOutput,
    TopKSAE,
    train,
)
from sae_utils.activations.store import Batches
from sae_utils.device import bf16_is_fast
from sae_utils.training import end_to_end, loop, losses
from sae_utils.training.loop import undertrained
from sae_utils.training.losses import batch_fvu, reconstruction_loss
from sae_utils.training.streams import skip, stream


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


def new_sae(seed=0, k=4, d_sae=32, d_in=8):
    torch.manual_seed(seed)
    return TopKSAE(d_in, d_sae, k=k)


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


@pytest.mark.parametrize("n", [1, 23, 60])
def test_stopped_after_n_steps_is_the_whole_run_there_and_goes_on(tmp_path, n):
    """The schedule, the dead and the bits are those of the whole run; a run of n steps is another one."""
    whole, there, stopped, short = new_sae(), new_sae(), new_sae(), new_sae()
    history = run(whole, Stream())
    with contextlib.suppress(KeyboardInterrupt):
        run(there, Stream(stop_at=n))
    settings = {"checkpoint": tmp_path / "training", "checkpoint_every": 10}
    assert history[:n].equals(run(stopped, Stream(), stop_after=n, **settings)) and not stopped.training
    assert same_bits(stopped, there) and stopped.dead_after == whole.dead_after
    run(short, Stream(), n_steps=n)
    assert same_bits(stopped, short) == (n == 60)
    again = new_sae()
    assert history.equals(run(again, Stream(), **settings)) and same_bits(whole, again)
    if n < 60:
        with pytest.raises(ValueError, match=f"stop_after={n}: .* is at step 60, so use another path"):
            run(new_sae(), Stream(), stop_after=n, **settings)


def test_a_stopped_run_ends_in_a_row_and_in_a_checkpoint(tmp_path):
    """Of 400 steps every second has a row, so that step 23 has one only as the last."""
    whole, stopped = new_sae(), new_sae()
    history = run(stopped, Stream(), n_steps=400, stop_after=23, checkpoint=tmp_path / "training")
    assert history["step"].to_list() == [*range(2, 23, 2), 23]
    again = run(new_sae(), Stream(), n_steps=400, stop_after=23, checkpoint=tmp_path / "training")
    assert history.equals(again), "nothing is left to do"
    longer = run(resumed := new_sae(), Stream(), n_steps=400, checkpoint=tmp_path / "training")
    assert len(longer) == len(run(whole, Stream(), n_steps=400)) + 1 and same_bits(whole, resumed)


@pytest.mark.parametrize("n", [0, 61, 2.5])
def test_stop_after_out_of_range(n):
    with pytest.raises(ValueError, match="stop_after=.*whole number from 1 to 60"):
        run(new_sae(), Stream(), stop_after=n)


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
    after = itertools.islice(skip(batches, iterator, 2), 5)
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
        "import sys; sys.path[:0] = sys.argv[1], sys.argv[1] + '/..'\n"
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


def nan_gradient_at(step):
    """An objective whose loss is finite and whose gradient is not: the root of 0."""

    def objective(sae, batch):
        terms = reconstruction_loss(sae, batch)
        if round(batch["progress"] * 60) == step:
            terms["loss"] = terms["loss"] + (0 * sae.W_enc[0]).abs().sum().sqrt()
        return terms

    return objective


@pytest.mark.parametrize("step", [19, 33, 59])
def test_a_gradient_that_is_not_finite_is_named_and_the_weights_stay_good(step, tmp_path):
    sae = new_sae()
    with pytest.raises(FloatingPointError, match=f"gradient of 'loss' of 'a' became NaN or infinite in batch {step}"):
        run({"a": (sae, nan_gradient_at(step))}, Stream(), checkpoint=tmp_path / "training", checkpoint_every=20)
    assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("cls", [TopKSAE, ReluSAE, GatedSAE])
def test_an_sae_that_is_not_finite_is_refused(cls):
    sae = cls(8, 32)
    sae.W_enc.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="W_enc of 'a' holds NaN or infinite values"):
        run({"a": sae}, Stream())


def test_tokens_are_counted_as_they_come(tmp_path):
    batches = [torch.randn(n, 8) for n in (10, 30, 20)]
    expected = list(np.cumsum([10, 30, 20, 10, 30, 20, 10, 30]))
    for n_steps in (8, 8):
        history = run(new_sae(), batches, n_steps=n_steps, checkpoint=tmp_path / "training")
        assert history["tokens"].tolist() == expected
    stopped = itertools.chain(batches, batches[:2])
    settings = {"n_steps": 8, "checkpoint": tmp_path / "other", "checkpoint_every": 1}
    with pytest.warns(UserWarning, match="ended after 5"):
        run(new_sae(), stopped, **settings)
    assert run(new_sae(), batches, **settings)["tokens"].tolist() == expected


@pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e18, 1e25])
def test_a_scale_whose_squares_have_no_place_is_refused_with_the_factor_that_helps(scale):
    x = scale * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"x has a scale of 1e[+-]?\d+, .*multiply it by 1e.* or use a float64 SAE"):
        run(new_sae(), x)
    histories = [run(new_sae().double(), y.double()) for y in (x, x.double() / scale)]
    np.testing.assert_allclose(histories[0].to_numpy(), histories[1].to_numpy(), rtol=1e-4)


def test_of_two_trainings_on_one_checkpoint_the_second_to_save_is_told(tmp_path):
    class Meets(Stream):
        def from_step(self, step):
            for i, batch in enumerate(super().from_step(step)):
                if i == 15:
                    run(new_sae(seed=1), Stream(), n_steps=5, checkpoint=tmp_path / "training")
                yield batch

    with pytest.raises(ValueError, match="checkpoint of another training. Different: n_steps"):
        run(new_sae(), Meets(), checkpoint=tmp_path / "training", checkpoint_every=20)
    assert len(run(new_sae(seed=1), Stream(), n_steps=5, checkpoint=tmp_path / "training")) == 5


def test_a_checkpoint_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run(new_sae(), Stream(), n_steps=2, checkpoint="~/training")
    assert [p.name for p in tmp_path.iterdir()] == ["training"]


def test_an_impossible_place_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    for place, said in ((tmp_path / "file" / "training", "cannot be written"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(OSError, match=said):
            run(new_sae(), Stream(stop_at=1), checkpoint=place)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user can be tried by root only")
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path):
    path = tmp_path / "training"
    run(new_sae(), Stream(), n_steps=2, checkpoint=path)

    def as_nobody():
        for directory in (tmp_path, *tmp_path.parents):
            with contextlib.suppress(OSError):
                os.chmod(directory, 0o777)
        os.chmod(path, 0)
        os.setuid(65534)
        with pytest.raises(PermissionError, match="training"):
            run(new_sae(), Stream(), n_steps=2, checkpoint=path)

    assert exit_code(start_child(as_nobody)) == 0


def test_an_sae_may_be_named_as_you_like():
    def broken(sae, batch):
        terms = reconstruction_loss(sae, batch)
        return terms | {"loss": terms["loss"] / (batch["progress"] < 0.5)}

    with pytest.raises(FloatingPointError, match="'loss' of the objective of 'x' became NaN or infinite in batch 30"):
        run({"x": (new_sae(), broken)}, Stream())


def test_x_with_a_graph_under_no_grad_and_in_inference_mode():
    weight = torch.ones(8, requires_grad=True)
    plain, jobs = new_sae(), {"a": new_sae(), "b": new_sae(k=2)}
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    history = run(plain, batches)
    run(jobs, [batch * weight for batch in batches])
    assert same_bits(jobs["a"], plain) and weight.grad is None
    for mode in (torch.no_grad, torch.inference_mode):
        sae = new_sae()
        with mode():
            assert history.equals(run(sae, [batch.clone() for batch in batches]))


def test_dead_after_is_a_tenth_of_the_run():
    sae = new_sae()
    run(sae, Stream())
    assert sae.dead_after == 60 * 64 // 10
    run(sae, Stream(), n_steps=6)
    assert sae.dead_after == 60 * 64 // 10, "a short second training keeps the window of the first"


def test_learning_rate_rule_and_schedule():
    history = run(new_sae(d_sae=64), Stream(), lr=None, n_steps=100)
    peak = 2e-4 / (64 / 2**14) ** 0.5
    rates = history["lr"].to_numpy()
    assert rates[0] == pytest.approx(peak / 5)  # step 1 of a warm-up of 5
    assert rates[4] == rates[50] == pytest.approx(peak)
    assert rates[89] == pytest.approx(peak * 11 / 20) and rates[99] == pytest.approx(peak / 20)
    # from 1 to 0.1 along half a cosine over the whole run: at its middle (step 50 of 100) 0.55
    settings = {"n_steps": 100, "lr": 1.0, "warmup": 0, "decay": 1, "final_lr": 0.1}
    cosine = run(new_sae(d_sae=64), Stream(), cosine=True, **settings)["lr"].to_numpy()
    assert (
        cosine[0] == pytest.approx(1)
        and cosine[50] == pytest.approx(0.55)
        and cosine[99] == pytest.approx(0.1, abs=1e-3)
    )
    assert cosine[25] == pytest.approx(0.1 + 0.9 * (0.5 + 0.5**1.5))  # cos 45° = 1/√2
    line = run(new_sae(d_sae=64), Stream(), **settings)["lr"].to_numpy()
    assert line[25] == pytest.approx(0.1 + 0.9 * 0.75)


@pytest.mark.parametrize(
    "bad",
    [
        *({"n_steps": value} for value in (0, 1e2, True, "9")),
        *({"lr": value} for value in (-1.0, 0, float("nan"), "1e-3", True)),
        *({"decay": value} for value in (2, "0.2", None)),
        *({"cosine": value} for value in (1, "yes", None)),
        *({"final_lr": value} for value in (-0.1, 1.1, "0", None)),
        *({"clip": value} for value in (0, -1, None, "1")),
        *({"resample": value} for value in (0.5, "0.5", (0.5, "a"), (True,))),
        *({"betas": value} for value in (0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", "b"))),
        *({"warmup": value} for value in (-1, 0.05)),
        *({"seed": value} for value in (-1, 0.5, True)),
        *({"checkpoint_every": value} for value in (0, 0.5)),
        *({"checkpoint": value} for value in (True, 3)),
        *({"bf16": value} for value in (1, "yes")),
        *({"skip_norm_above": value} for value in (1, "5", float("inf"))),
    ],
    ids=str,
)
def test_settings_out_of_range(bad):
    sae, name = new_sae(), next(iter(bad))
    with pytest.raises(ValueError, match=f"^{name}="):
        run(sae, Stream(), **bad)
    assert not sae.initialised


def test_numbers_of_numpy_are_numbers():
    sae = TopKSAE(np.int64(8), np.int32(32), k=np.uint8(4))
    assert type(sae.d_in) is type(sae.k) is int
    torch.manual_seed(0)
    settings = {"n_steps": np.int64(6), "lr": np.float32(0.25), "seed": np.int64(0), "clip": np.float64(1)}
    history = train(new_sae(), Stream(), progress=False, **settings)
    assert history.equals(train(new_sae(), Stream(), n_steps=6, lr=0.25, progress=False))


@pytest.mark.parametrize(
    "cls, bad",
    [
        (FeatureChoiceSAE, {"k": 1, "d_sae": 2}),
        *((TopKSAE, {"k": value}) for value in (True, 4.0, "4", 0, 33)),
        *((MutualChoiceSAE, {"k": value}) for value in (True, 4.0, 0)),
        *((ReluSAE, {"d_in": value}) for value in (0, 8.0, True, None)),
        *((GradientSAE, {"beta": value}) for value in (-1, "1", True, float("inf"))),
        *((JumpReluSAE, {"bandwidth": value}) for value in (0, -1, "0.03", float("nan"))),
        *((GatedSAE, {"tied": value}) for value in (1, "no")),
        *((FeatureChoiceSAE, {"s": 1, "q": value}) for value in (-1, "0", float("nan"))),
        *((FeatureChoiceSAE, {"warmup_tokens": value}) for value in (-1, 0.5)),
    ],
)
def test_arguments_of_the_classes_out_of_range(cls, bad):
    name, value = list(bad.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        cls(**{"d_in": 8, "d_sae": 32} | bad)


@pytest.mark.parametrize(
    "name, objective, bad",
    [
        *(("relu", losses.l1_loss, {"coefficient": value}) for value in (-1, float("nan"), "1")),
        ("gated", losses.gated_loss, {"coefficient": -1}),
        ("relu", losses.l1_loss, {"warmup": 2}),
        *(("jumprelu", losses.jumprelu_loss, {"target_l0": value}) for value in (0, -3, "3")),
        *(("topk", losses.reconstruction_loss, {key: -1}) for key in ("alpha", "k_aux")),
        ("mutual", losses.aux_zipf_loss, {"share": -1}),
        ("gradient", losses.attribution_loss, {"alpha": float("nan")}),
        ("topk", end_to_end.e2e_loss, {"suffix": None, "kl": -1}),
    ],
)
def test_settings_of_objectives_out_of_range(name, objective, bad):
    sae, key = OWN[name][0](16, 64, **OWN[name][1]), list(bad)[-1]
    with pytest.raises(ValueError, match=f"{key}={bad[key]!r}"):
        train(sae, planted(), functools.partial(objective, **bad), n_steps=2, progress=False)
    assert not sae.tokens_since_fired.any()


def test_bf16_is_asked_for_and_close(monkeypatch):
    monkeypatch.setattr(loop, "bf16_is_fast", lambda device: True)
    exact, half = new_sae(), new_sae()
    a, b = run(exact, Stream()), run(half, Stream(), bf16=True)
    assert not same_bits(exact, half) and half.W_enc.dtype == torch.float32
    assert b["fvu"].iloc[-1] == pytest.approx(a["fvu"].iloc[-1], rel=0.1)


def test_bf16_is_said_and_avoided_where_the_hardware_has_none(monkeypatch):
    for what in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{what}_supported", lambda: False)
    bf16_is_fast.cache_clear()
    exact, asked = new_sae(), new_sae()
    try:
        with pytest.warns(UserWarning, match="bf16=True: this cpu has no fast products in bfloat16, so fp32") as found:
            run(asked, Stream(), bf16=True)
    finally:
        bf16_is_fast.cache_clear()
    run(exact, Stream())
    assert same_bits(exact, asked) and len(found) == 1


def test_undertrained():
    import pandas as pd

    falling = pd.DataFrame({"fvu": [1 / (i + 1) for i in range(100)]})
    flat = pd.DataFrame({"fvu": [0.3] * 100})
    assert undertrained(falling) and not undertrained(flat)


OWN = {  # every class with what `train` gives it
    "topk": (TopKSAE, {"k": 4}),
    "gradient": (GradientSAE, {"k": 4}),
    "mutual": (MutualChoiceSAE, {"k": 4}),
    "feature": (FeatureChoiceSAE, {"k": 4}),
    "relu": (ReluSAE, {}),
    "gated": (GatedSAE, {}),
    "jumprelu": (JumpReluSAE, {}),
}


def planted(scale=1.0, n=16):
    """Batches of a planted dictionary, with a gradient, in other units."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(32, 16, generator=g)
    x = [torch.relu(torch.randn(128, 32, generator=g) - 1) @ A + 1 for _ in range(n)]
    return [{"x": scale * part, "grad": torch.randn(part.shape, generator=g) / scale} for part in x]


@pytest.mark.filterwarnings("ignore:coefficient")
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("clip, resample", [(1.0, ()), (1e-2, ()), (1e9, (0.5,))])
def test_the_scale_of_x_plays_no_part(name, clip, resample):
    """x, x/256 and 256 x give the same history; a quarter of the latents is dead, so that AuxK and resampling act."""
    histories = []
    for scale in (1.0, 1 / 256, 256.0):
        torch.manual_seed(0)
        sae = OWN[name][0](16, 64, **OWN[name][1])
        with torch.no_grad():
            (sae.b_gate if name == "gated" else sae.b_enc)[::4] = -1e6 * scale
        settings = {"n_steps": 60, "lr": 2e-3, "clip": clip, "resample": resample, "progress": False}
        histories.append(train(sae, planted(scale), **settings))
        assert sae.x_scale / scale == pytest.approx(1.468, abs=0.01)
    assert histories[0]["dead"].max() > 0.2
    for other in histories[1:]:
        np.testing.assert_allclose(other.to_numpy(), histories[0].to_numpy(), rtol=1e-5)


def with_sinks(scale=5000.0):
    batches = [batch["x"] for batch in planted(n=8)]
    chosen = torch.Generator().manual_seed(1)
    for x in batches:
        x[torch.rand(128, generator=chosen) < 0.02, 3] = scale
    return batches


def test_a_few_tokens_of_high_norm_are_said_measured_apart_and_left_out_on_request(tmp_path):
    clean = torch.cat([batch["x"] for batch in planted(n=8)])
    torch.manual_seed(0)
    sae = TopKSAE(16, 64, k=4)
    with pytest.warns(
        UserWarning, match=r"% of the tokens .* hold 9\d% of its variance.*fvu_ordinary.*skip_norm_above=5"
    ):
        history = train(sae, with_sinks(), n_steps=200, lr=2e-3, progress=False)
    fvu = batch_fvu(clean, sae(clean).x_hat).item()
    assert (
        history["fvu_ordinary"].iloc[-8:].mean() == pytest.approx(fvu, rel=0.15) and fvu > 1.5 * history["fvu"].iloc[-1]
    )
    assert sae.x_scale < 3, "the unit of biases is that of ordinary tokens"

    histories, kept = [], [x[x[:, 3] < 5000] for x in with_sinks()]
    for batches, skip_norm_above in [(with_sinks(), 5), (kept, None)]:
        torch.manual_seed(0)
        histories.append(
            train(TopKSAE(16, 64, k=4), batches, n_steps=60, lr=2e-3, progress=False, skip_norm_above=skip_norm_above)
        )
    histories = [history.drop(columns="tokens") for history in histories]
    assert histories[0].equals(histories[1]), "the same as if these tokens had never been there"
    for bad, match in [
        ({"skip_norm_above": 1.0}, "skip_norm_above=1.0"),
        ({"skip_norm_above": 5}, "Whole rows.*stay whole"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(new_sae(), [torch.randn(4, 6, 8)], **bad)


def test_other_units_than_those_of_the_first_training_are_said():
    sae, batches = new_sae(), [batch["x"] for batch in itertools.islice(Stream(), 4)]
    run(sae, batches)
    with pytest.warns(UserWarning, match=r"x_scale=1.* is from the SAE's first training.* 0.0039 times that"):
        run(sae, [x / 256 for x in batches])


def test_ordinary_activations_are_not_warned_about(recwarn):
    torch.manual_seed(0)
    history = train(TopKSAE(16, 64, k=4), planted(), n_steps=20, progress=False)
    assert not recwarn.list and "fvu_ordinary" not in history


@pytest.mark.filterwarnings("ignore:coefficient")
@pytest.mark.parametrize("name", OWN)
def test_a_batch_without_variance_is_no_catastrophe(name):
    """Among ordinary batches one token repeated counts for little, and what comes after is what it would have been."""
    torch.manual_seed(0)
    batches = planted()
    batches[7] = {key: value[:1].expand(128, 16).clone() for key, value in batches[7].items()}
    with torch.no_grad():
        sae = OWN[name][0](16, 64, **OWN[name][1])
        (sae.b_gate if name == "gated" else sae.b_enc)[::4] = -1e6  # AuxK divides as well
    history = train(sae, batches, n_steps=160, lr=2e-3, progress=False)
    assert history["loss"].max() < 200 and history["fvu"].iloc[-5:].mean() < 0.5


def test_constant_x_and_a_batch_of_one_token_are_refused_by_name():
    with pytest.raises(ValueError, match="the first batch has no variance: all of its 64 tokens are the same"):
        run(new_sae(), [torch.randn(8).expand(64, 8)])
    for batches in ([torch.randn(1, 8)] * 4, [torch.randn(8)] * 4):
        with pytest.raises(ValueError, match="the first batch holds one token"):
            run(new_sae(), batches)
    with pytest.raises(ValueError, match="batch 2 holds one token.*drop_last=True"):
        run(new_sae(), DataLoader(torch.randn(129, 8), batch_size=64))


# ---------------------------------------------------------------------------------------------------------------------
# What is trained, by what
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:coefficient")
@pytest.mark.parametrize("name", OWN)
def test_without_an_objective_a_class_is_trained_by_its_own(name):
    saes, histories = [], []
    own = {"relu": losses.l1_loss, "gated": losses.gated_loss, "jumprelu": losses.jumprelu_loss}
    for objective in (None, own.get(name, losses.reconstruction_loss)):
        torch.manual_seed(0)
        saes.append(OWN[name][0](16, 64, **OWN[name][1]))
        histories.append(train(saes[-1], planted(), objective, n_steps=20, progress=False))
    assert histories[0].equals(histories[1]) and same_bits(*saes)


class OwnForward(ReluSAE):
    """A user's class, sparse by a rule of its own."""

    def forward(self, x, grad=None):
        z = self.pre_activations(x)
        return self.output(x, z.relu() * (z > 1))


@pytest.mark.parametrize(
    "name, objective, match",
    [
        ("topk", losses.gated_loss, "gated_loss does not fit TopKSAE: .*no gate. Use reconstruction_loss"),
        ("relu", losses.reconstruction_loss, "reconstruction_loss does not fit ReluSAE.*sparse. Use l1_loss"),
        ("gated", functools.partial(losses.reconstruction_loss, alpha=0), "does not fit GatedSAE.*Use gated_loss"),
        ("gated", losses.l1_loss, "l1_loss does not fit GatedSAE"),
        ("relu", losses.jumprelu_loss, "jumprelu_loss does not fit ReluSAE"),
        ("jumprelu", losses.attribution_loss, "attribution_loss does not fit JumpReluSAE.*Use jumprelu_loss"),
        ("topk", losses.aux_zipf_loss, "aux_zipf_loss does not fit TopKSAE"),
        ("relu", functools.partial(end_to_end.e2e_loss, suffix=None, local=losses.reconstruction_loss), "does not fit ReluSAE"),
        ("topk", functools.partial(end_to_end.e2e_loss, suffix=None, local=losses.attribution_loss), "with a `distance`"),
    ],
)  # fmt: skip
def test_an_objective_that_does_not_fit_is_refused_before_the_first_step(name, objective, match):
    sae = OWN[name][0](16, 64, **OWN[name][1])
    with pytest.raises(ValueError, match=match):
        train({"a": (sae, objective)}, planted(), n_steps=2, progress=False)
    assert not sae.initialised and not sae.tokens_since_fired.any()


def test_objectives_and_classes_of_users_are_theirs_to_judge():
    def mine(sae, batch):
        return {"loss": losses.reconstruction_loss(sae, batch)["loss"], "number": 1}

    assert train(ReluSAE(16, 64), planted(), mine, n_steps=4, progress=False)["number"].tolist() == [1] * 4
    train(OwnForward(16, 64), planted(), losses.reconstruction_loss, n_steps=2, progress=False)
    with pytest.raises(ValueError, match="gated_loss does not fit OwnForward: its forward gives no 'gate'"):
        train(OwnForward(16, 64), planted(), losses.gated_loss, n_steps=2, progress=False)


def test_a_gradient_sae_without_gradients_is_refused():
    plain = [batch["x"] for batch in planted()]
    for job in (GradientSAE(16, 64, k=4), {"a": GradientSAE(16, 64, k=4)}):
        with pytest.raises(ValueError, match=r"GradientSAE selects by the gradient.*gradients=True"):
            train(job, plain, n_steps=2, progress=False)
    train(GradientSAE(16, 64, k=4, beta=0), plain, n_steps=2, progress=False)
    with pytest.raises(ValueError, match="GradientSAE selects by the gradient, and batch 1 has no 'grad'"):
        train(GradientSAE(16, 64, k=4), [planted()[0], plain[1]], n_steps=2, progress=False)
    histories = []
    for batches in (planted(), [{key: v.numpy() for key, v in batch.items()} for batch in planted()]):
        torch.manual_seed(0)
        histories.append(train(GradientSAE(16, 64, k=4), batches, n_steps=4, progress=False))
    assert histories[0].equals(histories[1])
    huge = [{"x": batch["x"], "grad": 1e36 * batch["grad"]} for batch in planted()]
    with pytest.raises(FloatingPointError, match="grad is too large"):
        train(GradientSAE(16, 64, k=4), huge, n_steps=4, progress=False)


def test_jobs_in_the_forms_people_write_them():
    a, b = new_sae(), new_sae()
    assert run({"a": a, "b": (b, None)}, Stream()).groupby("sae").size().to_dict() == {"a": 60, "b": 60}
    assert same_bits(a, b)
    for jobs, match in [
        ({}, "dictionary {name: sae}"),
        ([new_sae()], "dictionary {name: sae}"),
        (TopKSAE, "dictionary {name: sae}"),
        ({"a": (new_sae(), "loss")}, "'a': .*no job"),
        ({1: new_sae()}, "1: .*no job"),
        ({"a": a, "b": a}, "'b' is an SAE that has another name already"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(jobs, Stream())
    for objective in ("l1_loss", {"loss": 1}):
        with pytest.raises(ValueError, match=f"objective={objective!r}: it has to be a function"):
            run(new_sae(), Stream(), objective)
    for sae in (new_sae().to("meta"), {"a": new_sae(), "b": new_sae().to("meta")}):
        with pytest.raises(ValueError, match="the parameters are on .*meta: put all on one device"):
            run(sae, Stream())


@pytest.mark.parametrize(
    "returned, match",
    [
        (lambda terms: terms["loss"], "returned a Tensor: it has to return a dict of scalars with 'loss'"),
        (lambda terms: {"fvu": terms["fvu"]}, "returned a dict of fvu"),
        (lambda terms: terms | {"each": torch.ones(3)}, r"'each' of the objective has shape \[3\]"),
        (lambda terms: {"loss": terms["loss"].detach()}, "does not depend on the SAE's parameters"),
        (lambda terms: terms | {"note": "text"}, "'note' of the objective has type str"),
    ],
)
def test_what_an_objective_returns_is_checked(returned, match):
    with pytest.raises(ValueError, match=match):
        run(new_sae(), Stream(), lambda sae, batch: returned(reconstruction_loss(sae, batch)))


# ---------------------------------------------------------------------------------------------------------------------
# Activations of one's own
# ---------------------------------------------------------------------------------------------------------------------


def test_activations_in_one_piece_are_shuffled_in_every_form_alike(tmp_path, tiny_gpt2):
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    np.save(tmp_path / "x.npy", x.numpy())
    forms = {
        "tensor": x,
        "bfloat16": x.bfloat16(),
        "array": x.numpy(),
        "float64": x.double().numpy(),
        "memory map": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "its own shuffling": Batches(lambda i: x[i], 500, 64, 0),
    }
    histories = {
        form: run(new_sae(), value, **{} if "own" in form else {"batch_size": 64}) for form, value in forms.items()
    }
    assert all(history.equals(histories["tensor"]) for history in histories.values())
    assert run(new_sae(), x)["tokens"].iloc[0] == 500 and not run(new_sae(), x, batch_size=64, seed=1).equals(
        histories["array"]
    )
    loader = run(new_sae(), DataLoader(TensorDataset(x[:448]), batch_size=64))
    assert loader.equals(run(new_sae(), list(x[:448].split(64))))
    rows = np.random.default_rng(0).integers(0, 300, (8, 16)).astype(np.uint16)
    store = ActivationStore(tiny_gpt2, rows, "blocks.1.hook_resid_pre")
    assert loader.equals(run(new_sae(), [part.numpy() for part in x[:448].split(64)]))
    same = [run(new_sae(d_in=16), batches) for batches in (store, store.batches(120))]
    assert same[0].equals(same[1])
    with pytest.raises(ValueError, match="DataLoader over a store: give the store itself"):
        run(new_sae(d_in=16), DataLoader(store, batch_size=32))


@pytest.mark.parametrize("stop_at", [3, 33])
def test_training_on_an_array_is_resumed(stop_at, tmp_path):
    class Fails(np.ndarray):
        reads = 0

        def __getitem__(self, index):
            Fails.reads += 1
            if Fails.reads > stop_at:
                raise KeyboardInterrupt
            return np.asarray(self)[index]

    x = np.random.default_rng(0).standard_normal((500, 8), dtype=np.float32)
    whole, resumed = new_sae(), new_sae()
    settings = {"batch_size": 64, "checkpoint": tmp_path / "training", "checkpoint_every": 10}
    with pytest.raises(KeyboardInterrupt):
        run(new_sae(), x.view(Fails), **settings)
    assert run(whole, x, batch_size=64).equals(run(resumed, x, **settings)) and same_bits(whole, resumed)


@pytest.mark.parametrize(
    "batches, more, match",
    [
        (torch.randn(50, 7), {}, r"x has shape \[50, 7\]; its last axis has to be d_in=8"),
        (np.ones((50, 8), int), {}, "batches has dtype int64: activations are in floating point"),
        (torch.ones(50, 8, dtype=torch.bool), {}, "batches has dtype torch.bool"),
        (np.random.randn(50), {}, r"ndarray \[50\]: activations .* \[n, d_in\]"),
        (np.random.randn(1, 8), {}, "n at least 2"),
        (np.random.randn(50, 8), {"batch_size": 51}, "batch_size=51: .* from 2 to 50"),
        (np.random.randn(50, 8), {"batch_size": 8.0}, "batch_size=8.0"),
        ([torch.randn(50, 8)], {"batch_size": 8}, "batch_size=8: these batches come as they are"),
        ([torch.ones(50, 8, dtype=torch.long)], {}, r"x of a batch is torch.int64\[50, 8\]"),
        ([(torch.randn(50, 8), torch.randn(50))], {}, "x of a batch is a tuple"),
        ([{"activations": torch.randn(50, 8)}], {}, "its keys are 'activations'"),
        (["ab"], {}, "x of a batch is a str"),
        ("x.npy", {}, "batches is a str"),
        (torch.randn(50, 8).to_sparse(), {}, r"layout torch.sparse_coo: make it dense"),
        ([torch.randn(50, 8).to_sparse()], {}, r"x of a batch is torch.float32\[50, 8\] in the layout"),
        (None, {}, "batches is a NoneType"),
    ],
)
def test_activations_that_cannot_be_trained_on_are_named(batches, more, match):
    with pytest.raises(ValueError, match=match):
        run(new_sae(), batches, **more)


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
