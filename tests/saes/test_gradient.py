"""g-SAE: selection by gradient against its dense form, gradients in the store, objectives by hand."""

import numpy as np
import pytest
import torch

from sae_utils import ActivationStore, GradientSAE, TopKSAE, load_sae, save_sae
from sae_utils.activations.hooks import run_spliced, run_with_gradient, token_loss
from sae_utils.saes.base import scale_of
from sae_utils.training.losses import attribution_loss, gradient_weighted_loss

HOOK, LATER = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"


def dense(sae, x, g):
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    z = z.relu()
    effect = (g @ sae.W_dec.T).abs().detach()
    scale = sae.gradient_scale if sae.gradient_scale else effect[(g != 0).any(1)].mean()
    top = (z * (1 + sae.beta * effect / scale)).topk(sae.k, dim=1).indices
    latents = torch.zeros_like(z).scatter(1, top, z.gather(1, top))
    return latents, latents @ sae.W_dec + sae.b_dec


@pytest.fixture
def made():
    torch.manual_seed(0)
    sae = GradientSAE(12, 100, k=5, beta=2.0).double()
    torch.nn.init.normal_(sae.b_dec)
    torch.nn.init.normal_(sae.b_enc, std=0.1)
    x, g = torch.randn(2, 40, 12, dtype=torch.double)
    g[3] = 0
    return sae, x, g


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_selection_is_that_of_the_dense_form(made, scale):
    sae, x, g = made
    sae.eval().gradient_scale.fill_(scale)
    latents, x_hat = dense(sae, x, g)
    out = sae(x, g * 1.0)
    assert torch.allclose(out.latents, latents) and torch.allclose(out.x_hat, x_hat)
    assert not torch.allclose(out.latents, sae(x).latents)
    assert torch.equal(out.latents[3], sae(x[3:4]).latents[0])  # a masked row
    parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    ours = torch.autograd.grad(out.x_hat.square().sum(), parameters)
    for a, b in zip(ours, torch.autograd.grad(x_hat.square().sum(), parameters)):
        assert torch.allclose(a, b)


def test_small_steps_of_the_workspace_change_nothing(made, monkeypatch):
    sae, x, g = made
    whole = sae.eval()(x, g).latents
    monkeypatch.setattr("sae_utils.sparse.selection.WORKSPACE", 7 * 200)
    assert torch.allclose(sae(x, g).latents, whole)


def test_without_weight_or_gradient_it_is_topk_to_the_bit():
    torch.manual_seed(0)
    topk, x, g = TopKSAE(12, 100, k=5), *torch.randn(2, 40, 12)
    for beta, grad in ((0.0, g), (2.0, None)):
        sae = GradientSAE(12, 100, k=5, beta=beta)
        sae.load_state_dict(topk.state_dict(), strict=False)
        a, b = sae(x, grad), topk(x)
        assert torch.equal(a.values, b.values) and torch.equal(a.indices, b.indices) and torch.equal(a.x_hat, b.x_hat)
        assert torch.equal(sae.encode(x), topk.encode(x))


def test_the_scale_of_gradients_drops_out_and_is_tracked(made):
    sae, x, g = made
    first = sae.eval()(x, g).latents
    assert torch.equal(first, sae(x, 1024 * g).latents)
    sae.train()(x, g)
    mean = (g @ sae.W_dec.T).abs()[(g != 0).any(1)].mean()
    assert torch.isclose(sae.gradient_scale, mean.detach(), rtol=1e-6)
    sae(x, 3 * g)
    assert torch.isclose(sae.gradient_scale, (0.99 * mean + 0.03 * mean).detach(), rtol=1e-6)


def test_saved_and_loaded_it_is_the_same_class(made, tmp_path):
    sae, x, g = made
    sae(x, g)
    loaded = load_sae(save_sae(sae, tmp_path / "gsae"))
    assert type(loaded) is GradientSAE and loaded.arguments == sae.arguments and not loaded.signed
    assert torch.equal(loaded(x, g).x_hat, sae.eval()(x, g).x_hat)


def test_bad_gradients_are_refused(made):
    sae, x, g = made
    with pytest.raises(ValueError, match=r"grad has shape \[12\].*\[40, 12\]"):
        sae(x, g[0])
    with pytest.raises(FloatingPointError, match="NaN"):
        sae(x, g.index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.warns(UserWarning, match="zero for every token"):
        assert torch.equal(sae(x, 0 * g).latents, sae(x).latents)
    with pytest.raises(ValueError, match="beta=-1"):
        GradientSAE(4, 8, 2, beta=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the language model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 299, (7, 6)).astype(np.uint16)


def test_gradient_is_autograds_and_finite_differences(tiny_gpt2, rows):
    tokens = torch.from_numpy(rows.astype(np.int64))
    found, grad = run_with_gradient(tiny_gpt2, tokens, [HOOK, LATER], HOOK)
    assert set(found) == {HOOK, LATER} and (grad[:, 0] == 0).all() and (grad[:, -1] == 0).all()

    def loss(x):
        return token_loss(run_spliced(tiny_gpt2, tokens, HOOK, x), tokens).double().sum()

    x = found[HOOK].clone().requires_grad_()
    assert torch.allclose(grad[:, 1:-1], torch.autograd.grad(loss(x), x)[0][:, 1:-1], atol=1e-6)
    push = torch.zeros_like(grad)
    push[2, 3] = 0.05 * grad[2, 3] / grad[2, 3].norm()
    with torch.no_grad():
        slope = (loss(found[HOOK] + push) - loss(found[HOOK] - push)) / 0.1
    assert slope.item() == pytest.approx(grad[2, 3].norm().item(), rel=0.02)
    alone = run_with_gradient(tiny_gpt2, tokens[2:3], [HOOK], HOOK)[1]
    assert torch.allclose(alone[0], grad[2], atol=1e-6)  # the size of a batch does not matter


def test_store_keeps_gradients_beside_x(tiny_gpt2, rows):
    store = ActivationStore(tiny_gpt2, rows, HOOK, gradients=True, batch_rows=3)
    found, grad = run_with_gradient(tiny_gpt2, torch.from_numpy(rows.astype(np.int64)), [HOOK], HOOK)
    batch = next(iter(store.batches(10, seed=1)))
    assert set(batch) == {"x", "grad", HOOK, "row", "position", "tokens"}
    at = batch["row"], batch["position"]
    assert torch.equal(batch["x"], found[HOOK][at].half().float())
    assert torch.allclose(batch["grad"], grad[at].bfloat16().float(), rtol=2**-7, atol=1e-6)
    assert torch.equal(store.take_rows([2])["grad"][0, 0], torch.zeros(16))
    later = store.batches(10, seed=1).from_step(2)
    assert torch.equal(next(later)["grad"], [b for b, _ in zip(store.batches(10, seed=1), range(3))][2]["grad"])


def test_gradients_are_a_file_of_their_own(tiny_gpt2, rows):
    plain = ActivationStore(tiny_gpt2, rows, HOOK)
    assert "grad" not in plain.take([0]) and len(list(plain.path.iterdir())) == 1
    before = plain.file(HOOK).stat().st_mtime_ns
    both = ActivationStore(tiny_gpt2, rows, HOOK, gradients=True)
    assert both.path == plain.path and len(list(plain.path.glob("*.npy"))) == 2
    assert plain.file(HOOK).stat().st_mtime_ns == before and "grad" in both.take([0])


# ---------------------------------------------------------------------------------------------------------------------
# Objectives
# ---------------------------------------------------------------------------------------------------------------------


def test_objectives_by_hand():
    sae = TopKSAE(2, 1, k=1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
    x, g = torch.tensor([[2.0, 1.0], [4.0, 3.0]]), torch.tensor([[5.0, -2.0], [7.0, 1.0]])
    # error (0, 1), (0, 3); x − mean (−1, −1), (1, 1): FVU 10/4
    a = attribution_loss(sae.eval(), {"x": x, "grad": g}, alpha=0.5)
    assert a["attribution"].item() == pytest.approx((2 + 3) / (5 + 2 + 7 + 1))
    assert a["loss"].item() == pytest.approx(10 / 4 + 0.5 * 5 / 15)
    w = gradient_weighted_loss(sae, {"x": x, "grad": g}, alpha=0.5)
    assert w["weighted"].item() == pytest.approx((4 + 9) / (25 + 4 + 49 + 1))
    assert w["loss"].item() == pytest.approx(2.5 + 0.5 * 13 / 79)
    with pytest.raises(ValueError, match="no 'grad'"):
        attribution_loss(sae, x)


def test_signed_selection_by_hand():
    """Two latents, z = 3 and 2. A unit of the first costs 4 m of loss, of the second nothing: z (z − β σ d·g / m) at β σ = 1."""
    sae = GradientSAE(2, 2, k=1, beta=1.0, signed=True)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2)), sae.W_dec.copy_(torch.eye(2))
        sae.gradient_scale.fill_(1.0), sae.x_scale.fill_(1.0)
    x, g = torch.tensor([[3.0, 2.0]]), torch.tensor([[4.0, 0.0]])
    assert sae.eval()(x, g).latents.tolist() == [[0.0, 2.0]]  # 3 (3 − 4) < 2 · 2
    assert sae(x, g / 4).latents.tolist() == [[3.0, 0.0]]  # 3 (3 − 1) > 2 · 2


def test_signed_selection_is_that_of_the_dense_form(made):
    sae, x, g = made
    signed = GradientSAE(12, 100, k=5, beta=0.7, signed=True).double().eval()
    signed.load_state_dict(sae.state_dict())
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    effect = g @ sae.W_dec.T
    weight = 0.7 * scale_of(x) / effect[(g != 0).any(1)].abs().mean()
    score = (z * (z - weight * effect)).relu()
    expected = torch.zeros_like(z).scatter(1, (top := score.topk(5, dim=1).indices), z.gather(1, top))
    chosen = signed(x, g).latents
    assert torch.allclose(chosen, expected) and not torch.allclose(chosen, sae.eval()(x, g).latents)
    signed.train()(x, g)
    assert torch.isclose(signed.gradient_scale, effect[(g != 0).any(1)].abs().mean().detach(), rtol=1e-6)
    harmful = x @ torch.randn(12, 12).double(), sae.W_dec.sum(0).expand_as(x) * 1e3
    signed.beta = 1e6
    few = signed.eval()(*harmful)
    helps = harmful[1] @ sae.W_dec.T < 0
    assert (few.latents[~helps] == 0).all() and (few.latents > 0).any(), "what has no positive score is not chosen"
    with pytest.raises(ValueError, match="signed=1: it has to be True or False"):
        GradientSAE(12, 100, signed=1)
