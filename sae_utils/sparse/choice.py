"""Selection with one budget for the whole batch: over all latents and tokens, or with a quota for each latent."""

import torch
from torch import Tensor

from . import select_encode as sparse
from .select_encode import Active, Encode


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
        values, active = values.to(x.dtype), Active.by_token(token, entry - token * d_sae, len(x), d_sae)
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
        values, active = values[order], Active.by_token(token[order], indices[order], batch, d_sae)
    return Encode.apply(x, W_enc, b_enc, b_dec, centred, values, active), active, smallest
