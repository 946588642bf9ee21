"""Selection with one budget for the whole batch: over all latents and tokens, or with a quota for each latent."""

import torch
from torch import Tensor

from . import selection
from .bags import Active, stable_order
from .select_encode import encoder


@encoder
def mutual_encode(
    x: Tensor, W: Tensor, b: Tensor, budget: int, bound: float = 0.0, *, dtype: torch.dtype
) -> tuple[Tensor, Active, Tensor]:
    """The `budget` largest positive entries of x W + b: values [n], where they are, and the smallest (0 if fewer than the
    budget are positive). If as many lie above `bound`, the others are not looked at twice; the result is the same.
    """
    d_sae, weights = W.shape[1], (x.to(dtype), W.to(dtype), b.to(dtype))
    values, entry = above(*weights, budget, max(bound, 0.0))
    if len(values) < budget and bound > 0:
        values, entry = above(*weights, budget, 0.0)
    smallest = values.min() if len(values) == budget else values.new_zeros(())
    token = entry.div(d_sae, rounding_mode="floor")
    return values, Active.by_token(token, entry - token * d_sae, len(x), d_sae), smallest


def above(x: Tensor, W: Tensor, b: Tensor, budget: int, bound: float) -> tuple[Tensor, Tensor]:
    """The `budget` largest of the entries of x W + b above `bound` (all, if fewer are): values, and flat positions, rising."""
    d_sae = W.shape[1]
    values, entries = b.new_empty(0), torch.empty(0, dtype=torch.long, device=x.device)
    size = max(1, selection.WORKSPACE // d_sae)
    for start in range(0, len(x), size):
        z = selection.product(x[start : start + size], W, b, x.dtype).flatten()
        entry = (z > bound).nonzero().squeeze(1)
        values, entries = torch.cat([values, z[entry]]), torch.cat([entries, entry + start * d_sae])
        is_last = start + size >= len(x)
        if len(values) > (budget if is_last else 4 * budget):
            kept = values.topk(budget, sorted=False).indices.sort().values
            values, entries = values[kept], entries[kept]
            bound = values.min().item()
    return values, entries


@encoder
def feature_encode(
    x: Tensor, W: Tensor, b: Tensor, quota: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Active, Tensor]:
    """For latent i the quota[i] ≥ 1 largest positive of its column of x W + b: values, where they are, and the quota[i]-th
    largest of each relu'd column, [d_sae].

    Latents of like quota go together, at most twofold apart: each group takes the largest quota of its columns, by no full sort.
    """
    batch, d_sae = len(x), W.shape[1]
    columns = x.to(dtype).T
    falling, latents = quota.sort(descending=True, stable=True)
    sizes, start, found, smallest = falling.tolist(), 0, [], torch.empty_like(b)
    while start < d_sae:
        most, end = sizes[start], start
        while end < d_sae and 2 * sizes[end] > most and (end - start + 1) * batch <= max(selection.WORKSPACE, batch):
            end += 1
        group, m = latents[start:end], falling[start:end, None]
        out = selection.workspace(end - start, batch, dtype, x.device)
        z = torch.addmm(b[group, None].to(dtype), W.T[group].to(dtype), columns, out=out)
        top = z.topk(most, dim=1)
        smallest[group] = top.values.gather(1, m - 1).squeeze(1).relu().to(b.dtype)
        kept = (top.values > 0) & (torch.arange(most, device=x.device) < m)
        found.append((top.values[kept], top.indices[kept], group[kept.nonzero()[:, 0]]))
        start = end
    values, token, indices = map(torch.cat, zip(*found))
    order = stable_order(token, batch)
    return values[order], Active.by_token(token[order], indices[order], batch, d_sae), smallest
