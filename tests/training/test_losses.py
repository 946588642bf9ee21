"""Objectives: values by hand, and where their gradients go."""

import pytest
import torch

from sae_utils import TopKSAE
from sae_utils.training.losses import auxk_loss, batch_fvu, reconstruction_loss


def test_batch_fvu_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])  # mean (1, 2): total variance 1 + 4 + 1 + 4 = 10
    assert batch_fvu(x, x).item() == 0
    assert batch_fvu(x, torch.tensor([[1.0, 2.0], [1.0, 2.0]])).item() == 1
    assert batch_fvu(x, torch.tensor([[0.0, 1.0], [2.0, 2.0]])).item() == pytest.approx((1 + 4) / 10)


def dead_sae():
    """d_in 2; latent 0 reads and writes x₀ and is alive, latents 1 and 2 read and write ±x₁ and are dead; b_dec = (0, 1)."""
    sae = TopKSAE(2, 3, k=1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]]))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
    sae.dead_after = 10
    sae.tokens_since_fired += torch.tensor([0, 10, 10])
    return sae.eval()


X = torch.tensor([[4.0, 3.0], [6.0, 2.0]])


def test_auxk_by_hand():
    sae = dead_sae()
    x_hat = sae(X).x_hat  # latent 0 wins: (4, 1), (6, 1), so e = (0, 2), (0, 1)
    assert x_hat.tolist() == [[4.0, 1.0], [6.0, 1.0]]
    # latent 1 gives z = 2 and 1, which is e exactly; with b_dec counted twice it would not be
    assert auxk_loss(sae, X, x_hat, k_aux=1).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        sae.b_enc[1] -= 1  # now z = 1 and 0: ‖e − ê‖² = 1 + 1, and ‖e − mean e‖² = 0.25 + 0.25
    assert auxk_loss(sae, X, x_hat, k_aux=1).item() == pytest.approx(4)


def test_auxk_gradient_reaches_dead_latents_only():
    sae = dead_sae()
    with torch.no_grad():
        sae.b_enc[1] -= 0.5
    auxk_loss(sae, X, sae(X).x_hat).backward()
    assert sae.W_dec.grad[0].abs().sum() == 0 and sae.W_enc.grad[:, 0].abs().sum() == 0, "the error must be detached"
    assert sae.W_dec.grad[1].abs().sum() > 0 and sae.b_enc.grad[1] != 0


def test_reconstruction_loss_adds_auxk_where_latents_are_dead():
    sae = dead_sae()
    with torch.no_grad():
        sae.b_enc[1] -= 1
    terms = reconstruction_loss(sae, X, alpha=0.5, k_aux=1)
    # FVU: ‖e‖² = 4 + 1 over the variance 1 + 1 + 0.25 + 0.25
    assert terms["fvu"].item() == pytest.approx(2) and terms["auxk"].item() == pytest.approx(4)
    assert terms["loss"].item() == pytest.approx(2 + 0.5 * 4) and terms["l0"].item() == 1
    assert "auxk" not in reconstruction_loss(sae, {"x": X}, alpha=0)
    sae.tokens_since_fired.zero_()
    assert reconstruction_loss(sae, X)["auxk"] == 0
