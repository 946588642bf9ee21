"""Synthetic data in which every part of an SAE's error is known, so that the probes of `dark_matter` can be scored (ours)."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..values import one_of
from .dark_matter import map_from
from .least_squares import Moments

KINDS = ("white", "anisotropic", "grows", "of x")  # of introduced error


@dataclass
class World:
    """x = Σ_i w_i y_i + dense + noise: sparse features y_i of unit norm with Zipf's frequencies, a dense Gaussian part of low rank,
    and white noise.

    The imagined SAE knows the n_known most frequent features exactly, returns `shrink` of their weights, and adds an error of its own.

    >>> x, parts = World(d_in=16).draw(100)
    >>> x.shape, sorted(parts)
    (torch.Size([100, 16]), ['absent', 'dense', 'introduced', 'noise', 'shrinkage'])
    """

    d_in: int = 64
    n_features: int = 256
    n_known: int = 128
    l0: float = 8.0
    dense: float = 0.3  # standard deviations per coordinate, beside features of mean weight 1
    rank: int = 8
    noise: float = 0.0
    introduced: float = 0.1
    shrink: float = 1.0
    introduced_kind: str = "white"  # one of KINDS: "grows" with the token's ‖x‖, "of x" is a function of it
    seed: int = 0

    def draw(self, n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """x [n, d_in] and the parts of e = x − x̂, which add up to it: absent, dense, noise, shrinkage, introduced."""
        kind = one_of("introduced_kind", self.introduced_kind, KINDS)
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        directions = normalize(normal(self.n_features, self.d_in), dim=1)
        frequency = 1 / torch.arange(1, self.n_features + 1)
        frequency = (self.l0 * frequency / frequency.sum()).clamp_max(0.5)
        fires = torch.rand(n, self.n_features, generator=generator) < frequency
        weights = fires * (0.5 + torch.rand(n, self.n_features, generator=generator))
        basis = normalize(normal(self.rank, self.d_in), dim=1) * (self.d_in / self.rank) ** 0.5
        seen = weights[:, : self.n_known] @ directions[: self.n_known]
        parts = {"absent": weights[:, self.n_known :] @ directions[self.n_known :]}
        parts["dense"] = self.dense * normal(n, self.rank) @ basis
        parts["noise"] = self.noise * normal(n, self.d_in)
        x = seen + sum(parts.values())
        parts["shrinkage"] = (1 - self.shrink) * seen
        own = self.introduced * normal(n, self.d_in)
        if kind == "anisotropic":
            own = own * (torch.arange(self.d_in) < self.d_in // 8) * 8**0.5
        elif kind == "grows":
            length = x.norm(dim=1, keepdim=True)
            own = own * length / length.square().mean().sqrt()
        elif kind == "of x":
            own = ((x - x.mean(0)) @ normal(self.d_in, self.d_in)).relu()
            own = self.introduced * (own - own.mean(0)) / own.std()
        return x, parts | {"introduced": own}


def attribution(x: Tensor, parts: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Where each part p of e = Σ p goes: its share of tr Cov(e), and how much of that is in the linear and the nonlinear error.

    tr Cov(N, p) summed over parts is tr Cov(N), an exact account of the nonlinear error N, and so for the linear error L.
    kept = tr Cov(L, p) / tr Cov(e, p) is what L takes of the part. Fitted and scored on halves of x [n, d_in].

    >>> account = attribution(*World(introduced=0.0).draw(8000))
    >>> account["introduced"]["share"]
    0.0
    """
    half, error = len(x) // 2, sum(parts.values())
    moments = Moments()
    moments.add(x[:half], error[:half])
    error, linear = error[half:], moments.fit()(x[half:])

    def trace(a, b):
        return float(((a - a.mean(0)) * (b - b.mean(0))).double().sum())

    total, account = trace(error, error), {}
    for name, part in parts.items():
        own, of_linear, of_rest = (trace(whole, part[half:]) for whole in (error, linear, error - linear))
        account[name] = {"share": own / total, "linear": of_linear / total, "nonlinear": of_rest / total}
        account[name]["kept"] = of_linear / own if own else 0.0
    return account


def attribution_error(account: dict[str, dict[str, float]]) -> float:
    """Σ over parts of the share of tr Cov(e) that lies where the paper does not read it.

    The paper reads NonlinearError as what the SAE introduced, and LinearError as all else.

    >>> attribution_error({"introduced": {"linear": 0.1, "nonlinear": 0.5}, "dense": {"linear": 0.2, "nonlinear": 0.2}})
    0.3...
    """
    return sum(abs(part["linear" if name == "introduced" else "nonlinear"]) for name, part in account.items())


def norm_r2(x: Tensor, part: Tensor) -> float:
    """R² of ‖part‖² from x, both [n, d_in]; fitted and scored on halves.

    >>> x = torch.randn(4000, 2)
    >>> round(norm_r2(x[:, :1].square(), x[:, :1]), 4)  # ‖part‖² is what is given
    1.0
    """
    half, row = len(x) // 2, torch.arange(len(x))
    fit, test = ([{"x": x[at], "part": part[at], "row": row[at]}] for at in (slice(half), slice(half, None)))
    return map_from(lambda b: b["x"], lambda b: b["part"].square().sum(1, keepdim=True), fit, test).r2()


def noise_grid(levels, n_known=(256, 192, 128), n: int = 8000, seed: int = 0) -> dict[str, Tensor]:
    """Shares of the error of `World`s, for every input noise and introduced error: `introduced` itself, and `nonlinear` as probed.

    levels: standard deviations of both. n_known: how many of the 256 features, the most frequent, the SAE has. Each [n_worlds].

    >>> {name: list(v.shape) for name, v in noise_grid([0.0, 0.5], n_known=(128,)).items()}
    {'n_known': [4], 'noise': [4], 'introduced': [4], 'nonlinear': [4]}
    """
    found = []
    for known, noise, introduced in itertools.product(n_known, map(float, levels), map(float, levels)):
        world = World(n_known=known, noise=noise, introduced=introduced, seed=seed)
        account = attribution(*world.draw(n))
        nonlinear = sum(part["nonlinear"] for part in account.values())
        found.append([known, noise, account["introduced"]["share"], nonlinear])
    return dict(zip(("n_known", "noise", "introduced", "nonlinear"), torch.tensor(found).T))
