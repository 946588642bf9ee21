"""Gradient pursuit and orthogonal matching pursuit: values by hand, a dictionary recovered exactly, every promised error."""

import pytest
import torch
from torch.nn.functional import normalize

from sae_utils import GatedSAE
from sae_utils.analysis.pursuit import gradient_pursuit, with_pursuit

METHODS = ["gradient", "orthogonal"]


def dense(values, indices, d_sae):
    return torch.zeros(*values.shape[:-1], d_sae).scatter_add(-1, indices, values)


def code(x, D, l0, method="gradient", b_dec=None):
    """Dense latents, as nested lists rounded to 5 digits."""
    D = torch.tensor(D)
    b_dec = torch.zeros(D.shape[1]) if b_dec is None else torch.tensor(b_dec)
    found = dense(*gradient_pursuit(torch.tensor(x), D, b_dec, l0, method), len(D))
    return [[round(v, 5) for v in row] for row in found.tolist()]


@pytest.mark.parametrize("method", METHODS)
def test_orthogonal_directions_by_hand(method):
    """The largest coordinates, in order; negative ones cannot be written; b_dec is taken off first."""
    x, D = [[3.0, -5.0, 4.0], [-1.0, -1.0, -1.0]], torch.eye(3).tolist()
    assert code(x, D, 1, method) == [[0, 0, 4], [0, 0, 0]]
    assert code(x, D, 2, method) == [[3, 0, 4], [0, 0, 0]]
    assert code(x, D, 3, method) == [[3, 0, 4], [0, 0, 0]]
    assert code(x, D, 0, method) == [[0, 0, 0], [0, 0, 0]]
    assert code(x, D, 1, method, b_dec=[3.0, -7.0, 3.5]) == [[0, 2, 0], [0, 6, 0]]


def test_two_oblique_directions_by_hand():
    """d₀ = (1, 0), d₁ = (.6, .8), x = (3, 1). First d₀ (3 against 2.6), w₀ = 3, r = (0, 1). Then d₁, r · d₁ = .8; the gradient
    (0, .8) has the best length 1, so w = (3, .8). Least squares fits x: w₁ = 1/.8, w₀ = 3 − .6 w₁."""
    D = [[1.0, 0.0], [0.6, 0.8]]
    assert code([[3.0, 1.0]], D, 1) == [[3, 0]]
    assert code([[3.0, 1.0]], D, 2) == [[3, 0.8]]
    assert code([[3.0, 1.0]], D, 2, "orthogonal") == [[2.25, 1.25]]


def test_a_third_step_by_hand():
    """After the test above d₂ = (−.8, .6) joins: r = x − 3 d₀ − .8 d₁ = (−.48, .36), so g = (−.48, 0, .6), g D = (−.96, .36), and the
    step is ‖g‖²/‖g D‖² = .5904/1.0512 long. d₂ is given at half its length, and its weight doubles."""
    step = 0.5904 / 1.0512
    expected = [3 - 0.48 * step, 0.8, 2 * 0.6 * step]
    assert code([[3.0, 1.0]], [[1.0, 0.0], [0.6, 0.8], [-0.4, 0.3]], 3)[0] == pytest.approx(expected, abs=1e-5)


def test_a_weight_never_goes_below_zero_by_hand():
    """x = (1, .2): d₁ = (1, 0) comes first, then d₂ = (0, 1), which fits x; d₀ = (.8, .6) then has nothing to add."""
    D = [[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]]
    for method in METHODS:
        assert code([[1.0, 0.2]], D, 3, method) == [[0, 1, 0.2]]
    # x = (1, −.2): after d₁ only a negative weight could help
    assert code([[1.0, -0.2]], D, 3, "orthogonal") == [[0, 1, 0]] == code([[1.0, -0.2]], D, 3)


def test_least_squares_drops_what_comes_out_negative():
    """d₀ is chosen first, and not needed when d₁ and d₂ are there: x = 2 d₁ + 2 d₂ − .5 d₀."""
    d1, d2 = torch.tensor([1.0, 0.0, 0.3]), torch.tensor([0.0, 1.0, 0.3])
    D = normalize(torch.stack([torch.tensor([1.0, 1.0, 0.0]), d1, d2]), dim=1)
    x = -0.5 * D[0] + 2 * D[1] + 2 * D[2]
    assert (x @ D.T).argmax() == 0
    w = torch.tensor(code([x.tolist()], D.tolist(), 3, "orthogonal"))[0]
    assert w[0] == 0 and (w[1:] > 0).all()
    expected = torch.linalg.lstsq(D[1:].T, x[:, None]).solution.squeeze(1)  # the best without d₀
    torch.testing.assert_close(w[1:], expected, atol=1e-4, rtol=1e-4)


def planted(n=200, d_in=64, d_sae=96, k=4):
    generator = torch.Generator().manual_seed(0)
    D = normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    chosen = torch.rand(n, d_sae, generator=generator).topk(k, dim=1).indices
    w = torch.zeros(n, d_sae).scatter(1, chosen, 1 + torch.rand(n, k, generator=generator))
    return D, w, torch.randn(d_in, generator=generator)


def test_a_planted_code_is_recovered_exactly():
    D, w, b_dec = planted()
    x = w @ D + b_dec
    found = dense(*gradient_pursuit(x, D, b_dec, 4, "orthogonal"), len(D))
    right = ((found > 0) == (w > 0)).all(1)
    assert right.float().mean() > 0.95, "orthogonal matching pursuit should find nearly every support"
    torch.testing.assert_close(found[right], w[right], atol=1e-5, rtol=1e-5)
    close = dense(*gradient_pursuit(x, D, b_dec, 4), len(D))
    assert ((close > 0) == (w > 0)).all(1).float().mean() > 0.9
    assert (close - w).square().sum() < 0.02 * w.square().sum(), "gradient steps come near"


@pytest.mark.parametrize("method", METHODS)
def test_every_token_has_its_own_number_of_latents(method):
    D, w, b_dec = planted(n=40)
    x = (w @ D + b_dec).view(5, 8, -1) + 0.3 * torch.randn(5, 8, 64, generator=torch.Generator().manual_seed(1))
    l0 = torch.arange(40).view(5, 8) % 7
    values, indices = gradient_pursuit(x, D, b_dec, l0, method)
    assert values.shape == indices.shape == (5, 8, 6) and (values >= 0).all()
    assert ((values > 0).sum(-1) <= l0).all() and (values > 0).sum() > 0.9 * l0.sum()
    together = dense(values, indices, len(D))
    for i in range(5):
        for j in range(8):
            alone = dense(*gradient_pursuit(x[i, j], D, b_dec, int(l0[i, j]), method), len(D))
            torch.testing.assert_close(alone, together[i, j], atol=1e-5, rtol=1e-4)
    for row, used in zip(indices.flatten(0, 1), values.flatten(0, 1) > 0):
        assert len(set(row[used].tolist())) == used.sum(), "a latent may be added once"


def test_more_latents_fit_better_and_least_squares_best():
    D, w, b_dec = planted()
    x = w @ D + b_dec + 0.3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1))

    def error(l0, method):
        return (x - b_dec - dense(*gradient_pursuit(x, D, b_dec, l0, method), len(D)) @ D).square().sum(1)

    errors = {method: torch.stack([error(l0, method) for l0 in range(7)]) for method in METHODS}
    assert all((e.diff(dim=0) <= 1e-4).all() for e in errors.values()), "one more latent made it worse"
    torch.testing.assert_close(errors["gradient"][:2], errors["orthogonal"][:2])  # one latent: the same
    assert (errors["orthogonal"][2:].mean(1) < errors["gradient"][2:].mean(1)).all()


@pytest.mark.parametrize("method", METHODS)
def test_in_a_crowded_dictionary_weights_stay_above_zero_and_the_error_never_rises(method):
    """12 directions in 3 dimensions: steps along the gradient do cross zero there, and would add a latent twice."""
    torch.manual_seed(0)
    D, x = normalize(torch.randn(12, 3), dim=1), torch.randn(2000, 3)
    errors = []
    for l0 in range(9):
        values, indices = gradient_pursuit(x, D, torch.zeros(3), l0, method)
        assert (values >= 0).all()
        assert all(len(set(i[v > 0].tolist())) == (v > 0).sum() for v, i in zip(values, indices)), "added twice"
        errors.append((x - dense(values, indices, 12) @ D).square().sum(1))
    assert torch.stack(errors).diff(dim=0).max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_twin_directions_do_no_harm(method):
    D, x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    found = dense(*gradient_pursuit(x, D, torch.zeros(2), 3, method), 3)
    torch.testing.assert_close(found @ D, x)


def test_with_the_saes_own_number_of_latents():
    torch.manual_seed(0)
    sae, x = GatedSAE(12, 40).eval(), torch.randn(3, 7, 12)
    with torch.no_grad():
        sae.b_gate -= 0.5
        sae.b_dec += 0.1
    encoded = sae(x)
    for method in METHODS:
        out = with_pursuit(sae, x, method)
        assert out.x_hat.shape == x.shape and out.latents.shape == (3, 7, 40)
        assert ((out.latents > 0).sum(-1) <= (encoded.latents > 0).sum(-1)).all() and (out.latents >= 0).all()
        torch.testing.assert_close(out.x_hat, sae.decode(out.latents))
        assert (x - out.x_hat).square().sum() < (x - encoded.x_hat).square().sum()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 4)}, r"x \[2, 4\] .*d_in=3"),
        ({"b_dec": torch.zeros(4)}, r"b_dec \[4\].*d_in=3"),
        ({"l0": 6}, "between 0 and d_sae=5"),
        ({"l0": -1}, "between 0 and d_sae=5"),
        ({"l0": torch.tensor([1.0, 2.0])}, "whole numbers"),
        ({"method": "basis"}, "method='basis': allowed are 'gradient', 'orthogonal'"),
    ],
)
def test_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        gradient_pursuit(
            **{"x": torch.zeros(2, 3), "W_dec": torch.zeros(5, 3), "b_dec": torch.zeros(3), "l0": 2} | change
        )
