"""Mutual Choice and Feature Choice: selection against the dense form, budgets, thresholds, the loss for underused latents."""

import math

import pytest
import torch

from sae_utils import FeatureChoiceSAE, MutualChoiceSAE, TopKSAE, load_sae, save_sae, train
from sae_utils.saes.choice import shared_out, zipf, zipf_error, zipf_fit, zipf_quotas
from sae_utils.sparse import select_encode as sparse
from sae_utils.sparse import selection
from sae_utils.sparse.choice import feature_encode, mutual_encode
from sae_utils.training.losses import aux_zipf_loss, reconstruction_loss

BOTH = [MutualChoiceSAE, FeatureChoiceSAE]


def weights(d_in=8, d_sae=50):
    torch.manual_seed(0)
    shapes = (40, d_in), (d_in, d_sae), (d_sae,), (d_in,)
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]


def dense(x, W_enc, b_enc, b_dec):
    return ((x - b_dec) @ W_enc + b_enc).relu()


def mutual_mask(f, budget):
    return torch.zeros_like(f).flatten().index_fill(0, f.flatten().topk(budget).indices, 1).view_as(f)


def feature_mask(f, quota):
    rank = f.argsort(0, descending=True).argsort(0)
    return (rank < quota).to(f)


def agree(result, expected, leaves):
    """Values and gradients of (values, active) equal those of dense latents."""
    values, active = result[:2]
    made = sparse.densify(values, active)
    torch.testing.assert_close(made, expected)
    assert (active.token.diff() >= 0).all() and active.offsets[-1] == len(values)
    weight = torch.randn_like(made)
    gradients = [torch.autograd.grad((m * weight).sum(), leaves, retain_graph=True) for m in (made, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("workspace", [1 << 25, 130, 1])  # all at once; a few tokens; one
@pytest.mark.parametrize("bound", [0.0, 0.5, 1e3])
def test_mutual_choice_is_the_dense_form_in_chunks_and_for_any_guess_of_the_bound(monkeypatch, workspace, bound):
    monkeypatch.setattr(selection, "WORKSPACE", workspace)
    leaves = weights()
    f = dense(*leaves)
    result = mutual_encode(*leaves, 120, bound)
    agree(result, f * mutual_mask(f, 120), leaves)
    torch.testing.assert_close(result[2], f.flatten().topk(120).values[-1].detach())


def test_mutual_choice_takes_no_latent_that_is_not_positive():
    leaves = weights()
    f = dense(*leaves)
    values, active, smallest = mutual_encode(*leaves, f.numel())
    agree((values, active), f, leaves)
    assert len(values) == (f > 0).sum() and smallest == 0, "a budget that is not used up bounds nothing"


def test_of_equal_latents_mutual_choice_takes_as_many_as_the_budget_allows():
    values, active, _ = mutual_encode(torch.ones(6, 2), torch.ones(2, 5), torch.zeros(5), torch.zeros(2), 7)
    assert len(values) == 7 and len(set(zip(active.token.tolist(), active.indices.tolist()))) == 7


@pytest.mark.parametrize("workspace", [1 << 25, 130, 1])
def test_feature_choice_is_the_dense_form_in_groups_of_latents(monkeypatch, workspace):
    monkeypatch.setattr(selection, "WORKSPACE", workspace)
    leaves = weights()
    f = dense(*leaves)
    quota = torch.randint(1, 41, (50,))
    result = feature_encode(*leaves, quota)
    agree(result, f * feature_mask(f, quota), leaves)
    torch.testing.assert_close(result[2], f.sort(0, descending=True).values.gather(0, quota[None] - 1)[0].detach())


def test_zipf_quotas_have_the_sum_the_cap_and_the_arithmetic_of_a_large_dictionary():
    shares = zipf(16384, 1.0, 0.0)
    raw = 32 * 4096 * shares
    assert raw[0] / 4096 == pytest.approx(3.1, abs=0.05) and (raw < 1).double().mean() == pytest.approx(0.22, abs=0.005)
    raw = 32 * 4096 * zipf(16384, 1.0, 10.0)
    assert raw[0] / 4096 == pytest.approx(0.40, abs=0.005) and raw[-1] == pytest.approx(1.09, abs=0.005)
    for q in (0.0, 10.0):
        quotas = zipf_quotas(32, 4096, 16384, 1.0, q)
        assert quotas.sum() == 32 * 4096 and quotas.min() >= 1 and quotas.max() <= 4096
        assert (quotas.diff() <= 0).all()
    assert quotas[0] == pytest.approx(raw[0].item(), abs=1)


def test_zipf_quotas_by_hand():
    # shares 1/2, 1/4, 1/4 of 12 would be 6, 3, 3; the cap of 4 hands 2 on, in equal parts as their shares are equal
    assert zipf(3, 1.0, 0.0).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    # 6.55, 3.27, 2.18 of 12: 4 is the cap, 8 are left for shares 3 : 2, of which 4.8 is capped too
    assert zipf_quotas(3, 4, 3, 1.0, 0.0).tolist() == [4, 4, 4]
    # 4.36, 2.18, 1.45 of 8, nothing capped at 8: the missing one goes to the largest remainder
    assert zipf_quotas(1, 8, 3, 1.0, 0.0).tolist() == [4, 2, 2]


@pytest.mark.parametrize("k, batch, s, q, needed", [(2, 10, 0.0, 0.0, 25), (2, 100, 2.0, 0.0, 550)])
def test_a_batch_too_small_for_its_latents_is_refused_with_the_batch_that_would_do(k, batch, s, q, needed):
    sae = FeatureChoiceSAE(4, 50, k, s, q)
    with pytest.raises(ValueError, match=f"at least {needed} tokens"):
        sae(torch.randn(batch, 4))
    assert zipf_quotas(k, needed, 50, s, q).min() >= 1
    with pytest.raises(ValueError, match="at least"):
        zipf_quotas(k, needed - 1, 50, s, q)


def test_a_batch_too_small_is_refused_before_the_law_is_known():
    with pytest.raises(ValueError, match="at least 25 tokens"):
        FeatureChoiceSAE(4, 50, 2)(torch.randn(24, 4))


@pytest.mark.parametrize("quotas", ["zipf", "demand", "frozen"])
def test_quota_is_the_batch_in_warm_up_and_afterwards_no_batch_exceeds_it(quotas):
    torch.manual_seed(0)
    sae = FeatureChoiceSAE(16, 64, 4, warmup_tokens=300, quotas=quotas)
    mutual = MutualChoiceSAE(16, 64, 4)
    mutual.load_state_dict(sae.state_dict(), strict=False)
    for n in range(8):
        x = torch.randn(100, 16)
        out = sae(x)
        if n < 3:
            assert (sae.quota == 100).all()
            assert torch.equal(out.latents, mutual(x).latents), "warm-up is Mutual Choice"
            assert torch.equal(sae.demand, mutual.density)
            continue
        fired = (out.latents > 0).sum(0)
        assert sae.quota.sum() == 400 and (fired <= sae.quota).all() and (fired > 0).all()
        assert quotas == "demand" or sae.law[0] > 0
        if quotas != "frozen":
            mutual(x)
            torch.testing.assert_close(sae.demand, mutual.density)
    order = sae.demand.argsort(descending=True, stable=True)
    assert (sae.quota[order].diff() <= (1 if quotas == "demand" else 0)).all(), "the more demand, the larger the quota"


@pytest.mark.parametrize("quotas, follows", [("zipf", True), ("demand", True), ("frozen", False)])
def test_after_warm_up_quotas_follow_the_demand_unless_they_are_frozen(quotas, follows):
    """The data change after the warm-up: what was rare becomes common."""
    torch.manual_seed(0)
    sae = FeatureChoiceSAE(8, 8, 2, warmup_tokens=1000, quotas=quotas)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(8)), sae.W_dec.copy_(torch.eye(8))
    common = torch.logspace(0, -2, 8)  # the first is on most often

    def batch(shares):
        return (torch.rand(200, 8) < shares) * (1 + torch.rand(200, 8))

    for _ in range(6):
        sae(batch(common))
    ranks, law = sae.quota.argsort(descending=True), sae.law.clone()
    assert ranks[:3].tolist() == [0, 1, 2]
    for _ in range(100):
        sae(batch(common.flip(0)))
    assert (sae.quota.argsort(descending=True)[:3].tolist() == [7, 6, 5]) == follows
    assert torch.equal(sae.law, law) == (not follows), "the law is fitted again as training goes on"
    assert sae.quota.sum() == 400


def test_shares_are_handed_out_by_hand():
    assert shared_out(torch.tensor([0.5, 0.3, 0.2]), 10, 10).tolist() == [5, 3, 2]
    assert shared_out(torch.tensor([0.5, 0.3, 0.2]), 10, 4).tolist() == [4, 4, 2]  # 3.6, 2.4 of the 6 left: 4 and 2
    assert shared_out(torch.tensor([1.0, 0.0]), 5, 5).tolist() == [4, 1]
    assert shared_out(torch.tensor([1.0, 0.0, 0.0]), 8, 4).tolist() == [4, 2, 2], (
        "what the cap leaves goes to all others"
    )


def test_the_error_of_the_law_by_hand():
    # log densities 0 and −1 under a flat law: weights 2/3 and 1/3, mean −1/3, mean square of the rest 2/9
    assert zipf_error(torch.tensor([1.0, math.exp(-1), 0.0]), 0.0, 0.0) == pytest.approx((2 / 9) ** 0.5)
    torch.manual_seed(0)
    density = torch.rand(200)
    s, q = zipf_fit(density)
    assert zipf_error(density, s, q) < min(zipf_error(density, s * 1.2, q), zipf_error(density, s, 3 * q + 1))


@pytest.mark.parametrize("cls", BOTH)
def test_calibrated_thresholds_meet_the_budget_and_inference_looks_at_one_token_at_a_time(cls):
    torch.manual_seed(0)
    sae = cls(16, 64, 4) if cls is MutualChoiceSAE else cls(16, 64, 4, s=1.0, q=10.0, warmup_tokens=0)
    for _ in range(5):
        sae(torch.randn(200, 16))
    sae.eval()
    x = torch.randn(2000, 16)
    if cls is FeatureChoiceSAE:
        with pytest.raises(ValueError, match="15 tokens are too few for one match for every latent: give at least 16"):
            sae.calibrate(x[:15])
    sae.calibrate(x)
    latents = sae.encode(x)
    assert (latents > 0).sum() == 4 * 2000
    torch.testing.assert_close(torch.cat([sae.encode(row) for row in x[:20].split(1)]), latents[:20])
    z = sae.pre_activations(x)
    torch.testing.assert_close(latents, z * (z > sae.threshold))
    assert len(sae.threshold.unique()) == (1 if cls is MutualChoiceSAE else 64)
    torch.testing.assert_close(sae(x).x_hat, latents @ sae.W_dec + sae.b_dec)


def test_the_running_threshold_is_the_mean_of_the_smallest_latents_chosen():
    sae = MutualChoiceSAE(1, 1, 1)
    with torch.no_grad():
        sae.W_enc.fill_(1), sae.W_dec.fill_(1)
    for x in ([1.0, 2.0], [3.0, 5.0]):
        sae(torch.tensor(x)[:, None])
    assert sae.threshold.item() == 2.0 and sae.density.item() == 1.0
    assert sae.eval()(torch.tensor([[2.0], [2.5]])).latents.flatten().tolist() == [0.0, 2.5]
    sae.train()
    sae.tokens_since_fired[0], sae.tokens_seen = 0, torch.tensor(10**6)
    sae(torch.tensor([[12.0], [13.0]]))
    assert sae.threshold.item() == pytest.approx(0.99 * 2 + 0.01 * 12), (
        "late in training a batch counts for a hundredth"
    )


@pytest.mark.parametrize("cls", BOTH)
def test_it_is_saved_as_jumprelu_and_comes_back_as_what_it_was(cls, tmp_path):
    torch.manual_seed(0)
    sae = cls(8, 32, 3)
    for _ in range(4):
        sae(torch.randn(64, 8))
    back = load_sae(save_sae(sae, tmp_path / "sae"))
    assert (
        type(back) is cls
        and back.arguments == sae.arguments
        and '"jumprelu"' in (tmp_path / "sae/cfg.json").read_text()
    )
    x = torch.randn(100, 8)
    assert torch.equal(back(x).latents, sae.eval()(x).latents)
    for name, value in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("cls", BOTH)
def test_a_planted_dictionary_is_found(cls):
    torch.manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(24, 16), dim=1)
    active = torch.rand(200, 256, 24) < 0.1
    batches = (active * (1 + torch.rand(200, 256, 24))) @ planted
    sae = cls(16, 48, 3)
    train(sae, list(batches), n_steps=600, lr=0.005, progress=False)
    best = (planted @ sae.W_dec.T).amax(1)
    assert best.mean() > 0.9, best


def test_underused_by_hand():
    sae = MutualChoiceSAE(4, 3, 1)
    sae.dead_after = 10
    # shares 1/2, 1/3, 1/6 · … of one latent a token, s = 1, q = 0: expected 6/11, 3/11, 2/11 by falling density
    sae.density.copy_(torch.tensor([0.2, 0.6, 0.3]))
    assert sae.underused(1.0, 0.0, 1.0).tolist() == [False, False, False]
    sae.density.copy_(torch.tensor([0.1, 0.6, 0.25]))
    assert sae.underused(1.0, 0.0, 1.0).tolist() == [True, False, True]
    assert sae.underused(1.0, 0.0, 0.9).tolist() == [True, False, False]  # 0.25 is not below 0.9 · 3/11
    sae.tokens_since_fired[1] = 10  # dead, whatever its density was: last in rank
    assert sae.underused(1.0, 0.0, 1.0).tolist() == [True, True, True]


def test_with_expectations_of_almost_0_the_zipf_loss_is_auxk():
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 64, 2)
    sae.dead_after = 300
    for _ in range(10):
        sae(torch.randn(64, 8) @ torch.diag(torch.tensor([3.0, 2, 1, 0, 0, 0, 0, 0])))
    assert 0 < sae.dead().sum() < 64
    x, state = torch.randn(64, 8), {k: v.clone() for k, v in sae.state_dict().items()}
    share = reconstruction_loss(sae, x)
    sae.load_state_dict(state)
    sae.k = 1e-9  # expectations are k times a share
    assert torch.equal(sae.underused(), sae.dead())
    sae.k = 2
    assert torch.equal(sae.underused(share=1e-9), sae.dead())
    sae.underused = lambda *_: sae.dead()
    assert aux_zipf_loss(sae, x)["loss"] == share["loss"]
    del sae.underused
    sae.load_state_dict(state)
    assert sae.underused(share=1.0).sum() > sae.dead().sum()
    assert aux_zipf_loss(sae, x, share=1.0)["auxk"] != share["auxk"]


def test_zipf_fit_finds_exponent_and_offset():
    s, q = zipf_fit(torch.cat([zipf(500, 1.3, 7.0), torch.zeros(9)])[torch.randperm(509)])
    assert s == pytest.approx(1.3, abs=0.05) and q == pytest.approx(7, abs=0.8)
    exact = zipf(500, 1.3, 0.0)
    exact[450:] /= 5  # a tail that no longer follows the law hardly moves the fit
    assert zipf_fit(exact)[0] == pytest.approx(1.3, abs=0.15) and zipf_fit(exact[:3]) == pytest.approx(
        (1.3, 0), abs=1e-9
    )
    with pytest.raises(ValueError, match="2 latents fire"):
        zipf_fit(torch.tensor([0.5, 0.25, 0]))


def test_wrong_settings_are_named():
    for cls in BOTH:
        with pytest.raises(ValueError, match="k=0: .* from 1 to 8"):
            cls(4, 8, 0)
    with pytest.raises(ValueError, match="s=-1: .*at least 0"):
        FeatureChoiceSAE(4, 8, 2, s=-1, q=0)
    with pytest.raises(ValueError, match="q=None.*both None"):
        FeatureChoiceSAE(4, 8, 2, s=1)
    with pytest.raises(ValueError, match="warmup_tokens=0.*s and q"):
        FeatureChoiceSAE(4, 8, 2, warmup_tokens=0)
    for quotas, law in (("demand", {}), ("frozen", {"s": 1.0, "q": 0.0})):
        with pytest.raises(ValueError, match="warmup_tokens=0: without a warm-up no demand is known"):
            FeatureChoiceSAE(4, 8, 2, warmup_tokens=0, quotas=quotas, **law)
    with pytest.raises(ValueError, match="quotas='rank'.*'zipf'.*'demand'.*'frozen'"):
        FeatureChoiceSAE(4, 8, 2, quotas="rank")
    with pytest.raises(ValueError, match="quotas='demand'.*s and q"):
        FeatureChoiceSAE(4, 8, 2, s=1, q=0, quotas="demand")
    with pytest.raises(ValueError, match="aux_zipf_loss does not fit TopKSAE, which keeps no running density"):
        aux_zipf_loss(TopKSAE(4, 8, 2), torch.randn(16, 4))


def test_a_warm_up_does_not_come_back_and_calibrating_moves_nothing_but_thresholds():
    torch.manual_seed(0)
    sae, x = FeatureChoiceSAE(8, 32, k=2, quotas="frozen"), torch.randn(4096, 8)
    train(sae, x, n_steps=40, batch_size=256, progress=False)
    law = sae.law.clone()
    train(sae, x, n_steps=400, batch_size=256, stop_after=10, progress=False)
    assert not sae.warm and torch.equal(sae.law, law)
    before = {key: value.clone() for key, value in sae.train().state_dict().items() if key != "threshold"}
    sae.calibrate(x[:2000])
    assert sae.training and all(
        torch.equal(value, before[key]) for key, value in sae.state_dict().items() if key in before
    )
