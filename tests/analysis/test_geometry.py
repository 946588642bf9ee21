"""Directions whose cosines are known."""

import itertools
import math

import numpy as np
import pytest
import torch

from sae_utils import TopKSAE
from sae_utils.analysis import geometry
from sae_utils.analysis.geometry import bootstrap, directions, matching, max_cosine, max_cosine_within


def at(*degrees):
    """Directions in the plane, of lengths 1, 2, …"""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


def cos(*degrees):
    return torch.tensor(degrees).deg2rad().cos()


@pytest.fixture(params=[2048, 2])
def chunked(request, monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK", request.param)


def test_nearest_in_ones_own_dictionary(chunked):
    torch.testing.assert_close(max_cosine_within(at(0.0, 30.0, 90.0, 200.0, 150.0)), cos(30.0, 30.0, 60.0, 50.0, 50.0))
    assert max_cosine_within(at(0.0)).tolist() == [-math.inf]


def test_opposite_directions_are_far():
    assert max_cosine_within(at(0.0, 180.0)).tolist() == pytest.approx([-1, -1])


def test_across_dictionaries_each_direction_of_the_question_has_its_answer(chunked):
    a, b = at(0.0, 90.0), at(0.0, 10.0, 45.0)
    torch.testing.assert_close(max_cosine(a, b), cos(0.0, 45.0))
    torch.testing.assert_close(max_cosine(b, a), cos(0.0, 10.0, 45.0))
    with pytest.raises(ValueError, match="d_in 2 and 3"):
        max_cosine(a, torch.ones(4, 3))


def test_matching_finds_a_permutation(chunked):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 16, generator=generator)
    order = torch.randperm(50, generator=generator)
    partner, cosine = matching(a, 3 * a[order] + 0.1 * torch.randn(50, 16, generator=generator))
    assert torch.equal(order[partner], torch.arange(50)) and (cosine > 0.95).all()
    partner, cosine = matching(a, a[order][:20])
    assert (partner < 0).sum() == 30 == cosine.isnan().sum() and sorted(partner[partner >= 0].tolist()) == list(
        range(20)
    )


def test_matching_takes_the_largest_total_and_not_the_nearest_pair():
    # 0° is nearest to 10°, and so is 20°; giving 10° to 0° leaves 20° with 300° (cos 280°), the other way round with 300° (cos 60°)
    a, b = at(0.0, 19.0), at(10.0, 300.0)
    best, cosine = matching(a, b)
    pairs = {p: (directions(a) * directions(b)[list(p)]).sum().item() for p in itertools.permutations(range(2))}
    assert tuple(best.tolist()) == max(pairs, key=pairs.get) == (1, 0)
    torch.testing.assert_close(cosine, cos(60.0, 9.0))
    assert matching(at(0.0, 15.0), at(9.0, 330.0))[0].tolist() == [1, 0]
    # the nearest pair, 0° and 14°, would leave 30° with 330°: cos 14° + cos 60° < cos 16° + cos 30°
    assert matching(at(0.0, 30.0), at(14.0, 330.0))[0].tolist() == [1, 0]


def test_matching_against_all_permutations():
    generator = torch.Generator().manual_seed(0)
    for n, m in [(1, 1), (1, 4), (4, 1), (4, 4), (5, 6), (6, 5)]:
        a, b = torch.randn(n, 3, generator=generator), torch.randn(m, 3, generator=generator)
        partner, cosine = matching(a, b)
        cosines = (directions(a) @ directions(b).T).numpy()
        cosines = cosines if n <= m else cosines.T
        best = max(
            sum(cosines[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(max(n, m)), min(n, m))
        )
        assert len(set(partner[partner >= 0].tolist())) == min(n, m) and cosine.nansum().item() == pytest.approx(best)


def test_matching_pairs_all_where_all_are_equal():
    same = torch.ones(6, 3)
    assert sorted(matching(same, same)[0].tolist()) == list(range(6))


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        value, low, high = bootstrap(generator.normal(3, 2, 60), n=300, level=0.9, seed=i)
        assert low <= value <= high
        inside += low <= 3 <= high
    assert 0.83 < inside / 200 < 0.96
    _, low, high = bootstrap(np.arange(100.0), n=4000)
    assert (high - low) / 2 == pytest.approx(1.96 * np.arange(100.0).std() / 10, rel=0.05)


def test_bootstrap_of_a_difference_and_of_nothing():
    a, b = np.array([1.0, 3.0]), np.array([0.0, 0.0, 3.0])
    value, low, high = bootstrap((a, b))
    # the mean of a is 1, 2 or 3 (¼, ½, ¼), that of b 0, 1, 2 or 3 (8, 12, 6, 1 of 27): −2 has 0.9%, −1 7.4%, 3 again 7.4%
    assert value == 1 and low == -1 and high == 3
    assert bootstrap(np.full(5, 2.0)) == (2, 2, 2) == bootstrap([2.0])
    assert bootstrap(a, np.median, seed=1) == bootstrap(a, np.median, seed=1)
    with pytest.raises(ValueError, match="two or more"):
        bootstrap([])


def test_an_sae_is_its_decoder_and_zero_rows_are_refused():
    torch.manual_seed(0)
    sae = TopKSAE(4, 8, k=2)
    assert torch.equal(max_cosine_within(sae), max_cosine_within(sae.W_dec)) and not directions(sae).requires_grad
    with pytest.raises(ValueError, match="1 of 2 rows are zero"):
        directions(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_cosines_of_many_latents_never_exist_at_once(monkeypatch):
    """The largest tensor of cosines is CHUNK × d_sae."""
    monkeypatch.setattr(geometry, "CHUNK", 16)
    largest, matmul = [0], torch.Tensor.__matmul__

    def spy(self, other):
        out = matmul(self, other)
        largest.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    D = torch.randn(500, 8)
    max_cosine_within(D), max_cosine(D, D)
    assert max(largest) == 16 * 500
    assert math.isfinite(max_cosine(D, D).mean())
