"""Every metric with a value worked by hand."""

import math

import numpy as np
import pytest
import torch

from sae_utils import FeatureChoiceSAE, TopKSAE, evaluate
from sae_utils.activations.hooks import run_prefix
from sae_utils.analysis.controls import PrincipalComponents
from sae_utils.analysis.metrics import (
    ReconstructionSums,
    alive_latents,
    ce_recovered,
    evaluate_downstream,
    kl_divergence,
)
from sae_utils.analysis.pursuit import with_pursuit
from sae_utils.saes.base import SAEOutput, typical


def sums(x, x_hat, latents=None, chunk=None):
    total = ReconstructionSums()
    latents = torch.zeros(len(x), 1) if latents is None else latents
    for part in zip(*(t.split(chunk or len(x)) for t in (x, x_hat, latents))):
        total.add(*part[:2], (part[2] > 0).sum(0))
    return total.result()


def test_gamma_of_half_is_half():
    assert sums(torch.tensor([[1.0]]), torch.tensor([[0.5]]))["gamma"] == 0.5


def test_gamma_is_a_ratio_of_sums_and_both_forms_agree():
    x, x_hat = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]])
    result = sums(x, x_hat)
    assert result["gamma"] == (1 + 1) / (1 + 3)  # a mean of ratios would be 2/3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator) + 2
    x_hat = 0.7 * x + 0.2 * torch.randn(50, 3, generator=generator)
    hh, xx, ee = (t.square().sum().item() for t in (x_hat, x, x - x_hat))
    assert sums(x, x_hat)["gamma"] == pytest.approx(2 * hh / (hh + xx - ee), rel=1e-5)
    centred = sums(x - x.mean(0), x_hat - x_hat.mean(0))["gamma"]
    assert sums(x, x_hat)["gamma_centred"] == pytest.approx(centred, rel=1e-4)


def test_a_large_mean_hides_shrinkage_from_plain_gamma():
    x = torch.tensor([[10.0], [12.0]])
    shrunk = torch.tensor([[10.5], [11.5]])  # half the variation kept
    result = sums(x, shrunk)
    assert result["gamma"] > 0.99 and result["gamma_centred"] == pytest.approx(0.5)


def test_fvu_l0_density_and_dead_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    x_hat = torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    latents = torch.tensor([[1.0, 0.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    result = sums(x, x_hat, latents)
    assert result["fvu"] == pytest.approx(0.5)  # (1 + 4) / 10
    assert result["l0"] == 1.5 and result["dead_fraction"] == 0.5


def test_sums_do_not_depend_on_the_chunks():
    generator = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(100, 4, generator=generator), torch.randn(100, 4, generator=generator)
    assert sums(x, x_hat, chunk=7) == pytest.approx(sums(x, x_hat), rel=1e-10)


def test_kl_has_a_direction():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(forward, rel=1e-5)
    assert kl_divergence(q.log(), p.log()).item() != pytest.approx(forward, rel=1e-2)


def test_ce_recovered_by_hand():
    assert ce_recovered(2.5, 2.0, 4.0) == 0.75
    assert ce_recovered(2.0, 2.0, 4.0) == 1 and ce_recovered(4.0, 2.0, 4.0) == 0
    assert math.isnan(ce_recovered(2.0, 2.0, 2.0))


HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 100, (6, 16)).astype(np.uint16)


def constant(vector):
    return lambda x: SAEOutput(vector.expand_as(x), dense=torch.zeros(x.shape[:-1].numel(), 1))


def test_evaluate_at_its_fixed_points(tiny_gpt2, rows):
    """Identity recovers all, zero and mean recover nothing, and the mean's FVU is 1."""
    from sae_utils.activations.hooks import run_prefix, token_loss

    x = run_prefix(tiny_gpt2, torch.from_numpy(rows.astype("int64")), [HOOK])[HOOK]
    identity = lambda x: SAEOutput(x, dense=torch.ones(x.shape[:-1].numel(), 3))  # noqa: E731
    results = evaluate(
        {"identity": identity, "zero": constant(torch.zeros(x.shape[-1])), "mean": constant(x[:, 1:].mean((0, 1)))},
        tiny_gpt2, rows, HOOK, batch_rows=4,
    )  # fmt: skip
    assert results["identity"]["ce_recovered_mean"] == pytest.approx(1) == results["identity"]["ce_recovered_zero"]
    assert results["identity"]["kl"] == pytest.approx(0, abs=1e-6) and results["identity"]["fvu"] == 0
    assert results["identity"]["l0"] == 3 and results["identity"]["dead_fraction"] == 0
    assert results["zero"]["ce_recovered_zero"] == pytest.approx(0, abs=1e-6)
    assert results["mean"]["ce_recovered_mean"] == pytest.approx(0, abs=1e-4)
    assert results["mean"]["fvu"] == pytest.approx(1, rel=1e-5) and results["mean"]["kl"] > 0
    tokens = torch.from_numpy(rows.astype("int64"))
    clean = token_loss(tiny_gpt2(tokens), tokens)[:, 1:].mean().item()
    assert results["zero"]["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert results["zero"]["ce_increase"] == pytest.approx(results["zero"]["ce_zero"] - clean, rel=1e-4)


def test_position_0_is_left_clean(tiny_gpt2, rows):
    """Predictions at position 0 cannot change, so an SAE that only ruins position 0 changes nothing."""
    seen = []

    def spy(x):
        seen.append(x.shape[1])
        return SAEOutput(x, dense=torch.ones(x.shape[:-1].numel(), 1))

    evaluate(spy, tiny_gpt2, rows, HOOK)
    assert set(seen) == {15}


def test_one_sae_several_and_densities(tiny_gpt2, rows):
    torch.manual_seed(0)
    sae = TopKSAE(tiny_gpt2.cfg.d_model, 64, k=4).eval()
    densities = {}
    one = evaluate(sae, tiny_gpt2, rows, HOOK, densities=densities)
    assert one == evaluate({"a": sae}, tiny_gpt2, rows, HOOK)["a"]
    assert densities[""].sum().item() == pytest.approx(one["l0"], rel=1e-6)
    assert one["dead_fraction"] == (densities[""] == 0).float().mean().item()


def test_downstream_error_and_norm_ratios_at_their_fixed_points(tiny_gpt2, rows):
    """x itself has no error anywhere; the mean has FVU 1 at the hook; half of x has a quarter of its square and norm ratio ½."""
    from sae_utils.activations.hooks import run_prefix

    tokens = torch.from_numpy(rows.astype("int64"))
    x = run_prefix(tiny_gpt2, tokens, [HOOK])[HOOK]
    results = evaluate_downstream(
        {
            "identity": lambda x: SAEOutput(x),
            "mean": constant(x[:, 1:].mean((0, 1))),
            "half": lambda x: SAEOutput(torch.cat([3 * x[:, :1], 0.5 * x[:, 1:]], 1)),  # position 0 is not spliced in
        },
        tiny_gpt2, rows, HOOK, batch_rows=4,
    )  # fmt: skip
    hooks = [HOOK, "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
    assert all(list(result["downstream_fvu"]) == hooks for result in results.values())
    assert results["identity"]["downstream_fvu"] == pytest.approx(dict.fromkeys(hooks, 0), abs=1e-10)
    assert results["identity"]["norm_ratio"] == pytest.approx(1) == results["identity"]["norm_ratio_first"]
    assert results["mean"]["downstream_fvu"][HOOK] == pytest.approx(1, rel=1e-5)
    assert results["half"]["norm_ratio"] == pytest.approx(0.5) and results["half"]["norm_ratio_first"] == pytest.approx(
        3
    )
    kept = x[:, 1:].flatten(0, 1)
    quarter = (0.25 * kept.square().sum() / (kept - kept.mean(0)).square().sum()).item()
    assert results["half"]["downstream_fvu"][HOOK] == pytest.approx(quarter, rel=1e-4)


def test_downstream_error_against_hugging_face_by_hand(tiny_gpt2, rows):
    """At the later layer: run the second layer ourselves on x and on the zeros that an SAE of nothing gives."""
    from sae_utils.activations.hooks import run_prefix

    tokens = torch.from_numpy(rows.astype("int64"))
    x = run_prefix(tiny_gpt2, tokens, [HOOK])[HOOK]
    layer = tiny_gpt2.original_model.transformer.h[1]
    with torch.no_grad():
        clean, new = (
            layer(h)[:, 1:] if torch.is_tensor(layer(h)) else layer(h)[0][:, 1:] for h in (x, spliced_zero(x))
        )
    fvu = ((clean - new).square().sum() / (clean - clean.mean((0, 1))).square().sum()).item()
    result = evaluate_downstream(constant(torch.zeros(x.shape[-1])), tiny_gpt2, rows, HOOK)
    assert result["downstream_fvu"]["blocks.2.hook_resid_pre"] == pytest.approx(fvu, rel=1e-4)


def spliced_zero(x):
    return torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1)


def test_alive_latents_by_hand():
    """Latent 0 reads x₀, latent 1 −x₀: the window decides whether the only negative token, the fourth, is seen."""
    sae = TopKSAE(1, 2, k=1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, -1.0]]))
    batches = [torch.tensor([[1.0], [2.0]]), {"x": torch.tensor([[3.0], [-1.0]])}]
    assert alive_latents(sae, batches, 3).tolist() == [True, False]
    assert alive_latents(sae, batches, 4).tolist() == [True, True]
    with pytest.raises(ValueError, match="window=5: the stream ended 1 tokens before"):
        alive_latents(sae, batches, 5)


@pytest.mark.parametrize("cls", [TopKSAE, FeatureChoiceSAE])
def test_measuring_changes_nothing_and_does_not_depend_on_the_mode(cls, tiny_gpt2, rows):
    torch.manual_seed(0)
    sae = cls(tiny_gpt2.cfg.d_model, 64, k=4)
    x = run_prefix(tiny_gpt2, torch.from_numpy(rows.astype("int64")), [HOOK])[HOOK][:, 1:].flatten(0, 1)
    sae.train()(x)
    before = {key: value.clone() for key, value in sae.state_dict().items()}

    def measured():
        found = evaluate(sae, tiny_gpt2, rows, HOOK), evaluate_downstream(sae, tiny_gpt2, rows, HOOK)
        return *found, alive_latents(sae, [x], 50).tolist(), with_pursuit(sae, x).x_hat.tolist()

    in_training = measured()
    assert (
        in_training[0]["l0"] > 1
        and sae.training
        and all(torch.equal(before[key], value) for key, value in sae.state_dict().items())
    )
    sae.eval()
    assert in_training == measured() and not sae.training


def test_pca_beside_an_sae(tiny_gpt2, rows):
    """k components are k active latents, and leave the variance of the others."""
    x = run_prefix(tiny_gpt2, torch.from_numpy(rows.astype("int64")), [HOOK])[HOOK][:, 1:].flatten(0, 1).double()
    covariance = torch.cov(x.T, correction=0)
    pca = {f"PCA {k}": PrincipalComponents(x.mean(0), covariance, k) for k in (3, 5)}
    found = evaluate(pca | {"sae": TopKSAE(tiny_gpt2.cfg.d_model, 64, k=4)}, tiny_gpt2, rows, HOOK)
    variances = torch.linalg.eigvalsh(covariance)
    for k in (3, 5):
        assert found[f"PCA {k}"]["l0"] == k and found[f"PCA {k}"]["dead_fraction"] == 0
        assert found[f"PCA {k}"]["fvu"] == pytest.approx(float(variances[:-k].sum() / variances.sum()))


def test_fvu_of_ordinary_tokens(tiny_gpt2, rows):
    """Without tokens of high norm it is FVU; one that holds the variance and is met exactly hides the others' error."""
    one = evaluate(lambda x: SAEOutput(0.9 * x, dense=torch.ones(len(x.flatten(0, 1)), 1)), tiny_gpt2, rows, HOOK)
    assert one["fvu_ordinary"] == pytest.approx(one["fvu"])
    x, exact = (
        torch.tensor([[0.0], [2.0], [4.0], [2.0], [1000.0]]),
        torch.tensor([[1.0], [1.0], [3.0], [3.0], [1000.0]]),
    )
    total = ReconstructionSums(typical(x))  # centre 2, usual norm 2: ordinary up to 12
    total.add(x, exact, torch.tensor([5]))
    assert total.result()["fvu_ordinary"] == pytest.approx(4 / 8) and total.result()["fvu"] < 1e-5


@pytest.mark.parametrize("form", ["tensor", "list", "int64"])
def test_rows_in_the_forms_people_have(form, tiny_gpt2, rows):
    as_form = {"tensor": torch.from_numpy(rows.astype("int64")), "list": rows.tolist(), "int64": rows.astype("int64")}
    sae = TopKSAE(tiny_gpt2.cfg.d_model, 64, k=4)
    assert evaluate(sae, tiny_gpt2, as_form[form], HOOK) == evaluate(sae, tiny_gpt2, rows, HOOK)
    assert evaluate_downstream(sae, tiny_gpt2, as_form[form], HOOK) == evaluate_downstream(sae, tiny_gpt2, rows, HOOK)


def test_what_cannot_be_measured_is_named(tiny_gpt2, rows):
    sae = TopKSAE(tiny_gpt2.cfg.d_model, 64, k=4)
    for wrong, match in [
        (rows[:0], r"uint16 \[0, 16\]"),
        (rows[:, :2], "n_ctx=2: it has to be at least 3"),
        (rows.astype(float), r"float64 \[6, 16\].*whole numbers"),
        (rows[0], r"uint16 \[16\]"),
        ([[1, 2, 3], [4]], "inhomogeneous"),
    ]:
        with pytest.raises(ValueError, match=match):
            evaluate(sae, tiny_gpt2, wrong, HOOK)
    for wrong, more, match in [
        ({}, {}, "dictionary {name: sae}"),
        ([sae], {}, "dictionary {name: sae}"),
        (TopKSAE, {}, "dictionary {name: sae}"),
        (TopKSAE(7, 64, k=4), {}, "its last axis has to be d_in=7"),
        (sae, {"batch_rows": 0}, "batch_rows=0"),
    ]:
        with pytest.raises(ValueError, match=match):
            evaluate(wrong, tiny_gpt2, rows, HOOK, **more)
    for window in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"window={window}"):
            alive_latents(sae, [torch.randn(50, 16)], window)
    broken = TopKSAE(16, 64, k=4)
    broken.W_enc.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="W_enc of 'a' holds NaN or infinite values"):
        evaluate({"a": broken}, tiny_gpt2, rows, HOOK)
