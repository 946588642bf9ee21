"""Resampling of dead latents, and the warnings when an L1 coefficient kills every latent or none."""

import functools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from sae_utils import GatedSAE, ReluSAE, TopKSAE, train
from sae_utils.training.loop import on_coefficient, schedule
from sae_utils.training.losses import gated_loss, jumprelu_loss, l1_loss
from sae_utils.training.optimizer import Optimizer, resample_dead

CASES = {
    "relu": (ReluSAE, functools.partial(l1_loss, coefficient=0.2)),
    "gated": (GatedSAE, functools.partial(gated_loss, coefficient=0.5)),
}
N_FEATURES = 40
DEAD = list(range(1, 16, 2))


class Stream:
    """Two of 40 planted directions a token; at step `stop_at` it raises, as if the process were killed."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        directions = torch.randn(N_FEATURES, 12, generator=torch.Generator().manual_seed(9))
        self.truth = torch.nn.functional.normalize(directions, dim=1)

    def from_step(self, step):
        while step != self.stop_at:
            generator = torch.Generator().manual_seed(step)
            chosen = torch.rand(128, N_FEATURES, generator=generator).topk(2, dim=1).indices
            size = 1 + torch.rand(128, 2, generator=generator)
            yield torch.zeros(128, N_FEATURES).scatter(1, chosen, size) @ self.truth
            step += 1
        raise KeyboardInterrupt

    def __iter__(self):
        return self.from_step(0)


def new_sae(name):
    """32 latents, of which eight can never fire: dead from the start."""
    torch.manual_seed(0)
    sae = CASES[name][0](12, 32)
    with torch.no_grad():
        (sae.b_gate if name == "gated" else sae.b_enc)[DEAD] = -1e6
    return sae


run = functools.partial(train, n_steps=400, lr=1e-2, progress=False)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_dead_latents_come_back_and_find_features(name):
    without, resampled = new_sae(name), new_sae(name)
    before = run(without, Stream(), CASES[name][1], n_steps=800)
    after = run(resampled, Stream(), CASES[name][1], n_steps=800, resample=(0.2,))
    assert without.dead()[DEAD].all() and after["dead"].iloc[35] == 0.25 and after["dead"].iloc[-1] == 0
    assert (resampled.encode(next(iter(Stream())))[:, DEAD] > 0).any(0).all()
    nearest = (resampled.W_dec[DEAD] @ Stream().truth.T).amax(1)
    assert nearest.median() > 0.9, f"latents that came back should write planted directions: cosines {nearest}"
    assert after["fvu"].iloc[-1] < before["fvu"].iloc[-1]
    assert before.iloc[:40].equals(after.iloc[:40]), "nothing may happen before the step asked for"


@pytest.mark.parametrize(
    "name, more",
    [
        ("relu", {}),
        ("relu", {"free_norm": True}),
        ("gated", {}),
        ("gated", {"tied": False}),
        ("gated", {"rescale": False}),
    ],
)
def test_what_one_resampling_does(name, more):
    """Latent 1 is dead. One input is not reconstructed, 4 × the fourth axis; the others are 0, and so is what comes out."""
    torch.manual_seed(0)
    sae = CASES[name][0](12, 32, **more)
    sae.dead_after, sae.tokens_since_fired[1] = 10, 10
    optimizer = Optimizer(sae, (0.9, 0.999))
    loss = sum((p * torch.rand_like(p)).sum() for p in sae.parameters())
    optimizer.update(loss, lr=0.0, x_scale=1.0, clip=1e9)  # the moments are there, the parameters where they were

    def state_of(key):
        state = optimizer.adam.state[optimizer.leaves[key]]
        return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}

    def by_latent():
        """Everything that belongs to latents, [32, …], parameters and moments."""
        for key, p in sae.named_parameters():
            moments = {kind: m.T if m.shape != p.shape else m for kind, m in state_of(key).items()}
            for kind, tensor in {"": p, **moments}.items():
                if key != "b_dec":
                    yield key, kind, (tensor if key == "W_dec" else tensor.movedim(-1, 0)).detach().clone()

    with torch.no_grad():
        sae.W_enc *= 3
    if more == {"free_norm": True}:
        sae.decoder_norm += 1
    before, axis = list(by_latent()), torch.eye(12)[3]
    x = torch.zeros(6, 12)
    x[2] = 4 * axis
    resample_dead(sae, x, optimizer, torch.Generator().manual_seed(0))
    live = torch.arange(32) != 1
    for (key, kind, old), (_, _, new) in zip(before, by_latent(), strict=True):
        assert torch.equal(old[live], new[live]), f"{key} {kind} of a live latent has changed"
        norm = {"W_dec": 1.0, "W_enc": 0.2 * 3, "W_mag": 0.2}.get(key, 0) if not kind else 0
        torch.testing.assert_close(new[1], norm * axis if old.ndim == 2 else torch.tensor(0.0))
        assert kind != "exp_avg" or (old[1] != 0).any(), "or the test says nothing"
    assert (sae.b_dec == 0).all() and sae.tokens_since_fired[1] == 0
    if more == {"free_norm": True}:
        torch.testing.assert_close(sae.decoder_norm, torch.where(live, 2.0, 1.0))
    after = list(by_latent())
    resample_dead(sae, x, optimizer, torch.Generator())
    assert all(torch.equal(a, b) for (*_, a), (*_, b) in zip(after, by_latent())), "with none dead nothing happens"


@pytest.mark.parametrize("shape", [(12,), (), (40, 3)])
def test_parameters_of_a_subclass_are_left_alone(shape):
    class Own(TopKSAE):
        def __init__(self):
            super().__init__(12, 12, k=1)
            self.gain = torch.nn.Parameter(torch.ones(shape), requires_grad=False)

    torch.manual_seed(0)
    sae = Own()
    sae.tokens_since_fired[::2] = sae.dead_after
    resample_dead(sae, torch.randn(50, 12), Optimizer(sae, (0.9, 0.999)), torch.Generator())
    assert (sae.gain == 1).all() and not sae.dead().any()


def test_more_dead_than_inputs_and_nothing_alive():
    torch.manual_seed(0)
    sae = ReluSAE(12, 32)
    sae.dead_after = 0  # all are dead
    before = sae.W_dec.detach().clone()
    resample_dead(sae, torch.randn(5, 12), Optimizer(sae, (0.9, 0.999)), torch.Generator())
    changed = (sae.W_dec != before).any(1)
    assert changed.tolist() == [True] * 5 + [False] * 27, "each input starts one latent at most"
    torch.testing.assert_close(sae.W_enc[:, :5].norm(dim=0), torch.full((5,), 0.2))


@pytest.mark.parametrize("stop_at", [120, 121, 250])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_at):
    """Two SAEs on one stream, resampled twice; stopped at the first, after it, and after both."""
    job = lambda: {name: (new_sae(name), loss) for name, (_, loss) in CASES.items()}  # noqa: E731
    whole, part, resumed, alone = job(), job(), job(), new_sae("gated")
    again = functools.partial(run, resample=(0.3, 0.6), checkpoint_every=20)
    history = again(whole, Stream())
    with pytest.raises(KeyboardInterrupt):
        again(part, Stream(stop_at), checkpoint=tmp_path / "training")
    assert history.equals(again(resumed, Stream(), checkpoint=tmp_path / "training"))
    assert all(same_bits(whole[name][0], resumed[name][0]) for name in CASES)
    again(alone, Stream(), CASES["gated"][1])
    assert same_bits(alone, whole["gated"][0]), "another SAE on the stream must not matter"
    with pytest.raises(ValueError, match="another training"):
        run(job(), Stream(), checkpoint=tmp_path / "training", resample=(0.3,))


def test_the_learning_rate_after_a_resampling():
    def recovery(step, resample):  # 80 steps: it takes 4 of them
        asked = SimpleNamespace(n_steps=80, warmup=0, decay=0, cosine=False, final_lr=0.0, resample=resample)
        return schedule(step, asked)

    assert [recovery(step, [10]) for step in (9, 10, 14)] == pytest.approx([1, 0.1, 1])
    assert recovery(12, [10]) == pytest.approx(0.55)  # half way up half a cosine
    assert recovery(11, [10]) == pytest.approx(0.1 + 0.9 * (1 - math.cos(math.pi / 4)) / 2)
    assert recovery(20, [10, 18]) == pytest.approx(0.55) and recovery(5, []) == 1
    history = run(new_sae("relu"), Stream(), CASES["relu"][1], n_steps=200, resample=(0.5,))  # 10 steps to come back
    assert history["lr"].iloc[[99, 100, 105, 110]].to_list() == pytest.approx([1e-2, 1e-3, 0.55e-2, 1e-2])


@pytest.mark.parametrize("shares", [(0.0,), (0.5, 1.0), (1.5,)])
def test_shares_out_of_range(shares):
    with pytest.raises(ValueError, match="resample=.*between 0 and 1"):
        run(new_sae("relu"), Stream(), resample=shares)


# ---------------------------------------------------------------------------------------------------------------------
# Coefficients far off
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, loss", [("relu", l1_loss), ("gated", gated_loss)])
def test_a_coefficient_far_off_is_said_with_the_way_to_move_it(name, loss):
    with pytest.warns(UserWarning, match=r"coefficient=50\.0 leaves almost no latent active .*lower it"):
        run(new_sae(name), Stream(), functools.partial(loss, coefficient=50.0))
    message = r"'b': coefficient=0\.0 leaves hardly any latent inactive .*of 64.*raise it"
    with pytest.warns(UserWarning, match=message) as found:
        torch.manual_seed(0)
        losses = {"a": functools.partial(loss, coefficient=0.5), "b": functools.partial(loss, coefficient=0.0)}
        run({key: (CASES[name][0](12, 64), losses[key]) for key in "ab"}, Stream())
    assert len(found) == 1, "the other SAE's coefficient is fine"


def test_a_good_coefficient_is_not_said_anything_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (_, loss) in CASES.items():
            run(new_sae(name), Stream(), loss)


def test_only_objectives_with_a_coefficient_are_judged():
    wide, narrow = ReluSAE(12, 64), ReluSAE(12, 16)
    assert on_coefficient(wide, lambda sae, batch: {}, 0.0) == ""
    assert on_coefficient(wide, functools.partial(jumprelu_loss, target_l0=3), 0.0) == ""
    assert "coefficient=0.01" in on_coefficient(wide, jumprelu_loss, 0.0)
    assert [on_coefficient(wide, l1_loss, l0) for l0 in (12.0, 0.1, None)] == ["", "", ""]
    assert "raise" in on_coefficient(wide, l1_loss, 12.1) and "raise" in on_coefficient(narrow, l1_loss, 8.1)
