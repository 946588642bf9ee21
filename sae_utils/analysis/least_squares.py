"""Linear maps fitted by least squares from running sums, and how well they predict."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS_PER_INPUT = 40  # tokens that a fit asks for, for each of its inputs


@dataclass
class Linear:
    """u → u W + c; W [d_u, d_v], c [d_v]."""

    W: Tensor
    c: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        return u @ self.W.to(u.dtype) + self.c.to(u.dtype)


class Moments:
    """Sums in fp64 over tokens of (u, v), from which v is regressed on u. Memory does not grow with the number of tokens."""

    n = d_u = total = gram = 0  # total: Σ (u, v); gram: Σ uᵀ (u, v)

    def add(self, u: Tensor, v: Tensor) -> None:
        """u [n, d_u], v [n, d_v]."""
        self.n, self.d_u = self.n + len(u), u.shape[1]
        for part in torch.cat([u, v], 1).split(2048):
            both = part.double()
            self.total += both.sum(0)
            self.gram += both[:, : self.d_u].T @ both

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [d_u + d_v] of (u, v), and covariance over n of u with (u, v), [d_u, d_u + d_v]."""
        mean = self.total / self.n
        return mean, self.gram / self.n - mean[: self.d_u, None] * mean

    def fit(self, rows_per_input: int = ROWS_PER_INPUT) -> Linear:
        """argmin E‖u W + c − v‖². Raises ValueError if there are fewer than rows_per_input · d_u tokens."""
        d, need = self.d_u, rows_per_input * max(self.d_u, 1)
        if self.n < need:
            few = f"{self.n:,} tokens to fit a probe of {d} inputs on, and it wants {rows_per_input} for each input"
            raise ValueError(
                f"{few}. Harvest {need:,} fitting tokens or more, and as many to test it, in other contexts"
            )
        mean, cov = self.covariance()
        W = solve(cov[:, :d], cov[:, d:])
        return Linear(W, mean[d:] - mean[:d] @ W)


def solve(A: Tensor, B: Tensor) -> Tensor:
    """A⁻¹ B for a covariance A. Directions without variance (1e-12 of the largest) take no part."""
    return torch.linalg.pinv(A, rtol=1e-12, hermitian=True) @ B


class Scores:
    """R² = 1 − Σ‖v − prediction‖² / Σ‖v − v̄‖² of held-out tokens, from sums that are kept for every context.

    Both sums run over coordinates as well, so that coordinates with much variance count for more.
    """

    contexts = None  # [n_contexts, 3 + d]: n, ‖residual‖², ‖v‖², v
    coordinates = 0  # [2, d]: residual², v²

    def add(self, v: Tensor, residual: Tensor, context: Tensor | None = None) -> None:
        """v and residual = v − prediction [n, d], context [n] whole numbers ≥ 0 (by default all tokens are of one)."""
        v, residual = v.double(), residual.double()
        context = v.new_zeros(len(v), dtype=torch.long) if context is None else context
        self.coordinates += torch.stack([residual.square().sum(0), v.square().sum(0)])
        lengths = [part.square().sum(1, keepdim=True) for part in (residual, v)]
        about = torch.cat([v.new_ones(len(v), 1), *lengths, v], 1)
        self.contexts = about[:0] if self.contexts is None else self.contexts
        if (more := int(context.max()) + 1 - len(self.contexts)) > 0:
            self.contexts = pad(self.contexts, (0, 0, 0, more))
        self.contexts.index_add_(0, context, about)

    def r2(self) -> float:
        return 1 - float(self.draws(0)[0])

    def per_coordinate(self) -> Tensor:
        """R² of every coordinate, [d]. It is NaN for a coordinate without variance."""
        total = self.contexts.sum(0)
        return 1 - self.coordinates[0] / (self.coordinates[1] - total[3:].square() / total[0])

    def draws(self, n: int = 1000, seed: int = 0) -> Tensor:
        """1 − R² [1 + n]: of all contexts, then with contexts drawn again (a bootstrap in which the probe stays).

        Scores of the same contexts draw the same ones for equal seeds, so that differences and ratios of them are paired.
        """
        used = self.contexts[self.contexts[:, 0] > 0]
        total = resamples(len(used), n, seed).to(used) @ used
        return (total[:, 1] / (total[:, 2] - total[:, 3:].square().sum(1) / total[:, 0])).cpu()


def resamples(n: int, n_draws: int = 1000, seed: int = 0) -> Tensor:
    """How often each of n contexts counts, [1 + n_draws, n]: once, then as often as it is drawn with replacement."""
    drawn = torch.randint(n, (n_draws, n), generator=torch.Generator().manual_seed(seed))
    drawn = torch.cat([torch.arange(n)[None], drawn])
    return torch.zeros(drawn.shape, dtype=torch.double).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def with_interval(draws: Tensor) -> list[float]:
    """[value, low, high] of bootstrap draws [1 + n], of which the first is the value. The interval holds 95% of the others.

    >>> with_interval(torch.tensor([0.5, *torch.linspace(0, 1, 41)]))  # to 6 digits
    [0.5, 0.025..., 0.975...]
    """
    ends = torch.tensor([(1 - 0.95) / 2, (1 + 0.95) / 2], dtype=draws.dtype)
    return [float(draws[0]), *draws[1:].quantile(ends).tolist()]


def power_law(sizes, scores: list[Scores]) -> Tensor:
    """b of 1 − R² ∝ size^b by least squares of logarithms, [1 + n]: of all contexts, then of draws (`Scores.draws`).

    >>> v, scores = torch.tensor([[1.0], [-1.0]]), [Scores(), Scores()]
    >>> scores[0].add(v, v / 2), scores[1].add(v, v / 4)  # 1 − R² is 1/4, then 1/16
    (None, None)
    >>> round(float(power_law([1, 2], scores)[0]), 4)
    -2.0
    """
    log_left = torch.stack([score.draws().clamp_min(1e-30).log() for score in scores])
    return torch.from_numpy(np.polyfit(np.log(list(sizes)), log_left.numpy(), 1)[0])


def in_batches(x: Tensor, n_ctx: int = 256, size: int = 8192) -> list[dict]:
    """A tensor [n, d_in] as a stream; every n_ctx tokens count as a context.

    >>> [batch["row"].tolist() for batch in in_batches(torch.randn(5, 2), n_ctx=2, size=3)]
    [[0, 0, 1], [1, 2]]
    """
    row = torch.arange(len(x), device=x.device) // n_ctx
    return [{"x": part, "row": at} for part, at in zip(x.split(size), row.split(size))]


def slices(stream, size: int = 2048):
    """The stream in slices so small that fp64 copies of them take little memory."""
    for batch in stream:
        for i in range(0, len(batch["x"]), size):
            yield {key: value[i : i + size] for key, value in batch.items()}
