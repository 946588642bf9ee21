"""Frozen latents with another decoder: sizes by hand. (Controls of an SAE's error are tested with the error itself.)"""

import pytest
import torch

from sae_utils import ReluSAE
from sae_utils.analysis.controls import rescale
from sae_utils.training.losses import batch_fvu


def test_rescaling_undoes_shrinkage_and_an_offset_by_hand():
    """x = 2, 4, 6 through f = relu(x / 2 − ½) = .5, 1.5, 2.5: x = 2 f + 1, so a = 1 and c = 1."""
    sae = ReluSAE(1, 1)
    with torch.no_grad():
        sae.W_enc.fill_(0.5), sae.b_enc.fill_(-0.5), sae.W_dec.fill_(1)
    x = torch.tensor([[2.0], [4.0], [6.0], [-3.0]])
    out = rescale(sae, x)(x)
    torch.testing.assert_close(out.x_hat[:3], x[:3], atol=0.02, rtol=0)
    assert out.x_hat[3] == 0, "what is off stays off"
    assert out.latents.flatten().tolist() == [0.5, 1.5, 2.5, 0], "latents are those of the SAE, frozen"


def test_rescaling_is_least_squares():
    torch.manual_seed(0)
    sae, x = ReluSAE(8, 24), 1 + torch.randn(4000, 8)
    sae.b_enc.data -= 1
    f = sae.encode(x).double()
    W_dec = sae.W_dec.detach().double()
    design = torch.cat([f[:, :, None] * W_dec, (f > 0)[:, :, None] * W_dec], 1)  # x̂ − x̂ of the SAE is linear in a and c
    error = x - sae.decode(f.float())
    solution = torch.linalg.lstsq(design.transpose(1, 2).flatten(0, 1), error.double().flatten()[:, None]).solution
    best = (error.double().flatten() - design.transpose(1, 2).flatten(0, 1) @ solution[:, 0]).square().sum()
    found = (x - rescale(sae, x)(x).x_hat).square().sum().item()
    assert best.item() <= found * (1 + 1e-6) and found == pytest.approx(best.item(), rel=1e-3)
    assert batch_fvu(x, rescale(sae, x)(x).x_hat) < batch_fvu(x, sae(x).x_hat) - 0.01


def test_rescaling_leaves_a_latent_that_never_fires_and_the_counters():
    torch.manual_seed(0)
    sae, x = ReluSAE(4, 8), torch.randn(500, 4)
    sae.b_enc.data[3] = -100
    counters = sae.tokens_since_fired.fill_(7).clone()
    made = rescale(sae, x)
    assert torch.equal(sae.tokens_since_fired, counters) and sae.training
    only = torch.zeros(8)
    only[3] = 2.0
    torch.testing.assert_close(made.args[1](only), sae.decode(only))
