"""Linear maps fitted by least squares from running sums, and how well they predict."""

from dataclasses import dataclass

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Least squares from sums
# ---------------------------------------------------------------------------------------------------------------------
ROWS_PER_INPUT = 40


@dataclass
class Linear:
    """u → u W + c; W [d_u, d_v], c [d_v]."""

    W: Tensor
    c: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        return u @ self.W.to(u.dtype) + self.c.to(u.dtype)


class Moments:
    """Sums in fp64 over tokens of (u, v), from which v is regressed on u; memory does not grow with tokens.

    joint: keep Σ vᵀv as well, which `identity` reads. of: Moments of the same u with another v, for Σ uᵀu, which is most of the work.
    """

    def __init__(self, joint: bool = False, of: "Moments | None" = None):
        if joint and of:
            raise ValueError("Moments: joint=True keeps all sums, so there is nothing to take from those of `of`")
        self.n, self.joint, self.of, self.sums = 0, joint, of, None

    def add(self, u: Tensor, v: Tensor) -> None:
        """u [n, d_u], v [n, d_v]."""
        for part_u, part_v in zip(u.split(2048), v.split(2048)):
            both = torch.cat([part_u.double(), part_v.double()], 1)
            left = both if self.joint else both[:, : u.shape[1]]
            now = [both.sum(0), left.T @ (both[:, u.shape[1] :] if self.of else both)]
            self.sums = now if self.sums is None else [a.add_(b) for a, b in zip(self.sums, now)]
        self.n, self.d_u = self.n + len(u), u.shape[1]

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [d_u + d_v] and covariance over n of (u, v): its rows of u alone, or all if joint."""
        mean = self.sums[0] / self.n
        gram = (torch.cat([self.of.sums[1][:, : self.d_u], self.sums[1]], 1) if self.of else self.sums[1]) / self.n
        return mean, gram - mean[: len(gram), None] * mean

    def fit(self, rows_per_input: int = ROWS_PER_INPUT) -> Linear:
        """argmin E‖u W + c − v‖². Raises ValueError if there are fewer than rows_per_input · d_u tokens."""
        d, need = self.d_u if self.n else 0, rows_per_input * (self.d_u if self.n else 1)
        if self.n < need:
            raise ValueError(
                f"{self.n:,} tokens to fit a probe of {d} inputs on: it wants at least {rows_per_input} for each input. "
                f"Harvest {need:,} fitting tokens or more (and as many again, in other contexts, for the test)"
            )
        mean, cov = self.covariance()
        W = solve(cov[:d, :d], cov[:d, d:])
        return Linear(W, mean[d:] - mean[:d] @ W)


def solve(A: Tensor, B: Tensor) -> Tensor:
    """A⁻¹ B for a covariance A; directions without variance (1e-12 of the largest) take no part."""
    values, vectors = torch.linalg.eigh(A)
    inverse = torch.where(values > 1e-12 * values[-1].clamp_min(1e-300), 1 / values, 0)
    return vectors @ (inverse[:, None] * (vectors.T @ B))


class Scores:
    """R² = 1 − Σ‖v − prediction‖² / Σ‖v − v̄‖² of held-out tokens, from sums kept for every context.

    Pooled: both sums over coordinates as well, so that coordinates with much variance count for more.
    """

    def __init__(self):
        self.contexts = self.coordinates = None  # [n_contexts, 3 + d]: n, ‖residual‖², ‖v‖², v; [2, d]: residual², v²

    def add(self, v: Tensor, residual: Tensor, context: Tensor) -> None:
        """v and residual = v − prediction [n, d], context [n] whole numbers ≥ 0."""
        v, residual = v.double(), residual.double()
        squares = torch.stack([residual.square().sum(0), v.square().sum(0)])
        self.coordinates = squares if self.coordinates is None else self.coordinates + squares
        size, old = int(context.max()) + 1, self.contexts
        if old is None or len(old) < size:
            self.contexts = v.new_zeros(size, 3 + v.shape[1])
            if old is not None:
                self.contexts[: len(old)] = old
        about = [v.new_ones(len(v), 1), residual.square().sum(1, keepdim=True), v.square().sum(1, keepdim=True), v]
        self.contexts.index_add_(0, context, torch.cat(about, 1))

    def r2(self) -> float:
        return float(self.unexplained(torch.ones(1, len(self.contexts)).to(self.contexts)).neg().add(1))

    def per_coordinate(self) -> Tensor:
        """R² of every coordinate, [d]; NaN for one without variance."""
        total = self.contexts.sum(0)
        return 1 - self.coordinates[0] / (self.coordinates[1] - total[3:].square() / total[0])

    def draws(self, n: int = 1000, seed: int = 0) -> Tensor:
        """1 − R² [1 + n]: of all contexts, then with contexts drawn again (bootstrap; the probe stays).

        Scores of the same contexts draw the same ones for equal seeds, so that differences and ratios of them are paired.
        """
        used = self.contexts[self.contexts[:, 0] > 0]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(used), (n, len(used)), generator=generator).to(used.device)
        weights = torch.zeros(n, len(used), dtype=torch.double, device=used.device)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))
        return self.unexplained(torch.cat([torch.ones_like(weights[:1]), weights]), used).cpu()

    def interval(self, n: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of R²."""
        return tuple(with_interval(1 - self.draws(n, seed), level)[1:])

    def unexplained(self, weights: Tensor, contexts: Tensor | None = None) -> Tensor:
        total = weights @ (self.contexts if contexts is None else contexts)
        return total[:, 1] / (total[:, 2] - total[:, 3:].square().sum(1) / total[:, 0])


def with_interval(draws: Tensor, level: float = 0.95) -> list[float]:
    """[value, low, high] of bootstrap draws [1 + n], of which the first is the value."""
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=draws.dtype)
    return [float(draws[0]), *draws[1:].quantile(quantiles).tolist()]


def power_law(sizes, scores: list[Scores]) -> Tensor:
    """b of 1 − R² ∝ size^b by least squares of logarithms, [1 + n]: of all contexts, then of draws (`Scores.draws`)."""
    log_size = torch.tensor(list(sizes), dtype=torch.double).log()
    log_size = log_size - log_size.mean()
    log_left = torch.stack([score.draws().clamp_min(1e-30).log() for score in scores])
    return log_size @ log_left / log_size.square().sum()


def in_batches(x: Tensor, n_ctx: int = 256, size: int = 8192) -> list[dict]:
    """A tensor [n, d_in] as a stream; every n_ctx tokens count as a context."""
    row = torch.arange(len(x), device=x.device) // n_ctx
    return [{"x": part, "row": at} for part, at in zip(x.split(size), row.split(size))]


def slices(stream, size: int = 2048):
    """The stream in slices so small that what is computed of them in fp64 takes no memory to speak of."""
    for batch in stream:
        for i in range(0, len(batch["x"]), size):
            yield {key: value[i : i + size] for key, value in batch.items()}
