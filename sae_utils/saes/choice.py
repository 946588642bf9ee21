"""SAEs that spend one budget of active latents over a whole batch: Mutual Choice and Feature Choice (arXiv 2411.02124).

A batch of B tokens with k · B matches to give away: TopK gives k to every token, Feature Choice m_i to latent i (Zipf by rank of
the demand for it), Mutual Choice makes no rule but the total. Both read a token's place in its batch, so at inference fixed
thresholds stand in: f = z ⊙ 1[z > θ]. No public code exists; what is our reading is said where it stands.
"""

import functools
import math

import torch
from torch import Tensor

from ..sparse.bags import Active
from ..sparse.choice import feature_encode, mutual_encode
from ..sparse.select_encode import relu_encode
from ..values import one_of, real, whole
from .base import SAEOutput, inference
from .relu import ReluSAE

QUOTAS = ("zipf", "demand", "frozen")


class MutualChoiceSAE(ReluSAE):
    """Keep the k · B largest latents of a batch of B tokens, whichever tokens and latents they belong to (BatchTopK's rule).

        training   latents = the k · B largest of relu(z) over the whole batch,    z = (x − b_dec) W_enc + b_enc
        inference  latents = z ⊙ 1[z > θ], one θ for all latents

    k: active latents per token on average; fewer where fewer pre-activations are positive. θ is a running mean of the
    smallest latent chosen (its last 100 batches or so); `calibrate` sets it on held-out activations. `density` [d_sae] is a
    running mean of the share of tokens on which a latent is chosen. Raises ValueError for k outside 1 … d_sae.

    >>> out = MutualChoiceSAE(8, 32, k=2)(torch.randn(100, 8))
    >>> int((out.latents > 0).sum())  # k · B, shared out freely
    200
    """

    architecture = "jumprelu"
    objective = "reconstruction_loss"

    def __init__(self, d_in: int, d_sae: int, k: int = 32):
        super().__init__(d_in, d_sae)
        self.k = whole("k", k, 1, self.d_sae)
        self.register_buffer("threshold", torch.zeros(d_sae))
        self.register_buffer("density", torch.zeros(d_sae))
        self.register_buffer("tokens_seen", torch.tensor(0))

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        rows = self.rows(x)
        weights = self.W_enc, self.b_enc, self.b_dec
        if not self.training:
            return self.output(x, *relu_encode(rows, *weights, self.threshold))
        values, active, smallest = self.choose(rows)
        with torch.no_grad():
            rate = self.follow(self.density, values, active, len(rows))
            self.threshold.lerp_(smallest.to(self.threshold.dtype).expand(self.d_sae), rate)
            self.tokens_seen += len(rows)
        return self.output(x, values, active)

    @torch.no_grad()
    def follow(self, running: Tensor, values: Tensor, active: Active, batch: int) -> float:
        """Move a running mean towards the share of a batch's tokens on which each latent is chosen; returns by how much."""
        rate = max(0.01, batch / (self.tokens_seen.item() + batch))
        chosen = torch.bincount(active.indices[values > 0], minlength=self.d_sae)
        running.lerp_((chosen / batch).to(running.dtype), rate)
        return rate

    def choose(self, rows: Tensor) -> tuple[Tensor, Active, Tensor]:
        """The batch's latents by the training rule: values, where they are, and the smallest, of all or of every latent."""
        bound = 0.7 * self.threshold.min().item()  # a guess, which saves time where it is right
        return mutual_encode(rows, self.W_enc, self.b_enc, self.b_dec, self.k * len(rows), bound)

    def underused(self, s: float | None = None, q: float | None = None, share: float = 0.3) -> Tensor:
        """Boolean [d_sae]: running density below `share` of k · (r + q)^(−s) / Σ, at most 1, r the rank by falling density (ours).

        s, q None: as `zipf_fit` finds them for the running density. A dead latent's density counts as 0 and a living one's as at
        least 1 / dead_after, since it fired in that time: under expectations of 0⁺ the underused are the dead.
        """
        if s is None or q is None:
            s, q = zipf_fit(self.density)
        density = torch.where(self.dead(), 0, self.density.clamp_min(1 / self.dead_after))
        expected = share * (self.k * zipf(self.d_sae, s, q)).clamp_max(1).to(density)
        order = density.argsort(descending=True, stable=True)
        return torch.empty_like(self.dead()).index_copy_(0, order, density[order] < expected)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set θ so that on these activations [..., d_in] (held out, thousands of tokens) the budget is met exactly.

        Raises ValueError if Feature Choice cannot give every latent one of k · n matches.
        """
        with inference(self):
            smallest = self.choose(self.rows(x))[2].to(self.threshold.dtype)
        below = smallest.nextafter(torch.tensor(-math.inf).to(smallest)).clamp_min(0)  # z > θ lets the smallest in
        self.threshold.copy_(below.expand(self.d_sae))


class FeatureChoiceSAE(MutualChoiceSAE):
    """Keep, of a batch of B tokens, the m_i on which latent i is largest; m_i falls with the demand for the latent by Zipf's law.

        m_i ∝ (r_i + q)^(−s), 1 ≤ m_i ≤ B, Σ m_i = k · B,    r_i = 1, 2, … by falling demand
        inference  latents = z ⊙ 1[z > θ_i], one θ for every latent

    `demand` [d_sae] is a running mean of the share of tokens on which Mutual Choice would choose the latent. It costs a second
    selection, but density cannot rank latents: the quotas determine it. The paper leaves s, q, the cap and the ranks open; all
    of these, and m_i ≥ 1, are ours. Demand means nothing at first, so the first `warmup_tokens` are Mutual Choice (None: as many
    as `dead_after`, a tenth of the run under `train`). s and q, where not given, are fitted to the demand by `zipf_fit` then and
    after about every 32 batches more. `law` [2] holds both (0 before), `quota` [d_sae] the m_i of the latest training forward, B for
    all during warm-up. θ_i is a running mean of the m_i-th largest relu(z_i): 0, so that any positive z is let in, for a latent
    whose quota is not used up.

    quotas: "zipf" is the above. Beside it, to compare with: "demand", m_i ∝ demand without a law (ours), and "frozen", law and
    ranks as they are at the end of the warm-up.

    Raises ValueError, naming the batch that would do, if B < d_sae / k, or if given s and q leave more than half of the latents
    with m_i < 1.

    >>> sae = FeatureChoiceSAE(8, 4, k=1, s=1.0, q=0.0, warmup_tokens=0)
    >>> _ = sae(torch.randn(25, 8))
    >>> sorted(sae.quota.tolist())  # 25 matches as 1 : 1/2 : 1/3 : 1/4
    [3, 4, 6, 12]
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int = 32,
        s: float | None = None,
        q: float | None = None,
        warmup_tokens: int | None = None,
        quotas: str = "zipf",
    ):
        super().__init__(d_in, d_sae, k)
        if (s is None) != (q is None):
            raise ValueError(f"s={s!r}, q={q!r}: give both, exponent and offset of Zipf's law, or both None")
        s, q = (None if value is None else real(name, value, 0) for name, value in (("s", s), ("q", q)))
        warmup_tokens = None if warmup_tokens is None else whole("warmup_tokens", warmup_tokens, 0)
        self.quotas = one_of("quotas", quotas, QUOTAS)
        if quotas == "demand" and s is not None:
            raise ValueError("quotas='demand' follows no law: leave s and q at None, or use quotas='zipf'")
        if warmup_tokens == 0 and quotas != "zipf":
            raise ValueError(
                f"warmup_tokens=0: without a warm-up no demand is known, and quotas={quotas!r} needs it. Give some, or None"
            )
        if s is None and self.d_sae < 3:
            raise ValueError(f"d_sae={d_sae}: a fit of Zipf's law needs at least 3 latents, so give s and q")
        if s is None and warmup_tokens == 0:
            raise ValueError(
                "warmup_tokens=0: without a warm-up there is nothing to fit Zipf's law to, so give s and q"
            )
        self.s, self.q, self.warmup_tokens = s, q, warmup_tokens
        self.register_buffer("law", torch.zeros(2, dtype=torch.double))
        self.register_buffer("demand", torch.zeros(d_sae))
        self.register_buffer("quota", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("warm", torch.tensor(True))

    def choose(self, rows: Tensor) -> tuple[Tensor, Active, Tensor]:
        if not self.training and self.warm:
            return super().choose(rows)
        if self.training:
            given = (0.0, 0.0) if self.s is None else (self.s, self.q)  # at (0, 0) all get k · B / d_sae
            zipf_quotas(self.k, len(rows), self.d_sae, *given)  # refuses a batch too small, in warm-up too
            was_warm = self.warm.item()
            warmup = self.dead_after if self.warmup_tokens is None else self.warmup_tokens
            self.warm.fill_(was_warm and self.tokens_seen.item() < warmup)  # once over it does not come back
            if self.warm or self.quotas != "frozen":
                found = super().choose(rows)
                self.follow(self.demand, *found[:2], len(rows))
            if self.warm:
                self.quota.fill_(len(rows))
                return found
            if was_warm or (self.quotas != "frozen" and self.tokens_seen % (32 * len(rows)) < len(rows)):
                self.law.copy_(torch.tensor(zipf_fit(self.demand) if self.s is None else given))
        quota = self.quotas_for(len(rows))
        if self.training:
            self.quota.copy_(quota)
        return feature_encode(rows, self.W_enc, self.b_enc, self.b_dec, quota)

    def quotas_for(self, batch: int) -> Tensor:
        """m_i [d_sae] for a batch of this many tokens."""
        if self.k * batch < self.d_sae:
            least = math.ceil(self.d_sae / self.k)
            raise ValueError(f"{batch:,} tokens are too few for one match for every latent: give at least {least:,}")
        if self.quotas == "demand":
            return shared_out(self.demand.double().cpu(), self.k * batch, batch).to(self.quota.device)
        quotas = zipf_quotas(self.k, batch, self.d_sae, *self.law.tolist(), check=self.s is not None)
        order = self.demand.argsort(descending=True, stable=True)
        return torch.empty_like(self.quota).index_copy_(0, order, quotas.to(order.device))


def zipf(n: int, s: float, q: float) -> Tensor:
    """Shares (r + q)^(−s) / Σ of the ranks r = 1 … n, [n], float64.

    >>> [round(11 * share, 6) for share in zipf(3, s=1.0, q=0.0).tolist()]
    [6.0, 3.0, 2.0]
    """
    weights = (torch.arange(1, n + 1, dtype=torch.double) + q) ** -s
    return weights / weights.sum()


@functools.lru_cache(8)
def zipf_quotas(k: int, batch: int, n: int, s: float, q: float, check: bool = True) -> Tensor:
    """Matches m_r [n], falling, for ranks r = 1 … n: whole numbers between 1 and `batch` that sum to k · batch.

    c · (r + q)^(−s) clamped to [1, batch], c such that the sum is right: what the cap cuts off goes to the others in
    proportion. Rounded by largest remainders. Raises ValueError as `FeatureChoiceSAE` says, unless told not to `check`.
    """
    shares, budget = zipf(n, s, q), k * batch
    least = math.ceil(1 / (k * shares[n // 2].item()))
    if check and batch < max(least, n / k):
        raise ValueError(
            f"a batch of {batch:,} tokens gives {(budget * shares < 1).double().mean():.0%} of the {n:,} latents less than "
            f"one match: use batches of at least {max(least, math.ceil(n / k)):,} tokens, a larger k (now {k}), a smaller s "
            f"({s:g}), or a larger q ({q:g})"
        )
    return shared_out(shares, budget, batch)


def shared_out(shares: Tensor, budget: int, most: int) -> Tensor:
    """`budget` things shared out, [n]: whole numbers from 1 to `most`, as near to c · shares as these bounds allow.

    Rounded by largest remainders; n ≤ budget ≤ n · most.

    >>> shared_out(torch.tensor([0.7, 0.2, 0.1, 0.0]), 10, 6)
    tensor([6, 2, 1, 1])
    """
    shares = shares.clamp_min(1e-12)  # what has a share of 0 gets 1, or an equal part of what the cap leaves over
    low, high = 0.0, most / shares.min().item()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * shares).clamp(1, most).sum() < budget else (low, middle)
    real = (high * shares).clamp(1, most)
    whole = real.floor()
    missing = int(budget - whole.sum())
    whole[(real - whole).argsort(descending=True, stable=True)[:missing]] += 1
    return whole.long()


def zipf_fit(density: Tensor) -> tuple[float, float]:
    """(s, q) of density ≈ c (r + q)^(−s) over the latents that fire, by least squares of log density on log(r + q).

    Rank r weighs 1/r, so that each tenfold of ranks counts alike and the many rare latents do not outvote the rest. q is
    searched on a grid of 0 and 60 values from 0.1 to the number of latents; s follows. ValueError if fewer than 3 fire.

    >>> s, q = zipf_fit(zipf(100, s=1.0, q=0.0))
    >>> round(s, 6), q
    (1.0, 0.0)
    """
    d = density.double().cpu()
    d = d[d > 0].sort(descending=True).values.log()
    if len(d) < 3:
        raise ValueError(f"{len(d)} latents fire: a fit of Zipf's law needs at least 3")
    r = torch.arange(1, len(d) + 1, dtype=torch.double)
    weight = (1 / r) / (1 / r).sum()
    q = torch.cat([torch.zeros(1, dtype=torch.double), torch.logspace(-1, math.log10(len(d)), 60, dtype=torch.double)])
    t = (r + q[:, None]).log()
    t, y = t - (t @ weight)[:, None], d - d @ weight
    slope = (t * y) @ weight / (t.square() @ weight)
    best = ((y - slope[:, None] * t).square() @ weight).argmin()
    return max(0.0, -slope[best].item()), q[best].item()


def zipf_error(density: Tensor, s: float, q: float) -> float:
    """Root mean square of log(density / law) over the latents that fire, rank r weighted by 1/r as in `zipf_fit`; 0.1 is about 10%.

    The law, c (r + q)^(−s), has the c that fits best.

    >>> zipf_error(2 * zipf(100, s=1.0, q=3.0), 1.0, 3.0) < 1e-9
    True
    """
    d = density.double().cpu()
    d = d[d > 0].sort(descending=True).values.log()
    r = torch.arange(1, len(d) + 1, dtype=torch.double)
    off, weight = d + s * (r + q).log(), (1 / r) / (1 / r).sum()
    return ((off - off @ weight).square() @ weight).sqrt().item()
