"""Architectures: values by hand, counters, refusals."""

import copy
from functools import partial

import pytest
import torch

from sae_utils import ReluSAE, TopKSAE, load_sae, save_sae, train
from sae_utils.training.losses import l1_loss


def by_hand(k=1):
    """d_in 2, 3 latents reading x₀, x₁ and −x₀; b_dec = (1, 0)."""
    sae = TopKSAE(2, 3, k=k)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae.eval()


def test_forward_by_hand():
    out = by_hand(k=1)(torch.tensor([[4.0, 2.0], [1.0, 5.0]]))
    # centred inputs (3, 2) and (0, 5): the largest latents are 0 with value 3 and 1 with value 5
    assert out.latents.tolist() == [[3.0, 0.0, 0.0], [0.0, 5.0, 0.0]]
    assert out.x_hat.tolist() == [[4.0, 0.0], [1.0, 5.0]]
    assert out.values.shape == out.indices.shape == (2, 1)


def test_encode_and_decode_are_the_forward():
    torch.manual_seed(0)
    sae, x = TopKSAE(8, 32, k=4), torch.randn(5, 8)
    f = sae.encode(x)
    assert f.shape == (5, 32) and (f >= 0).all() and not f.requires_grad
    assert sae.training, "encode must leave the mode as it was"
    assert (sae.tokens_since_fired == 0).all(), "encode must not touch the counters"
    torch.testing.assert_close(sae.decode(f), sae.eval()(x).x_hat)


def test_leading_axes_are_kept():
    torch.manual_seed(0)
    sae, x = TopKSAE(8, 32, k=4).eval(), torch.randn(3, 5, 8)
    out = sae(x)
    assert out.x_hat.shape == (3, 5, 8) and out.latents.shape == (3, 5, 32) and out.values.shape == (15, 4)
    torch.testing.assert_close(out.x_hat[1], sae(x[1]).x_hat)


def test_counters_move_in_training_mode_only():
    sae = by_hand(k=1)
    x = torch.tensor([[4.0, 2.0], [1.0, 5.0]])
    sae(x)
    assert sae.tokens_since_fired.tolist() == [0, 0, 0]
    sae.train()
    sae(x)
    assert sae.tokens_since_fired.tolist() == [0, 0, 2]
    sae.dead_after = 2
    assert sae.dead().tolist() == [False, False, True]
    sae(torch.tensor([[1.0, 0.0]]))  # centred to zero: a latent is selected, none fires
    assert sae.tokens_since_fired.tolist() == [1, 1, 3]


def test_decoder_projection_and_norm():
    torch.manual_seed(0)
    sae = TopKSAE(6, 10, k=3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(10))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    sae.W_dec.grad = torch.randn(10, 6)
    sae.project_decoder_gradient()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-6


def test_copies_and_moves_keep_the_memory_layout():
    sae = TopKSAE(6, 10, k=3)
    for other in (sae, copy.deepcopy(sae), TopKSAE(6, 10, k=3).double()):
        assert other.W_enc.shape == (6, 10) and other.W_enc.T.is_contiguous()


@pytest.mark.parametrize("k", [0, 33, 2.5, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=r"k=.* from 1 to 32"):
        TopKSAE(8, 32, k=k)


def test_wrong_width_and_wrong_sizes():
    with pytest.raises(ValueError, match=r"\[4, 7\].*d_in=8"):
        TopKSAE(8, 32, k=4)(torch.randn(4, 7))
    with pytest.raises(ValueError, match="d_sae=0"):
        TopKSAE(8, 0)


def test_recovers_a_planted_dictionary():
    """Sparse sums of known directions: almost every direction is found, cosine > 0.9."""
    generator = torch.Generator().manual_seed(7)
    truth = torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=1)

    def batches():
        while True:
            chosen = torch.rand(1024, 48, generator=generator).topk(3, dim=1).indices
            strength = 0.5 + torch.rand(1024, 3, generator=generator)
            yield torch.zeros(1024, 48).scatter(1, chosen, strength) @ truth

    torch.manual_seed(0)
    sae = TopKSAE(32, 64, k=3)
    history = train(sae, batches(), n_steps=1500, lr=3e-3, progress=False)
    best = (truth @ sae.W_dec.T).max(dim=1).values
    assert (best > 0.9).float().mean() > 0.9, f"only {(best > 0.9).float().mean():.0%} of the directions were found"
    assert history["fvu"].iloc[-1] < 0.15


def test_a_decoder_of_free_norm_is_one_normalised_inside_the_forward(tmp_path):
    """60 steps of Adam on V with W_dec = V / ‖V‖ in a forward of its own give the same SAE."""
    torch.manual_seed(0)
    x = torch.randn(60, 64, 8)
    sae = ReluSAE(8, 24, free_norm=True)
    b_dec = x[0].mean(0)
    W, b, V, c = (p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, b_dec))
    settings = {"lr": 1e-2, "n_steps": 60, "warmup": 0, "decay": 0, "clip": 1e9, "progress": False}
    objective = partial(l1_loss, coefficient=0.5, warmup=0)
    train(sae, list(x), objective, **settings)
    scale = sae.x_scale.item()
    adam = torch.optim.Adam([{"params": [W, V]}, {"params": [b, c], "lr": 1e-2 * scale}], lr=1e-2)
    for batch in x:
        D = V / V.norm(dim=1, keepdim=True)
        f = ((batch - c) @ W + b).relu()
        sigma = (batch - batch.mean(0)).square().sum(1).mean()
        loss = (batch - f @ D - c).square().sum(1).mean() / sigma + 0.5 * f.sum(1).mean() / sigma.sqrt()
        adam.zero_grad()
        loss.backward()
        for bias in (b, c):
            bias.grad *= scale
        adam.step()
    norm = V.detach().norm(dim=1)
    torch.testing.assert_close(sae.decoder_norm, norm, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.detach(), V.detach() / norm[:, None], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(sae.W_enc.detach(), W.detach(), rtol=1e-2, atol=1e-3)
    assert (norm - 1).abs().max() > 0.1 and not ReluSAE(8, 24).state_dict().keys() & {"decoder_norm"}
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    assert loaded.free_norm and torch.equal(loaded.decoder_norm, sae.decoder_norm)
    torch.manual_seed(0)
    plain = ReluSAE(8, 24)
    train(plain, list(x), objective, **settings)
    assert not torch.allclose(plain.W_dec, sae.W_dec, atol=1e-3), "the norm plays a part"
    with pytest.raises(ValueError, match="free_norm='yes': it has to be True or False"):
        ReluSAE(8, 24, free_norm="yes")
