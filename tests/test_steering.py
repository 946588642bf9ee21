import numpy as np
import pytest
import torch

from sae_utils.lm import run_spliced
from sae_utils.metrics import kl_divergence
from sae_utils.steering import direct_logits, latent_effects

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(1, 300, (3, 10))


@torch.no_grad()
def test_effects_of_a_direction_are_those_of_one_plain_run(tiny_gpt2, rows):
    directions, norm = torch.randn(5, 16), 2.0
    found = latent_effects(tiny_gpt2, rows, HOOK, directions, norm, at_once=1)
    together = latent_effects(tiny_gpt2, rows, HOOK, directions, norm)
    tokens = torch.from_numpy(rows)
    clean = tiny_gpt2(tokens)[:, 1:]
    for i, d in enumerate(directions):
        push = torch.zeros(1, 10, 16)
        push[:, 1:] = norm * d / d.norm()
        new = run_spliced(tiny_gpt2, tokens, HOOK, lambda x: x + push)[:, 1:]
        own = (new.log_softmax(-1) - clean.log_softmax(-1))[..., found["tokens"][i]]
        wanted = {
            "kl": kl_divergence(clean, new).mean(),
            "max_logit": (new - clean).abs().amax(-1).mean(),
            "own_logprob": own.mean(),
        }
        for name, value in wanted.items():
            torch.testing.assert_close(found[name][i], value, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(together[name][i], value, rtol=1e-3, atol=1e-5)


def test_a_direction_of_length_zero_is_an_error(tiny_gpt2, rows):
    with pytest.raises(ValueError, match="direction 1 has length 0"):
        latent_effects(tiny_gpt2, rows, HOOK, torch.eye(2, 16) * torch.tensor([[1.0], [0.0]]), 1.0)


@torch.no_grad()
def test_direct_logits_by_hand(tiny_gpt2, tiny_llama):
    d = torch.randn(4, 16)
    norm, head = tiny_gpt2.ln_final.original_component, tiny_gpt2.unembed.original_component.weight
    centred = d - d.mean(1, keepdim=True)
    wanted = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight @ head.T
    torch.testing.assert_close(direct_logits(tiny_gpt2, d), wanted, rtol=1e-4, atol=1e-4)
    assert direct_logits(tiny_llama, d).shape == (4, 300)
