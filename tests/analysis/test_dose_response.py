import numpy as np
import pytest
import torch

from sae_utils.analysis.dose_response import (
    dose_response,
    interval,
    next_token,
    summary,
    useful,
    useful_range,
    verdict,
    with_targets,
)
from sae_utils.analysis.steering import Add, direct_logits, effects, generate, generation_nats, scaled

HOOK = "blocks.1.hook_resid_pre"
LOG_2 = np.log(2)


def test_useful_range_by_hand():
    # perplexity doubles (0.693 nats) halfway between strengths 1 and 2, where the effect is 3
    nats = [1.0, 1.0 + LOG_2 / 2, 1.0 + 1.5 * LOG_2]
    assert useful_range([0, 1, 2], [0, 2, 4], nats) == pytest.approx((3, 1.5))
    assert useful_range([0, 1, 2], [0, 2, 1], [1, 1, 1]) == (2, 2), "it never breaks: the largest effect"
    assert useful_range([0, 1, 2], [0, 2, 1], nats)[0] == 2, "the effect falls before"
    assert useful_range([0, 1, 2], [0, -1, 2], [1.0, 2.0, 1.0]) == pytest.approx((0, LOG_2)), "the first time counts"


@pytest.mark.parametrize("strengths", [[1, 2, 3], [0, 2, 1], [0, 1]])
def test_strengths_that_do_not_rise_from_zero_are_named(strengths):
    with pytest.raises(ValueError, match="strengths=.*they have to rise from 0"):
        useful_range(strengths, [0, 1, 2], [1, 2, 3])


def of(effect, nats, n_directions=3, n_contexts=4):
    """Curves that are the same for all directions and contexts."""
    shape = (len(effect), n_directions, n_contexts)
    return {
        "strengths": np.arange(len(effect)),
        "writes": np.broadcast_to(np.array(effect, float)[:, None, None], shape),
        "nats": np.broadcast_to(np.array(nats, float)[:, None, None], shape),
    }


def test_curves_without_noise_have_intervals_without_width():
    one, other = of([0, 2, 4], [1, 1 + LOG_2 / 2, 1 + 1.5 * LOG_2]), of([0, 1, 1], [1, 1, 1], n_directions=5)
    assert useful(one, "writes") == pytest.approx((3, 1.5))
    assert summary(one, "writes") == pytest.approx({"useful": 3, "low": 3, "high": 3, "breaks at": 1.5})
    assert verdict(one, other, "writes")["verdict"] == "more" and verdict(other, one, "writes")["verdict"] == "less"
    assert verdict(one, other, "writes")["difference"] == pytest.approx(2)
    assert verdict(one, one, "writes") == {"difference": 0, "low": 0, "high": 0, "verdict": "undecided"}


def test_luck_that_two_sets_share_cancels_in_their_difference():
    random = np.random.default_rng(0)
    one, contexts, latents = of([0, 1, 2], [1, 1, 1]), random.normal(size=(3, 1, 4)), random.normal(size=(3, 3, 1))
    by_context, by_latent = one | {"writes": one["writes"] + contexts}, one | {"writes": one["writes"] + latents}
    more = {name: curves | {"writes": curves["writes"] + 0.1} for name, curves in vars().items() if name[:3] == "by_"}
    for same_latents in (False, True):
        found = verdict(more["by_context"], by_context, "writes", same_latents=same_latents)
        assert found["low"] == pytest.approx(0.1) and found["high"] == pytest.approx(0.1)
        found = verdict(more["by_latent"], by_latent, "writes", same_latents=same_latents)
        assert found["difference"] == pytest.approx(0.1)
        assert (found["high"] - found["low"] < 1e-9) == same_latents
    apart = verdict(more["by_context"], by_context, "writes", shared=False)
    assert apart["low"] == pytest.approx(0.1), "contexts that are not shared are not drawn again"
    assert interval(np.arange(101)) == {"low": 2.5, "high": 97.5}


@torch.no_grad()
def test_own_contexts_and_targets_by_hand(tiny_gpt2):
    windows = torch.from_numpy(np.random.default_rng(0).integers(1, 300, (6, 5)))
    p = tiny_gpt2(windows)[:, -1].softmax(-1)
    torch.testing.assert_close(next_token(tiny_gpt2, windows, batch_rows=4), p.mean(0))
    torch.testing.assert_close(next_token(tiny_gpt2, windows.view(2, 3, 5)), p.view(2, 3, -1).mean(1))
    directions, strength = torch.randn(2, 16), torch.tensor([[0.0, 9], [5, 1], [1, 2], [7, 0], [2, 8], [6, 3]])
    found = with_targets(tiny_gpt2, directions, windows, strength, p.mean(0), n_own=3)
    for i, own in enumerate(([3, 5, 1], [0, 4, 5])):
        assert torch.equal(found["own"][i], windows[own])
        assert torch.equal(found["follows"][i], (p[own].mean(0) - p.mean(0)).topk(10).indices)
    assert torch.equal(found["writes"], direct_logits(tiny_gpt2, directions).topk(10).indices)


def test_a_dose_is_what_steering_does_at_one_strength(tiny_gpt2):
    contexts = torch.from_numpy(np.random.default_rng(0).integers(1, 300, (4, 6)))
    directions, strengths = torch.randn(3, 16), [0.0, 0.5]
    targets = {"writes": torch.tensor([[1], [2], [3]]), "follows": torch.tensor([[4], [5], [6]])}
    more = dict(scale=8.0, n_new=2, n_texts=2, seed=1)
    found = dose_response(tiny_gpt2, HOOK, directions, contexts, targets, strengths, **more)
    assert found["strengths"].tolist() == strengths and found["writes"].shape == (2, 3, 4)
    edit = Add(scaled(directions, 4.0))
    wanted = effects(tiny_gpt2, contexts, HOOK, edit, targets["follows"], at=[5], each_context=True)
    torch.testing.assert_close(torch.tensor(found["follows"][1]), wanted["target_logprob"], rtol=1e-4, atol=1e-4)
    assert np.abs(found["writes"][0]).max() < 1e-4 and found["norm"][1].ravel() == pytest.approx([4, 4, 4])
    prompts = contexts[torch.tensor([[0, 1], [2, 3], [0, 1]])]  # each direction takes the next two
    texts = generate(tiny_gpt2, prompts, 2, HOOK, edit, seed=1)
    assert found["nats"][1] == pytest.approx(generation_nats(tiny_gpt2, texts, 6).numpy(), rel=1e-4)
    own = torch.stack([contexts, contexts + 1, contexts + 2])
    found = dose_response(tiny_gpt2, HOOK, directions, own, targets, strengths, **more)
    texts = generate(tiny_gpt2, own[:, :2], 2, HOOK, edit, seed=1)
    assert found["nats"][1] == pytest.approx(generation_nats(tiny_gpt2, texts, 6).numpy(), rel=1e-4)
