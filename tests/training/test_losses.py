"""Objectives: values by hand, and where their gradients go."""

import copy
import json
from functools import partial

import pytest
import torch

from sae_utils import GatedSAE, JumpReluSAE, MutualChoiceSAE, ReluSAE, TopKSAE, load_sae, save_sae, train
from sae_utils.training.losses import (
    attribution_loss,
    aux_zipf_loss,
    auxk_loss,
    batch_fvu,
    gated_loss,
    l1_loss,
    nested_loss,
    own_objective,
    reconstruction_loss,
)


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


# ---------------------------------------------------------------------------------------------------------------------
# Nested prefixes
# ---------------------------------------------------------------------------------------------------------------------


def test_nested_by_hand():
    """Latents x₀ and x₁ of one token each way; the first latent alone leaves x₁."""
    sae = ReluSAE(2, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2)), sae.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 3.0], [5.0, 1.0]])  # mean (3, 2): variance 4 + 4 + 1 + 1 = 10
    terms = nested_loss(sae, x, prefixes=(1, 2), local=partial(l1_loss, coefficient=0.0))
    assert terms["fvu_1"].item() == pytest.approx((9 + 1) / 10) and terms["fvu"].item() == 0
    assert terms["loss"].item() == pytest.approx((1.0 + 0) / 2)
    penalised = nested_loss(sae, x, prefixes=(1, 2), local=partial(l1_loss, coefficient=2.0))
    assert penalised["loss"].item() == pytest.approx(0.5 + 2 * terms["l1"].item()), "the penalty counts once"


@pytest.mark.parametrize("make, local", [
    (lambda: TopKSAE(12, 40, k=5), None),
    (lambda: MutualChoiceSAE(12, 40, k=5), aux_zipf_loss),
    (lambda: ReluSAE(12, 40), None),
    (lambda: GatedSAE(12, 40), None),
    (lambda: JumpReluSAE(12, 40), None),
    (lambda: sparse_relu(), None),
])  # fmt: skip
@pytest.mark.parametrize("prefixes", [(40,), (1, 7, 8, 40), [10, 40]])
def test_nested_is_the_dense_form_in_values_and_gradients(make, local, prefixes):
    torch.manual_seed(0)
    sae, x = make(), 1 + torch.randn(100, 12)
    sae.tokens_since_fired[::3] = sae.dead_after  # AuxK counts as well
    sae.x_scale.fill_(1)
    same, dense = copy.deepcopy(sae), local or own_objective(sae)
    terms = nested_loss(sae, x, prefixes=prefixes, local=local)
    whole = dense(same, x)
    latents = same(x).latents
    fvu = lambda m: batch_fvu(x, latents[:, :m] @ same.W_dec[:m] + same.b_dec)  # noqa: E731
    expected = whole["loss"] - whole["fvu"] + sum(fvu(m) for m in prefixes) / len(prefixes)
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["fvu"], whole["fvu"])
    for m in prefixes[:-1]:
        torch.testing.assert_close(terms[f"fvu_{m}"], fvu(m))
    assert not sae._forward_hooks
    found = torch.autograd.grad(terms["loss"], list(sae.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(same.parameters()), allow_unused=True)
    for (name, _), a, b in zip(sae.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def sparse_relu():
    """So few latents are positive that the output is sparse."""
    sae = ReluSAE(12, 40)
    sae.b_enc.data -= 4.5
    assert sae(1 + torch.randn(100, 12)).active is not None
    return sae


@pytest.mark.parametrize(
    "prefixes", [(), (8,), (8, 8, 32), (16, 8, 32), (0, 32), (8, 33), (2.5, 32), (True, 32), 32, None, "32"]
)
def test_prefixes_that_do_not_rise_to_all_latents_are_refused(prefixes):
    with pytest.raises(ValueError, match="prefixes="):
        nested_loss(TopKSAE(8, 32, k=2), torch.randn(50, 8), prefixes=prefixes)


def test_the_local_loss_of_nested_prefixes_has_to_fit():
    x, run = torch.randn(64, 8), partial(train, n_steps=3, progress=False)
    with pytest.raises(ValueError, match="gated_loss does not fit TopKSAE"):
        run(TopKSAE(8, 32, k=2), x, partial(nested_loss, prefixes=(8, 32), local=gated_loss))
    with pytest.raises(ValueError, match="nested_loss needs one with a `distance`"):
        run(TopKSAE(8, 32, k=2), x, partial(nested_loss, prefixes=(8, 32), local=attribution_loss))
    with pytest.warns(UserWarning, match="coefficient=0.0 leaves hardly any latent inactive"):
        local = partial(l1_loss, coefficient=0.0)
        run(ReluSAE(8, 32), x, partial(nested_loss, prefixes=(8, 32), local=local))


def test_nested_training_orders_latents_and_resumes_bit_for_bit(tmp_path):
    """The first latents learn what matters most; the finished SAE is the one interrupted on the way."""
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(4096, 24, generator=generator) < torch.linspace(0.3, 0.02, 24)
    truth = torch.nn.functional.normalize(torch.randn(24, 12, generator=generator), dim=1)
    x = (active * (1 + torch.rand(4096, 24, generator=generator))) @ truth

    def trained(objective, **settings):
        torch.manual_seed(0)
        sae = MutualChoiceSAE(12, 32, k=3)
        return sae, train(sae, x, objective, n_steps=300, lr=0.01, batch_size=256, progress=False, **settings)

    def first(sae):
        return batch_fvu(x, sae.encode(x)[:, :8] @ sae.W_dec[:8] + sae.b_dec).item()

    nested = partial(nested_loss, prefixes=(8, 32))
    plain, (sae, history) = trained(None)[0], trained(nested)
    assert first(sae) < 0.8 * first(plain) and first(sae) == pytest.approx(history["fvu_8"].iloc[-1], abs=0.05)
    trained(nested, checkpoint=tmp_path / "training", stop_after=101)
    again, _ = trained(nested, checkpoint=tmp_path / "training")
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values()))
    save_sae(sae, tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae").encode(x), sae.encode(x))
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "jumprelu"
