"""What selecting one latent instead of another does to the model's predictions, beside what scores say it does.

Toggling a latent that is small follows the derivative almost by definition. What a selection rule decides is a swap: which of
two latents near the border a token gets.
"""

import numpy as np
import pandas as pd
import torch

from ..saes.base import measuring
from ..saes.topk import TopKSAE
from ..training.end_to_end import Suffix
from ..values import flag, whole
from .metrics import kl_divergence


@measuring
def swaps(
    sae, suffix: Suffix, batch: dict, n: int = 256, seed: int = 0, every: bool = False, at_once: int = 16
) -> pd.DataFrame:
    """n swaps of a TopK SAE's latents on the rows of a batch: a chosen latent i out, a runner-up j in, at one token.

        Δ = z_j d_j − z_i d_i,    d the rows of W_dec,    i among the k largest latents, j among the next k, positive ones only

    batch: x [rows, n_ctx, d_in] and tokens. Tokens (position ≥ 1), i and j are drawn evenly; with `every`, all k² pairs of n
    tokens drawn. Returns a row for each swap: `row`, `position`, `size` z_i, and in nats, with x̂ spliced in at every position ≥ 1,

    kl, kl_own: the change of KL(orig ‖ new) by Δ, summed over the row's positions, and at the token alone;
    before: KL(orig ‖ new) at the token before the swap; step: ‖Δ‖²; error: the change of ‖x − x̂‖²;
    the other columns: what a score says of the change; the lower, the better the swap. "z" is z_i − z_j. "z (1 + |d·g|), ce at x" is the
    literal score of g-SAE at β = 1, i's less j's, and the same with the mean of |d·g| over tokens. The others are g · Δ, g of
    `Suffix.gradient` by its `of` and where it is taken; "kl own" averages 16 draws of signs; "other tokens" permutes g over tokens,
    and "noise" has g's norm.

    at_once: swaps that are run together. Raises ValueError for an SAE of another class, d_sae < 2 k, or if no token has 2 k
    positive latents.

    >>> hook, tokens = "blocks.4.hook_resid_pre", torch.arange(64).view(1, 64)
    >>> from sae_utils.activations.hooks import run_prefix
    >>> batch = {"x": run_prefix(lm, tokens, [hook])[hook], "tokens": tokens}
    >>> found = swaps(TopKSAE(128, 256, k=4), Suffix(lm, hook), batch, n=8)
    >>> len(found), bool((found["kl own at x̂"] != 0).all())
    (8, True)
    """
    if not isinstance(sae, TopKSAE):
        raise ValueError(
            f"sae is a {type(sae).__name__}: swaps are between the latents that a TopKSAE chooses and the next"
        )
    if sae.d_sae < 2 * sae.k:
        raise ValueError(f"k={sae.k} of d_sae={sae.d_sae}: there are no {sae.k} runners-up to swap with")
    whole("at_once", at_once), flag("every", every)
    x = suffix.clean(batch).x[:, 1:].to(sae.W_dec.dtype)
    x_hat = sae(x).x_hat
    z = sae.pre_activations(x).relu().view(*x.shape[:2], -1)
    top = z.topk(2 * sae.k, -1)
    generator = torch.Generator().manual_seed(seed)
    able = (top.values[..., -1] > 0).nonzero()
    if not len(able):
        raise ValueError(
            f"no token of these has {2 * sae.k} positive latents, the {sae.k} chosen and as many to swap with"
        )
    at = able[torch.randint(len(able), (whole("n", n),), generator=generator).to(able.device)]
    if every:
        ranks = torch.cartesian_prod(torch.arange(sae.k), torch.arange(sae.k)).repeat(n, 1).T.to(at.device)
        at, n = at.repeat_interleave(sae.k**2, 0), n * sae.k**2
    else:
        ranks = torch.randint(sae.k, (2, n), generator=generator).to(at.device)
    at, ranks = at.T, ranks + torch.tensor([[0], [sae.k]], device=at.device)
    values, indices = top.values[*at], top.indices[*at]
    (z_out, z_in), (out, into) = values.gather(1, ranks.T).T, indices.gather(1, ranks.T).T
    delta = z_in[:, None] * sae.W_dec[into] - z_out[:, None] * sae.W_dec[out]

    clean = suffix.clean(batch).last.view(*x.shape[:2], -1)

    def kls(x_hat, rows, first=0):
        """KL(orig ‖ new) [rows, n_ctx − 1 − first]; the model is causal, so before the first position changed nothing changes."""
        last, _ = suffix.run(batch["tokens"][rows], torch.cat([batch["x"][rows, :1].to(x_hat), x_hat], 1), [])
        last = last.view(len(x_hat), -1, last.shape[-1])[:, first:]
        return kl_divergence(suffix.logits(clean[rows, first:]), suffix.logits(last))

    before = torch.cat([kls(x_hat[i : i + 1], torch.tensor([i])) for i in range(len(x))])
    change = x_hat.new_zeros(n, 2)
    for part in at[1].argsort().split(at_once):
        (rows, positions), each = at[:, part], torch.arange(len(part))
        new, first = x_hat[rows], int(positions[0])
        new[each, positions] += delta[part]
        by_position = kls(new, rows, first) - before[rows, first:]
        change[part] = torch.stack([by_position.sum(1), by_position[each, positions - first]], 1).to(change)
    found = {
        "row": at[0],
        "position": at[1] + 1,
        "size": z_out,
        "kl": change[:, 0],
        "kl_own": change[:, 1],
        "before": before[*at],
        "step": delta.square().sum(1),
        "error": (delta * (delta - 2 * (x - x_hat)[*at])).sum(1),
        "z": z_out - z_in,
    }

    gradients = {
        f"{of} at {where}": suffix.gradient(batch, to, of, seed=seed)
        for of, where, to in (
            ("ce", "x", None),
            ("sampled", "x", None),
            ("kl", "x̂", x_hat),
            ("ce", "x̂", x_hat),
            ("sampled", "x̂", x_hat),
        )
    }
    own = [suffix.gradient(batch, x_hat, "kl", own=True, seed=seed + i) for i in range(16)]
    gradients["kl own at x̂"] = sum(own) / len(own)
    gradients["kl own at x̂, one draw"] = own[0]
    kl = gradients["kl at x̂"]
    others = torch.randperm(kl[..., 0].numel(), generator=generator).to(kl.device)
    gradients["kl at x̂ of other tokens"] = kl.flatten(0, 1)[others].view_as(kl)
    noise = torch.randn(kl.shape, generator=generator).to(kl)
    gradients["noise of that size"] = noise * (kl.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    for name, g in gradients.items():
        found[name] = (g[*at] * delta).sum(1)
    effect = (gradients["ce at x"] @ sae.W_dec.T).abs()
    literal = 1 + effect / effect.mean()
    found["z (1 + |d·g|), ce at x"] = z_out * literal[*at, out] - z_in * literal[*at, into]
    mean = literal.flatten(0, 1).mean(0)
    found["z (1 + mean |d·g|), ce at x"] = z_out * mean[out] - z_in * mean[into]
    return pd.DataFrame({name: np.asarray(value.double().cpu()) for name, value in found.items()})
