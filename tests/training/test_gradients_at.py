"""Gradients of the rest of the model, at x and at x̂, and SAEs whose latents they select."""

import functools

import numpy as np
import pytest
import torch

from sae_utils import ActivationStore, GatedSAE, GradientSAE, TopKSAE, train
from sae_utils.activations.hooks import run_prefix, run_spliced, run_with_gradient
from sae_utils.analysis.metrics import kl_divergence
from sae_utils.analysis.swaps import swaps
from sae_utils.training import end_to_end
from sae_utils.training.end_to_end import Suffix, selected_by_gradient
from sae_utils.training.losses import attribution_loss, check_fit, gated_loss, nested_loss

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def setting(tiny_gpt2):
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (2, 10)))
    x = run_prefix(tiny_gpt2, tokens, [HOOK])[HOOK]
    x_hat = x[:, 1:] + 0.5 * torch.randn(x[:, 1:].shape, generator=torch.Generator().manual_seed(0))
    return tiny_gpt2, Suffix(tiny_gpt2, HOOK), {"x": x, "tokens": tokens}, x_hat


def losses(lm, batch, x_hat):
    """KL(orig ‖ new) [rows, n_ctx − 1] and cross-entropy of next tokens [rows, n_ctx − 2], by the whole model."""
    new = run_spliced(lm, batch["tokens"], HOOK, torch.cat([batch["x"][:, :1], x_hat], 1))[:, 1:]
    ce = -new[:, :-1].log_softmax(-1).gather(-1, batch["tokens"][:, 2:, None])[..., 0]
    return kl_divergence(lm(batch["tokens"])[:, 1:], new), ce


@pytest.mark.parametrize("chunk", [2**24, 5 * 300])
def test_gradients_are_autograds_through_the_whole_model(setting, chunk, monkeypatch):
    lm, _, batch, x_hat = setting
    monkeypatch.setattr(end_to_end, "AT_ONCE", chunk)
    suffix = Suffix(lm, HOOK)
    at = x_hat.clone().requires_grad_()
    kl, ce = losses(lm, batch, at)
    for of, loss in (("kl", kl), ("ce", ce)):
        expected = torch.autograd.grad(loss.sum(), at, retain_graph=True)[0]
        torch.testing.assert_close(suffix.gradient(batch, x_hat, of), expected, rtol=1e-3, atol=1e-6)
    known = run_with_gradient(lm, batch["tokens"], [HOOK], HOOK)[1]
    torch.testing.assert_close(suffix.gradient(batch, None, "ce")[:, :-1], known[:, 1:-1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("of", ["kl", "ce"])
def test_a_step_along_a_decoder_row_changes_the_loss_as_the_gradient_says(setting, of):
    lm, suffix, batch, x_hat = setting
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(1)), dim=0)
    step = torch.zeros_like(x_hat)
    step[1, 3] = 0.02 * direction
    with torch.no_grad():
        up, down = (losses(lm, batch, x_hat + s * step)[of == "ce"].double().sum() for s in (1, -1))
    slope = suffix.gradient(batch, x_hat, of)[1, 3] @ direction
    assert slope.item() == pytest.approx(((up - down) / 0.04).item(), rel=0.02, abs=2e-3)


def test_sampled_labels_have_the_kls_gradient_as_mean(setting):
    _, suffix, batch, x_hat = setting
    draws = torch.stack([suffix.gradient(batch, x_hat, "sampled", seed=seed) for seed in range(400)])
    error = draws.mean(0) - suffix.gradient(batch, x_hat, "kl")
    assert (error.abs() < 5 * draws.std(0) / 20 + 1e-6).all() and draws.std(0).min() > 0
    assert torch.equal(draws[3], suffix.gradient(batch, x_hat, "sampled", seed=3))


def test_own_has_the_gradient_of_each_position_alone_as_mean(setting):
    lm, suffix, batch, x_hat = setting
    at = x_hat.clone().requires_grad_()
    kl = losses(lm, batch, at)[0]
    alone = torch.stack(
        [torch.autograd.grad(kl[:, p].sum(), at, retain_graph=True)[0][:, p] for p in range(kl.shape[1])], 1
    )
    draws = torch.stack([suffix.gradient(batch, x_hat, own=True, seed=seed) for seed in range(400)])
    error = draws.mean(0) - alone
    assert (error.abs() < 5 * draws.std(0) / 20 + 1e-5).all()
    whole = suffix.gradient(batch, x_hat)
    assert (alone - whole).abs().max() > 10 * error.abs().max(), "later positions play a part"
    torch.testing.assert_close(
        draws[:, :, -1], whole[:, -1].expand(400, -1, -1), rtol=1e-3, atol=1e-6
    )  # the last has none


@pytest.mark.parametrize(
    "settings", [{}, {"of": "ce", "at": "x"}, {"of": "sampled", "own": True}, {"control": "noise"}], ids=str
)
def test_training_with_gradients_made_in_each_step_is_resumed_bit_for_bit(tiny_gpt2, tmp_path, settings):
    rows = np.random.default_rng(0).integers(0, 300, (40, 10)).astype(np.uint16)
    store, frozen = ActivationStore(tiny_gpt2, rows, HOOK), [p.clone() for p in tiny_gpt2.parameters()]
    objective = functools.partial(selected_by_gradient, suffix=Suffix(tiny_gpt2, HOOK), **settings)

    def trained(**more):
        torch.manual_seed(0)
        sae = GradientSAE(16, 64, k=4, beta=3.0, signed=True)
        train(sae, store.batches(4, 0, whole_rows=True), objective, n_steps=12, lr=1e-2, progress=False, **more)
        return sae

    whole = trained()
    trained(checkpoint=tmp_path / "c", checkpoint_every=5, stop_after=5)
    resumed = trained(checkpoint=tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert whole.gradient_scale > 0 and all(torch.equal(a, b) for a, b in zip(frozen, tiny_gpt2.parameters()))


def test_controls_know_nothing_of_their_token(setting):
    _, suffix, batch, _ = setting
    seen = {}

    def local(sae, batch, distance=None, name=""):
        seen[name] = batch["grad"].flatten(0, 1)
        return {"loss": seen[name].sum()}

    sae = GradientSAE(16, 64, k=4)
    for control in ("", "other tokens", "noise", "mean"):
        selected_by_gradient(sae, batch, suffix=suffix, control=control, local=functools.partial(local, name=control))
    g = seen[""]
    assert torch.equal(seen["other tokens"].sort(0).values, g.sort(0).values) and not torch.equal(
        seen["other tokens"], g
    )
    effects = [(seen[name] @ sae.W_dec.T).abs().mean(1) for name in ("", "noise")]
    torch.testing.assert_close(*effects)
    assert torch.nn.functional.cosine_similarity(seen["noise"], g).abs().mean() < 0.5
    torch.testing.assert_close(seen["mean"], g.mean(0).expand_as(g))


def test_swaps_by_hand(setting):
    """The change of KL of one swap is that of two runs of the whole model, and a small swap is what g · Δ says."""
    lm, suffix, batch, _ = setting
    torch.manual_seed(0)
    sae = TopKSAE(16, 64, k=4).eval()
    found = swaps(sae, suffix, batch, n=40, at_once=7)
    x_hat = sae(batch["x"][:, 1:]).x_hat.detach()
    z = sae.pre_activations(batch["x"][:, 1:]).relu().view(2, 9, 64).detach()
    swap = found.iloc[0]
    row, position = int(swap["row"]), int(swap["position"]) - 1
    order = z[row, position].argsort(descending=True)
    out = next(i for i in order[:4] if z[row, position, i].item() == pytest.approx(swap["size"]))
    into = next(
        i
        for i in order[4:8]
        if (z[row, position, out] - z[row, position, i]).item() == pytest.approx(swap["z"], abs=1e-6)
    )
    delta = z[row, position, into] * sae.W_dec[into] - z[row, position, out] * sae.W_dec[out]
    new = x_hat.clone()
    new[row, position] += delta.detach()
    change = losses(lm, batch, new)[0] - losses(lm, batch, x_hat)[0]
    assert swap["kl"] == pytest.approx(change[row].sum().item(), rel=1e-3, abs=1e-5)
    assert swap["kl_own"] == pytest.approx(change[row, position].item(), rel=1e-3, abs=1e-5)
    e = (batch["x"][:, 1:] - x_hat)[row, position]
    assert swap["error"] == pytest.approx(((e - delta).square().sum() - e.square().sum()).item(), rel=1e-3, abs=1e-5)
    assert swap["step"] == pytest.approx(delta.square().sum().item(), rel=1e-3)
    assert swap["kl at x̂"] == pytest.approx((suffix.gradient(batch, x_hat)[row, position] @ delta).item(), rel=1e-3)
    small = found[found["size"] < found["size"].quantile(0.3)]
    assert np.corrcoef(small["kl"], small["kl at x̂"])[0, 1] > 0.9


def test_every_swap_of_a_token_is_tried_once(setting):
    _, suffix, batch, _ = setting
    torch.manual_seed(0)
    sae = TopKSAE(16, 64, k=3).eval()
    found = swaps(sae, suffix, batch, n=4, every=True)
    assert len(found) == 4 * 9
    z = sae.pre_activations(batch["x"][:, 1:]).relu().view(2, 9, 64).sort(-1, descending=True).values
    for _, token in found.groupby(np.arange(36) // 9):
        top = z[int(token["row"].iloc[0]), int(token["position"].iloc[0]) - 1]
        assert (token[["row", "position", "before"]].nunique() == 1).all()
        expected = (top[:3, None] - top[None, 3:6]).flatten().detach()
        np.testing.assert_allclose(token["z"], expected, rtol=1e-4, atol=1e-6)


def test_a_buffer_that_is_filled_anew_is_another_batch(setting):
    _, suffix, batch, _ = setting
    buffer = {"x": batch["x"].clone(), "tokens": batch["tokens"]}
    first = suffix.clean(buffer)
    assert suffix.clean(buffer) is first
    buffer["x"] *= 0.5
    assert not torch.equal(suffix.clean(buffer).last, first.last)


def test_swaps_are_refused_where_there_are_none(setting):
    _, suffix, batch, _ = setting
    silent = TopKSAE(16, 64, k=4)
    silent.b_enc.data.fill_(-1e3)
    for call, match in (
        (lambda: swaps(GatedSAE(16, 64), suffix, batch), "sae is a GatedSAE: .*TopKSAE"),
        (lambda: swaps(TopKSAE(16, 64, k=40), suffix, batch), "no 40 runners-up"),
        (lambda: swaps(silent, suffix, batch), "no token of these has 8 positive latents"),
        (lambda: swaps(TopKSAE(16, 64, k=4), suffix, batch, at_once=0), "at_once=0"),
        (lambda: suffix.clean(batch["x"]), "whole_rows=True"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_any_objective_that_fits_may_follow_the_selection(setting):
    _, suffix, batch, _ = setting
    sae = GradientSAE(16, 64, k=4)
    nested = functools.partial(nested_loss, prefixes=(16, 64))
    for local in (nested, attribution_loss):
        check_fit(sae, functools.partial(selected_by_gradient, suffix=suffix, local=local))
    with pytest.raises(ValueError, match="gated_loss does not fit GradientSAE"):
        check_fit(sae, functools.partial(selected_by_gradient, suffix=suffix, local=gated_loss))


def test_bad_values_are_refused(setting):
    _, suffix, batch, x_hat = setting
    for call, match in (
        (lambda: suffix.gradient(batch, x_hat, "mse"), "of='mse'.*allowed are 'kl', 'ce', 'sampled'"),
        (lambda: suffix.gradient(batch), "of='kl' at x: .*has no gradient"),
        (lambda: suffix.gradient(batch, batch["x"]), r"at has shape \[2, 10, 16\]: it has to be \[2, 9, 16\]"),
        (lambda: selected_by_gradient(GradientSAE(16, 64), batch, suffix=suffix, at="y"), "at='y'"),
        (lambda: selected_by_gradient(TopKSAE(16, 64), batch, suffix=suffix), "TopKSAE selects without a gradient"),
        (lambda: selected_by_gradient(GradientSAE(16, 64), {"x": batch["x"][0]}, suffix=suffix), "whole_rows=True"),
        (
            lambda: selected_by_gradient(GradientSAE(16, 64), batch, suffix=suffix, control="shuffled"),
            "control='shuffled'",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
