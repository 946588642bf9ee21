"""SAEs that spend one budget of active latents over a whole batch: Mutual Choice and Feature Choice (arXiv 2411.02124).

A batch of B tokens with k · B matches to give away: TopK gives k to every token, Feature Choice m_i to latent i (Zipf by rank of
how often latents fire), Mutual Choice makes no rule but the total. Both read a token's place in its batch, so at inference fixed
thresholds stand in: f = z ⊙ 1[z > θ]. No public code exists; what is our reading is said where it stands.
"""

import functools
import math

import torch
from torch import Tensor

from . import sparse
from .sae import ReluSAE, SAEOutput
from .sparse import Active, Encode, relu_encode


class MutualChoiceSAE(ReluSAE):
    """Keep the k · B largest latents of a batch of B tokens, whichever tokens and latents they belong to (BatchTopK's rule).

        training   latents = the k · B largest of relu(z) over the whole batch,    z = (x − b_dec) W_enc + b_enc
        inference  latents = z ⊙ 1[z > θ], one θ for all latents

    k: active latents per token on average; fewer where fewer pre-activations are positive. θ is a running mean of the
    smallest latent chosen (its last 100 batches or so); `calibrate` sets it on held-out activations. `density` [d_sae] is a
    running mean of the share of tokens on which a latent is chosen. Raises ValueError for k outside 1 … d_sae.
    """

    architecture = "jumprelu"

    def __init__(self, d_in: int, d_sae: int, k: int = 32):
        super().__init__(d_in, d_sae)
        if not isinstance(k, int) or not 1 <= k <= d_sae:
            raise ValueError(f"k={k!r}: active latents per token have to be between 1 and d_sae={d_sae}")
        self.k = k
        self.register_buffer("threshold", torch.zeros(d_sae))
        self.register_buffer("density", torch.zeros(d_sae))
        self.register_buffer("tokens_seen", torch.tensor(0))

    @property
    def arguments(self) -> dict:
        return super().arguments | {"k": self.k}

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        rows = self.rows(x)
        weights = self.W_enc, self.b_enc, self.b_dec
        if not self.training:
            return self.output(x, *relu_encode(rows, *weights, self.threshold))
        values, active, smallest = self.choose(rows)
        with torch.no_grad():
            self.tokens_seen += len(rows)
            rate = max(0.01, len(rows) / self.tokens_seen.item())
            chosen = torch.bincount(active.indices[values > 0], minlength=self.d_sae)
            self.density.lerp_((chosen / len(rows)).to(self.density.dtype), rate)
            self.threshold.lerp_(smallest.to(self.threshold.dtype).expand(self.d_sae), rate)
        return self.output(x, values, active)

    def choose(self, rows: Tensor) -> tuple[Tensor, Active, Tensor]:
        """The batch's latents by the training rule: values, where they are, and the smallest, of all or of every latent."""
        bound = 0.7 * self.threshold.min().item()  # a guess, which saves time where it is right
        return mutual_encode(rows, self.W_enc, self.b_enc, self.b_dec, self.k * len(rows), bound)

    def underused(self, s: float = 1.0, q: float = 10.0) -> Tensor:
        """Boolean [d_sae]: running density below k · (r + q)^(−s) / Σ, at most 1, r the rank by falling density (ours).

        A dead latent's density counts as 0 and a living one's as at least 1 / dead_after, since it fired in that time: under
        expectations of 0⁺ the underused are the dead.
        """
        density = torch.where(self.dead(), 0, self.density.clamp_min(1 / self.dead_after))
        expected = (self.k * zipf(self.d_sae, s, q)).clamp_max(1).to(density)
        order = density.argsort(descending=True, stable=True)
        return torch.empty_like(self.dead()).index_copy_(0, order, density[order] < expected)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set θ so that on these activations [..., d_in] (held out, thousands of tokens) the budget is met exactly."""
        smallest = self.choose(self.rows(x))[2].to(self.threshold.dtype)
        below = torch.nextafter(smallest, torch.full_like(smallest, -math.inf)).clamp_min(
            0
        )  # z > θ lets the smallest in
        self.threshold.copy_(below.expand(self.d_sae))


class FeatureChoiceSAE(MutualChoiceSAE):
    """Keep, of a batch of B tokens, the m_i on which latent i is largest; m_i falls with the latent's rank by Zipf's law.

        m_i ∝ (r_i + q)^(−s), 1 ≤ m_i ≤ B, Σ m_i = k · B,    r_i = 1, 2, … by falling running density
        inference  latents = z ⊙ 1[z > θ_i], one θ for every latent

    The paper leaves s, q, the cap and the ranks open; all of these, and m_i ≥ 1, are ours. Ranks mean nothing at first, so the first
    `warmup_tokens` are Mutual Choice (None: as many as `dead_after`, a tenth of the run under `train`). `quota` [d_sae] holds
    the m_i of the latest training forward, B for all during warm-up. θ_i is a running mean of the m_i-th largest relu(z_i): 0,
    so that any positive z is let in, for a latent whose quota is not used up.

    Raises ValueError, naming the batch that would do, if B < d_sae / k or more than half of the latents would have m_i < 1.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, s: float = 1.0, q: float = 10.0, warmup_tokens: int | None = None
    ):
        super().__init__(d_in, d_sae, k)
        if not (s >= 0 and q >= 0):
            raise ValueError(f"s={s!r}, q={q!r}: exponent and offset of Zipf's law have to be at least 0")
        self.s, self.q, self.warmup_tokens = s, q, warmup_tokens
        self.register_buffer("quota", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("warm", torch.tensor(True))

    @property
    def arguments(self) -> dict:
        return super().arguments | {"s": self.s, "q": self.q, "warmup_tokens": self.warmup_tokens}

    def choose(self, rows: Tensor) -> tuple[Tensor, Active, Tensor]:
        quotas = zipf_quotas(self.k, len(rows), self.d_sae, self.s, self.q)  # checks the batch, in warm-up too
        if self.training:
            self.warm.fill_(self.tokens_seen < (self.dead_after if self.warmup_tokens is None else self.warmup_tokens))
        if self.warm:
            self.quota.fill_(len(rows))
            return super().choose(rows)
        quota = torch.empty_like(self.quota)
        quota[self.density.argsort(descending=True, stable=True)] = quotas.to(quota.device)
        if self.training:
            self.quota.copy_(quota)
        return feature_encode(rows, self.W_enc, self.b_enc, self.b_dec, quota)


def zipf(n: int, s: float, q: float) -> Tensor:
    """Shares (r + q)^(−s) / Σ of the ranks r = 1 … n, [n], float64."""
    weights = (torch.arange(1, n + 1, dtype=torch.double) + q) ** -s
    return weights / weights.sum()


@functools.lru_cache(8)
def zipf_quotas(k: int, batch: int, n: int, s: float, q: float) -> Tensor:
    """Matches m_r [n], falling, for ranks r = 1 … n: whole numbers between 1 and `batch` that sum to k · batch.

    c · (r + q)^(−s) clamped to [1, batch], c such that the sum is right: what the cap cuts off goes to the others in
    proportion. Rounded by largest remainders. Raises ValueError as `FeatureChoiceSAE` says.
    """
    shares, budget = zipf(n, s, q), k * batch
    least = math.ceil(1 / (k * shares[n // 2].item()))
    if batch < max(least, n / k):
        raise ValueError(
            f"a batch of {batch:,} tokens gives {(budget * shares < 1).double().mean():.0%} of the {n:,} latents less than "
            f"one match: use batches of at least {max(least, math.ceil(n / k)):,} tokens, a larger k (now {k}), a smaller s "
            f"({s:g}), or a larger q ({q:g})"
        )
    low, high = 0.0, batch / shares[-1].item()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * shares).clamp(1, batch).sum() < budget else (low, middle)
    real = (high * shares).clamp(1, batch)
    whole = real.floor()
    missing = int(budget - whole.sum())
    whole[(real - whole).argsort(descending=True, stable=True)[:missing]] += 1
    return whole.long()


def zipf_fit(density: Tensor) -> tuple[float, float]:
    """(s, q) of density ≈ c (r + q)^(−s), by least squares of log density on log(r + q) over the latents that fire.

    q is searched on a grid of 0 and 60 values up to the number of latents; s follows. Needs at least 3 latents that fire.
    """
    d = density.double().cpu()
    d = d[d > 0].sort(descending=True).values.log()
    if len(d) < 3:
        raise ValueError(f"{len(d)} latents fire: a fit of Zipf's law needs at least 3")
    best = (math.inf, 0.0, 0.0)
    for q in [0.0, *torch.logspace(-1, math.log10(len(d)), 60).tolist()]:
        t = (torch.arange(1, len(d) + 1, dtype=torch.double) + q).log()
        t, y = t - t.mean(), d - d.mean()
        slope = (t @ y) / (t @ t)
        best = min(best, ((y - slope * t).square().sum().item(), -slope.item(), q))
    return best[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Selection. Of the pre-activations only `sparse.WORKSPACE` are held at once, so budgets may be larger than memory.
# ---------------------------------------------------------------------------------------------------------------------


def mutual_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, budget: int, bound: float = 0.0
) -> tuple[Tensor, Active, Tensor]:
    """The `budget` largest positive entries of (x − b_dec) W_enc + b_enc: values [n], where they are, and the smallest (0 if fewer
    than the budget are positive). If as many lie above `bound`, the others are not looked at twice; the result is the same.
    """
    half = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        centred, d_sae = x - b_dec, W_enc.shape[1]
        values, entry = above(centred.to(half), W_enc.to(half), b_enc.to(half), budget, max(bound, 0.0))
        if len(values) < budget and bound > 0:
            values, entry = above(centred.to(half), W_enc.to(half), b_enc.to(half), budget, 0.0)
        smallest = values.min() if len(values) == budget else values.new_zeros(())
        token = entry.div(d_sae, rounding_mode="floor")
        values, active = values.to(x.dtype), by_token(token, entry - token * d_sae, len(x), d_sae)
    return Encode.apply(x, W_enc, b_enc, b_dec, centred, values, active), active, smallest


def above(x: Tensor, W: Tensor, b: Tensor, budget: int, bound: float) -> tuple[Tensor, Tensor]:
    """The `budget` largest of the entries of x W + b above `bound` (all, if fewer are): values, and flat positions, rising."""
    d_sae = W.shape[1]
    values, entries = [b.new_empty(0)], [torch.empty(0, dtype=torch.long, device=x.device)]
    size = max(1, sparse.WORKSPACE // d_sae)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        z = torch.addmm(b, part, W, out=sparse.workspace((len(part), d_sae), x.dtype, x.device)).flatten()
        entry = (z > bound).nonzero().squeeze(1)
        values, entries = [*values, z[entry]], [*entries, entry + start * d_sae]
        if start + size >= len(x) or sum(map(len, values)) > 4 * budget:
            found, entry = torch.cat(values), torch.cat(entries)
            if len(found) > budget:
                kept = found.topk(budget, sorted=False).indices.sort().values
                found, entry = found[kept], entry[kept]
                bound = max(bound, found.min().item() if start + size < len(x) else bound)
            values, entries = [found], [entry]
    return values[0], entries[0]


def feature_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, quota: Tensor
) -> tuple[Tensor, Active, Tensor]:
    """For latent i the quota[i] ≥ 1 largest positive of its column of (x − b_dec) W_enc + b_enc: values, where they are, and
    the quota[i]-th largest of each relu'd column, [d_sae].

    Latents of like quota go together, at most twofold apart: each group takes the largest quota of its columns, by no full sort.
    """
    half = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
    batch, d_sae = len(x), W_enc.shape[1]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        centred = x - b_dec
        columns = centred.to(half).T
        falling, latents = quota.sort(descending=True, stable=True)
        sizes, start, found, smallest = falling.tolist(), 0, [], torch.empty_like(b_enc)
        while start < d_sae:
            most, end = sizes[start], start
            while end < d_sae and 2 * sizes[end] > most and (end - start + 1) * batch <= max(sparse.WORKSPACE, batch):
                end += 1
            group, m = latents[start:end], falling[start:end, None]
            out = sparse.workspace((end - start, batch), half, x.device)
            z = torch.addmm(b_enc[group, None].to(half), W_enc.T[group].to(half), columns, out=out)
            top = z.topk(most, dim=1)
            smallest[group] = top.values.gather(1, m - 1).squeeze(1).relu().to(smallest.dtype)
            kept = (top.values > 0) & (torch.arange(most, device=x.device) < m)
            found.append((top.values[kept].to(x.dtype), top.indices[kept], group[kept.nonzero()[:, 0]]))
            start = end
        values, token, indices = map(torch.cat, zip(*found))
        order = token.argsort(stable=True)
        values, active = values[order], by_token(token[order], indices[order], batch, d_sae)
    return Encode.apply(x, W_enc, b_enc, b_dec, centred, values, active), active, smallest


def by_token(token: Tensor, indices: Tensor, batch: int, d_sae: int) -> Active:
    """`Active` of entries that come token after token, of which some tokens may have none."""
    offsets = torch.zeros(batch + 1, dtype=torch.long, device=token.device)
    torch.cumsum(torch.bincount(token, minlength=batch), 0, out=offsets[1:])
    active = Active(indices, offsets, d_sae)
    active.token = token
    return active
