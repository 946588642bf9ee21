"""Probes against closed forms, the identity of a least-squares decoder, and a world where every part of the error is known."""

import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae_utils import ActivationStore, TopKSAE
from sae_utils.analysis import controls, dark_matter, least_squares, world


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_least_squares_by_hand():
    """u = 0, 1, 2, v = 1, 2, 6: slope Σ(u − 1)(v − 3)/Σ(u − 1)² = 5/2, intercept 3 − 5/2."""
    moments = least_squares.Moments()
    moments.add(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]))
    moments.add(torch.tensor([[2.0]]), torch.tensor([[6.0]]))
    linear = moments.fit(1)
    assert linear.W.item() == pytest.approx(2.5) and linear.c.item() == pytest.approx(0.5)


def test_r2_by_hand_pooled_and_per_coordinate():
    """Coordinate 0: v = ±1, exact. Coordinate 1: v = ±2, predicted 0. Pooled 1 − 8/10."""
    scores = least_squares.Scores()
    v = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    scores.add(v, v * torch.tensor([0.0, 1.0]), torch.tensor([0, 3]))
    assert scores.r2() == pytest.approx(0.2)
    assert scores.per_coordinate().tolist() == pytest.approx([1, 0])


def test_probe_equals_lstsq_however_the_stream_is_cut():
    u, v = 3 + normal(2000, 6), normal(2000, 4, seed=1)
    moments = least_squares.Moments()
    for a, b in zip(u.split(300), v.split(300)):
        moments.add(a, b)
    linear = moments.fit()
    expected = torch.linalg.lstsq(torch.cat([u, torch.ones(2000, 1)], 1).double(), v.double()).solution
    torch.testing.assert_close(torch.cat([linear.W, linear.c[None]]), expected, atol=1e-9, rtol=1e-7)


def test_an_input_without_variance_takes_no_part():
    u = torch.cat([normal(500, 2), torch.full((500, 1), 7.0)], 1)
    moments = least_squares.Moments()
    moments.add(u, 2 * u[:, :1])
    torch.testing.assert_close(moments.fit()(u.double()), 2 * u[:, :1].double(), atol=1e-6, rtol=1e-6)


def test_bootstrap_interval_covers_and_draws_whole_contexts():
    """Contexts of ten equal tokens carry as much as one: the interval has to be as wide as without repeats."""
    v, noise, one = normal(400, 1), normal(400, 1, seed=1), torch.arange(400)
    single, tenfold = least_squares.Scores(), least_squares.Scores()
    single.add(v, noise / 2, one)
    tenfold.add(v.repeat(10, 1), noise.repeat(10, 1) / 2, one.repeat(10))
    r2, low, high = least_squares.with_interval(1 - single.draws())
    assert low < r2 == single.r2() < high and 0.03 < high - low < 0.3
    assert least_squares.with_interval(1 - tenfold.draws()) == pytest.approx([r2, low, high], abs=1e-6)


def test_draws_of_two_scores_are_paired():
    """A probe that leaves twice the error leaves four times the variance in every draw; the first is of all contexts."""
    v, noise, context = normal(400, 1), normal(400, 1, seed=1), torch.arange(400)
    one, two = least_squares.Scores(), least_squares.Scores()
    one.add(v, noise / 4, context + 3)  # context 0 is not in it
    two.add(v, noise / 2, context + 3)
    torch.testing.assert_close(two.draws(50) / one.draws(50), torch.full((51,), 4.0).double())
    assert one.draws(50)[0] == pytest.approx(1 - one.r2()) and one.draws(50)[1:].std() > 0


def test_power_law_of_a_known_slope():
    """1 − R² of 0.4, 0.1 at sizes 2, 8: slope log(¼)/log(4) = −1 in every draw, as residuals are in proportion."""
    v, noise, context = normal(400, 1), normal(400, 1, seed=1), torch.arange(400)
    one, two = least_squares.Scores(), least_squares.Scores()
    one.add(v, noise / 2, context)
    two.add(v, noise / 4, context)
    slope = least_squares.power_law([2, 8], [one, two])
    torch.testing.assert_close(slope, torch.full_like(slope, -1.0))
    assert len(slope) == 1001 and least_squares.with_interval(slope) == pytest.approx([-1, -1, -1])
    assert least_squares.with_interval(torch.tensor([5.0, *range(101)]))[1:] == pytest.approx([2.5, 97.5])


def test_baselines_of_the_norm():
    """‖e‖² = ‖x‖²/4 for x̂ = x/2; tokens and positions say which of two lengths x has, or nothing."""
    x = torch.nn.functional.normalize(normal(4000, 3), dim=1)
    tokens, position = torch.arange(4000) % 2, torch.arange(4000) // 2 % 2
    stream = [
        b | {"tokens": t, "position": p}
        for b, t, p in zip(least_squares.in_batches(x * (1 + tokens[:, None])), [tokens], [position])
    ]
    values = dark_matter.norm_baselines(lambda x: SimpleNamespace(x_hat=x / 2), stream, stream)
    assert values["‖x‖, ‖x‖²"] == pytest.approx(1, abs=1e-4) and values["tokens"] == pytest.approx(1, abs=1e-4)
    assert values["position"] == pytest.approx(0, abs=1e-3)
    half = dark_matter.norm_baselines(
        lambda x: SimpleNamespace(x_hat=x / 2), [b | {"tokens": position} for b in stream], stream, 1
    )
    assert half["‖x‖, ‖x‖²"] == pytest.approx(1, abs=1e-4) and half["tokens"] < 0.1


def test_probes_along_latents():
    sae, x = trained_like(2000)
    split = dark_matter.ErrorSplit(None, least_squares.Linear(torch.ones(8).double(), torch.zeros(())), {}, {})
    found = dark_matter.along_latents(sae, split, least_squares.in_batches(x))
    latents = sae(x).latents.detach()
    fired = (latents > 0).any(0)
    torch.testing.assert_close(found["activation"].float(), latents.mean(0)[fired], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["‖e‖²"].float(), sae.W_dec.detach().sum(1)[fired], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "value, control, says",
    [
        ([0.5, 0.45, 0.55], 0.5, "holds, and in the control"),
        ([0.5, 0.45, 0.55], 0.9, "holds, and not in the control"),
        ([0.5, 0.3, 0.55], 0.5, "undecided"),
        ([0.9, 0.8, 0.95], 0.5, "does not hold here"),
        ([0.5, float("nan"), float("nan")], 0.5, "undecided"),
    ],
)
def test_verdicts(value, control, says):
    found = dark_matter.verdict(value, (0.4, 0.6), control, "x")
    assert found["verdict"] == says and found["control is"] == "x"


class Half:
    """x̂ = x/2 + a quadratic term: the error is half linear, half not."""

    def __call__(self, x):
        return SimpleNamespace(x_hat=x / 2 - 0.5 * (x.square() - 1) / 2**0.5)


def test_a_known_error_is_split():
    """x ~ N(0, 1): e = x/2 + q/2 with q = (x² − 1)/√2 of variance 1, uncorrelated with x. R² = ½, FVU ½, FVU_nonlinear ¼."""
    x = normal(400_000, 2)
    fit, test = least_squares.in_batches(x[:200_000]), least_squares.in_batches(x[200_000:])
    for batch in test:
        batch["row"] = batch["row"] + 1000
    split = dark_matter.split_error(Half(), fit, test)
    values = split.summary()
    assert values["r2"] == pytest.approx(0.5, abs=0.02) and values["r2_per_coordinate"] == pytest.approx(0.5, abs=0.02)
    assert values["fvu"] == pytest.approx(0.5, abs=0.02) and values["fvu_nonlinear"] == pytest.approx(0.25, abs=0.02)
    assert values["r2_interval"][0] < values["r2"] < values["r2_interval"][1]
    torch.testing.assert_close(split.vector.W, 0.5 * torch.eye(2).double(), atol=0.02, rtol=0)
    assert abs(values["r2_norm_x"]) < 0.01, "‖x‖² of a Gaussian around 0 is not linear in x"
    assert len(split.norms["error"]) == 200_000


def test_too_few_rows_and_shared_contexts_are_refused():
    x = normal(300, 8)
    with pytest.raises(ValueError, match=r"300 tokens.*8 inputs.*Harvest 320 fitting tokens"):
        dark_matter.split_error(Half(), least_squares.in_batches(x), least_squares.in_batches(x))
    with pytest.raises(ValueError, match="context 0 is in both streams"):
        dark_matter.split_error(Half(), least_squares.in_batches(x[:, :4]), least_squares.in_batches(x[:, :4]))


def trained_like(n=6000, d_in=8, d_sae=24, k=3):
    torch.manual_seed(0)
    return TopKSAE(d_in, d_sae, k).eval(), 1 + normal(n, d_in) @ normal(d_in, d_in, seed=1)


def test_the_refit_is_least_squares_and_the_identity_holds_there():
    sae, x = trained_like()
    stream = least_squares.in_batches(x)
    sae.train()
    counters = sae.tokens_since_fired.fill_(7).clone()
    refitted = controls.refit_decoder(sae, stream)
    refitted(x), controls.identity(sae, stream)
    assert sae.training and torch.equal(sae.tokens_since_fired, counters), "measuring is not training"
    f = sae(x).latents.detach().double()
    design = torch.cat([f, torch.ones(len(x), 1)], 1)
    best = x - design @ torch.linalg.lstsq(design, x.double()).solution
    error = x - refitted(x).x_hat
    assert float(error.square().sum()) == pytest.approx(float(best.square().sum()), rel=1e-4)
    before, after = controls.identity(sae, stream), controls.identity(refitted, stream)
    assert after["gap"] < 1e-5 and after["distance"] < 1e-5 and after["bound_holds"]
    assert before["distance"] > 1e-3, "an untrained SAE should be off the optimum"
    moved = dark_matter.split_error(
        refitted, least_squares.in_batches(x), [b | {"row": b["row"] + 100} for b in stream]
    ).summary()
    assert moved["fvu_nonlinear"] <= moved["fvu_bound"] + 1e-6 and moved["r2"] >= moved["fvu"] - 1e-6


def test_flat_and_dense_latents_refit_alike():
    sae, x = trained_like(500)

    def as_dense(x):
        out = sae(x)
        out.dense, out.values, out.active = out.latents, None, None
        return out

    dense = SimpleNamespace(d_sae=24, d_in=8, W_dec=sae.W_dec, b_dec=sae.b_dec)
    one = controls.refit_decoder(sae, least_squares.in_batches(x))
    two = controls.refit_decoder(
        type("S", (), {"__call__": lambda self, x: as_dense(x), **vars(dense)})(), least_squares.in_batches(x)
    )
    torch.testing.assert_close(one(x).x_hat, two(x).x_hat, atol=1e-3, rtol=1e-3)


def test_dead_and_pca_are_linear_by_construction():
    x = normal(4000, 6) @ normal(6, 6, seed=1)
    mean, cov = controls.mean_and_covariance(least_squares.in_batches(x))
    shifted = [b | {"row": b["row"] + 100} for b in least_squares.in_batches(x)]
    for control in (controls.DeadSAE(mean.float()), controls.PrincipalComponents(mean.float(), cov.float(), 2)):
        values = dark_matter.split_error(control, least_squares.in_batches(x), shifted).summary()
        assert values["r2"] == pytest.approx(1, abs=1e-5) and values["fvu_nonlinear"] == pytest.approx(0, abs=1e-5)


def test_surrogate_has_mean_and_covariance():
    x = 2 + normal(3000, 5) @ normal(5, 5, seed=1)
    mean, cov = controls.mean_and_covariance(least_squares.in_batches(x))
    new_mean, new_cov = controls.mean_and_covariance(
        least_squares.in_batches(controls.matched_gaussian(mean, cov, 200_000))
    )
    torch.testing.assert_close(new_mean, mean, atol=0.05, rtol=0)
    torch.testing.assert_close(new_cov, cov, atol=0.1, rtol=0.03)


def test_maps_between_norms():
    """Independent a, b of one variance: a explains half of a + b, and (a, b) all of it."""
    a, b = normal(5000), normal(5000, seed=1)
    assert dark_matter.map_of_norms(a, a + b, 50).r2() == pytest.approx(0.5, abs=0.03)
    assert dark_matter.map_of_norms(a, a + b, 1).r2() == pytest.approx(0.5, abs=0.03)
    assert dark_matter.map_of_norms(torch.stack([a, b], 1), a + b, 50).r2() == pytest.approx(1)


def test_baselines_of_groups_by_hand():
    """‖e‖ 1, 3, 5 of tokens 0, 0, 1: means 2 and 5, and 3 for the new token 2. Test values 2, 5, 8: residuals 0, 0, 5, around 5: 18."""

    def stream(norms, group):
        return [{"x": torch.tensor(norms)[:, None], "row": group, "tokens": group, "position": group}]

    def no_output(x):
        return SimpleNamespace(x_hat=torch.zeros_like(x))

    known = stream([1.0, 3.0, 5.0] * 30, torch.tensor([0, 0, 1] * 30))
    values = dark_matter.norm_baselines(no_output, known, stream([2.0, 5.0, 8.0], torch.arange(3)), power=1)
    assert values["tokens"] == values["position"] == pytest.approx(1 - 25 / 18)


def test_parts_of_the_error_are_accounted_for():
    for kind in world.KINDS:
        x, parts = world.World(noise=0.1, shrink=0.9, introduced_kind=kind).draw(20_000)
        account = world.attribution(x, parts)
        assert sum(part["share"] for part in account.values()) == pytest.approx(1, abs=1e-6)
        for part in account.values():
            assert part["linear"] + part["nonlinear"] == pytest.approx(part["share"], abs=1e-6)
        assert (abs(account["introduced"]["kept"]) < 0.1) == (kind != "of x"), "only what depends on x is linear in it"
    by_hand = {"dense": {"linear": 0.6, "nonlinear": 0.1}, "introduced": {"linear": -0.05, "nonlinear": 0.35}}
    assert world.attribution_error(by_hand) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="introduced_kind='pink'"):
        world.World(introduced_kind="pink").draw(10)


def test_the_norm_of_a_part_from_x():
    """‖part‖² = x₀ + 5 is linear in x; that of independent noise is not."""
    x = normal(20_000, 3).clamp(-3, 3)
    assert world.norm_r2(x, (x[:, :1] + 5).sqrt()) == pytest.approx(1, abs=1e-6)
    assert abs(world.norm_r2(x, normal(20_000, 3, seed=1))) < 0.01


def test_the_noise_grid_orders_what_was_introduced():
    grid = world.noise_grid([0.0, 0.3], n_known=(128,), n=6000)
    assert grid["noise"].tolist() == pytest.approx([0, 0, 0.3, 0.3]) and grid["introduced"][[0, 2]].abs().max() < 1e-6
    assert grid["nonlinear"][1] > grid["nonlinear"][0] + 0.1 and grid["nonlinear"][3] > grid["nonlinear"][2] + 0.1


def test_a_dense_error_is_all_linear():
    """Only white noise on x is left in the error beside nothing: e = noise, R² = σ²/(σ² + other) per direction, as Σ_e Σ_x⁻¹ says."""
    x, parts = world.World(introduced=0.0, dense=0.0, noise=0.5, n_features=64, n_known=64).draw(40_000)
    account = world.attribution(x, parts)
    cov = torch.cov(x.T)
    assert account["noise"]["kept"] == pytest.approx(float(0.25 * torch.linalg.inv(cov).trace() / 64), abs=0.02)


def test_patching_and_maps_on_the_model(tiny_gpt2):
    lm, tiny_rows = tiny_gpt2, np.random.default_rng(0).integers(0, 299, (24, 32)).astype(np.uint16)
    hooks = ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"]
    store = ActivationStore(lm, tiny_rows, hooks)
    fit, test = dark_matter.Contexts(store, range(0, 12)), dark_matter.Contexts(store, range(12, len(tiny_rows)))
    first = next(iter(fit))
    assert first["position"].min() == int(0.2 * store.n_ctx) and first["x"].shape == first[hooks[1]].shape
    torch.manual_seed(0)
    sae = TopKSAE(store.d_in, 64, 4).eval()
    split = dark_matter.split_error(sae, fit, test, rows_per_input=2)
    values = dark_matter.patched_ce(lm, tiny_rows[:2], hooks[0], sae, split)
    assert values["ce_sae"] != values["ce_clean"] and values["share_linear"] > 0
    assert values["share_fraction"] == pytest.approx(values["share_nonlinear"], abs=1e-5)
    ratio = values["recovered_linear"] / values["share_linear"]
    assert values["ratio_linear"][0] == pytest.approx(ratio), "the first draw is of all rows"
    all_back = dark_matter.ErrorSplit(
        least_squares.Linear(torch.zeros(store.d_in, store.d_in), torch.zeros(store.d_in)), None, {}, {}
    )
    full = dark_matter.patched_ce(lm, tiny_rows[:2], hooks[0], sae, all_back)
    assert full["recovered_nonlinear"] == pytest.approx(1, abs=1e-5) and full["recovered_linear"] == pytest.approx(0)
    same = dark_matter.map_from(lambda b: b[hooks[1]], lambda b: 2 * b[hooks[1]] + 1, fit, test, rows_per_input=2)
    assert same.r2() == pytest.approx(1, abs=1e-5)


def test_the_untrained_model_is_drawn_anew(model_directories):
    lm = controls.untrained(str(model_directories["gpt2"]), "cpu")
    for name, parameter in lm.named_parameters():
        if parameter.ndim > 1:
            assert 0.01 < parameter.std() < 0.03
        else:
            assert (parameter == float(name.endswith("weight"))).all(), name


def test_memory_does_not_grow_with_tokens():
    moments, x = least_squares.Moments(), normal(4096, 32)
    moments.add(x, x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        moments.add(x, x)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000 and moments.n == 101 * 4096
