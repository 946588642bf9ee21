"""What an SAE is judged by, each number defined once.

All sums run over the tokens named beside them and over d_in. Position 0 is left out everywhere unless said otherwise: it is an
outlier in most models. Cross-entropies are in nats per predicted token.
"""

import collections
import math

import numpy as np
import torch
from torch import Tensor

from ..activations.hooks import check_tokens, later_layers, run_prefix, run_spliced
from ..saes.base import SAEOutput, check_parameters, high_norm, measuring, typical
from ..training.losses import as_batch
from ..values import whole
from .least_squares import Scores


class ReconstructionSums:
    """Running sums over activations from which FVU, γ, L0 and densities follow exactly, in float64.

        FVU       = Σ‖x − x̂‖² / Σ‖x − x̄‖²                     0 perfect, 1 no better than the mean x̄ of the whole set
        fvu_ordinary = the same over tokens that are not of high norm by `usual` (`typical`); of all where none is given
        γ         = Σ‖x̂‖² / Σ x̂·x                              1 unbiased, < 1 shrinkage (arXiv 2404.16014, eq. 10)
        γ_centred = the same of x − x̄ and x̂ − x̂̄ (ours: a large mean hides shrinkage)
        L0        = active latents per token
        density   = share of tokens on which a latent is active, [d_sae];   dead = share of latents never active here

    γ is a ratio of sums over the whole set, not a mean of ratios. An all-zero x̂ has no γ: nan.
    """

    def __init__(self, usual: tuple[Tensor, Tensor] | None = None):
        self.usual = usual
        self.sums = self.fired = 0  # sums: of all tokens and of ordinary ones, [2, 5 + 2 d_in]

    def add(self, x: Tensor, x_hat: Tensor, fired: Tensor) -> None:
        """x, x_hat [n, d_in]; fired [d_sae], on how many of these tokens each latent is active."""
        x, x_hat = x.double(), x_hat.double()
        products = x.square(), x_hat.square(), x_hat * x, (x - x_hat).square()
        about = torch.cat([x.new_ones(len(x), 1), *(p.sum(1, keepdim=True) for p in products), x, x_hat], 1)
        ordinary = x.new_ones(len(x)) if self.usual is None else (~high_norm(x, *self.usual)).double()
        self.sums = self.sums + torch.stack([about.sum(0), ordinary @ about])
        self.fired = self.fired + fired

    def result(self) -> dict[str, float]:
        n, xx, hh, hx, ee = self.sums[:, :5].T  # of all tokens, then of ordinary ones
        mean, mean_hat = (self.sums[:, 5:] / n[:, None]).chunk(2, dim=1)
        fvu = ee / (xx - n * mean.square().sum(1))
        gamma_centred = (hh - n * mean_hat.square().sum(1)) / (hx - n * (mean_hat * mean).sum(1))
        values = {"l0": self.fired.sum() / n[0], "fvu": fvu[0], "fvu_ordinary": fvu[1], "gamma": hh[0] / hx[0]}
        values |= {"gamma_centred": gamma_centred[0], "dead_fraction": (self.fired == 0).double().mean()}
        return {key: float(value) for key, value in values.items()}

    def density(self) -> Tensor:
        return self.fired / self.sums[0, 0]


def times_fired(out) -> Tensor:
    """On how many tokens each latent of an output is active, [d_sae]; of sparse ones no dense form is made."""
    if not isinstance(out, SAEOutput) or out.active is None:
        return (out.latents > 0).flatten(0, -2).sum(0)
    return torch.bincount(out.active.indices[out.values.flatten() > 0], minlength=out.active.d_sae)


def kl_divergence(logits: Tensor, logits_new: Tensor) -> Tensor:
    """KL(orig ‖ new) = Σ_v p_orig (log p_orig − log p_new) in nats, over the last axis.

    >>> kl_divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.1438)
    """
    log_p, log_q = logits.float().log_softmax(-1), logits_new.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def ce_recovered(ce_sae: float, ce_clean: float, ce_ablated: float) -> float:
    """1 − (CE_sae − CE_clean) / (CE_ablated − CE_clean): 1 is lossless, 0 no better than the ablation."""
    gap = ce_ablated - ce_clean
    return 1 - (ce_sae - ce_clean) / gap if gap else math.nan


def prepared(sae, lm, rows, batch_rows: int) -> tuple[dict, tuple[Tensor, ...]]:
    """{name: SAE or callable} and the rows in chunks on the model's device; ValueError for what cannot be measured."""
    saes = sae if isinstance(sae, dict) else {"": sae}
    if not saes or not all(callable(one) and not isinstance(one, type) for one in saes.values()):
        raise ValueError(f"sae is {sae!r:.100}: it has to be an SAE, or a dictionary {{name: sae}} of one SAE or more")
    for name, one in saes.items():
        check_parameters(one, name)
    rows = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    check_tokens(lm, rows)
    if rows.shape[1] < 3:
        raise ValueError(f"rows has n_ctx={rows.shape[1]}: it has to be at least 3, since position 0 is left out")
    return saes, torch.from_numpy(rows.astype("int64")).to(lm.cfg.device).split(whole("batch_rows", batch_rows))


@measuring
def evaluate(sae, lm, rows, hook_name: str, *, batch_rows: int = 16, densities: dict | None = None):
    """Measure one SAE, or several on the same tokens (`{"name": sae}`), by splicing x̂ into the model at positions ≥ 1.

    sae: measured by its inference rule; or any callable x → object with x_hat and latents. rows: token rows [n, n_ctx], n_ctx ≥ 3,
    that neither SAE nor model was trained on. densities: a dict that receives density [d_sae] under each name ("" for one SAE).
    Returns a dict of floats, or one per name, over positions ≥ 1; raises ValueError for rows or SAEs that do not fit:

    l0, fvu, fvu_ordinary, gamma, gamma_centred, dead_fraction: `ReconstructionSums`; which norms are usual, the first 16 rows say.
    ce_clean, ce_sae, ce_zero, ce_mean: cross-entropy with the activation left alone, replaced by x̂, by zero, by its mean over
    these tokens. ce_increase: ce_sae − ce_clean. ce_recovered_zero, ce_recovered_mean: `ce_recovered` against the two
    ablations (zero as in arXiv 2404.16014). kl: KL(orig ‖ new), a mean in nats over the same
    predictions: those made at positions 1 … n_ctx − 2, whose next token is in the row.

    >>> rows = torch.arange(64).view(2, 32)
    >>> found = evaluate(TopKSAE(128, 256, k=8), lm, rows, "blocks.1.hook_resid_post")
    >>> math.isclose(found["ce_increase"], found["ce_sae"] - found["ce_clean"])
    True
    """
    saes, chunks = prepared(sae, lm, rows, batch_rows)
    x = run_prefix(lm, torch.cat(chunks[:16])[:16], [hook_name])[hook_name][:, 1:].flatten(0, 1)
    usual = typical(x)
    sums = {name: ReconstructionSums(usual) for name in saes}
    mean = sum(run_prefix(lm, c, [hook_name])[hook_name][:, 1:].double().sum((0, 1)) for c in chunks)
    mean = (mean / sum(c[:, 1:].numel() for c in chunks)).float()
    nats = collections.defaultdict(float)

    def log_p_with(replacement, key):
        """Log-probabilities with x replaced at positions ≥ 1; the loss of the predictions made there is added to nats[key]."""
        spliced = torch.cat([clean[:, :1], replacement.to(clean).expand_as(clean[:, 1:])], 1)
        log_p = run_spliced(lm, tokens, hook_name, spliced).float().log_softmax(-1)
        nats[key] -= log_p.gather(-1, following)[:, 1:-1].double().sum()
        return log_p

    for tokens in chunks:
        following = tokens.roll(-1, 1)[..., None]
        clean = run_prefix(lm, tokens, [hook_name])[hook_name]
        x = clean[:, 1:].float()
        log_p_with(torch.zeros_like(x), "ce_zero")
        log_p_with(mean, "ce_mean")
        log_p = log_p_with(x, "ce_clean")
        p = log_p.exp()
        for name, one in saes.items():
            out = one(x)
            sums[name].add(x.flatten(0, 1), out.x_hat.flatten(0, 1), times_fired(out))
            log_q = log_p_with(out.x_hat, ("ce_sae", name))
            off = torch.sub(log_p, log_q, out=log_q)
            kl = p[:, :, None] @ off[..., None]  # Σ over words as a product, which makes nothing as large as p
            nats["kl", name] += kl[:, 1:-1].double().sum()
    n_predictions = sum(tokens[:, 2:].numel() for tokens in chunks)
    nats = {key: float(value) / n_predictions for key, value in nats.items()}
    results = {}
    for name, total in sums.items():
        clean, new = nats["ce_clean"], nats["ce_sae", name]
        results[name] = total.result() | {"ce_clean": clean, "ce_sae": new, "ce_increase": new - clean}
        results[name]["kl"] = nats["kl", name]
        for key in ("zero", "mean"):
            ablated = nats[f"ce_{key}"]
            results[name] |= {f"ce_{key}": ablated, f"ce_recovered_{key}": ce_recovered(new, clean, ablated)}
        if densities is not None:
            densities[name] = total.density().float().cpu()
    return results if isinstance(sae, dict) else results[""]


@measuring
def evaluate_downstream(sae, lm, rows, hook_name: str, *, batch_rows: int = 16):
    """What x̂, spliced in at positions ≥ 1, does to the layers after the hook. Arguments and form of the result as in `evaluate`.

    downstream_fvu: {hook: Σ‖r − r_new‖² / Σ‖r − r̄‖²}, sums over positions ≥ 1 of all rows: at hook_name itself, at resid_pre of
    every later layer, and at the final resid_post.
    norm_ratio: mean over tokens of ‖x̂‖ / ‖x‖ at positions ≥ 1; norm_ratio_first: the same at position 0.

    >>> rows = torch.arange(64).view(2, 32)
    >>> list(evaluate_downstream(TopKSAE(128, 256), lm, rows, "blocks.4.hook_resid_pre")["downstream_fvu"])
    ['blocks.4.hook_resid_pre', 'blocks.5.hook_resid_pre', 'blocks.5.hook_resid_post']
    """
    saes, chunks = prepared(sae, lm, rows, batch_rows)
    hooks = [hook_name, *later_layers(lm, hook_name), f"blocks.{lm.cfg.n_layers - 1}.hook_resid_post"]
    scores, ratios = collections.defaultdict(Scores), collections.defaultdict(list)
    for tokens in chunks:
        clean = run_prefix(lm, tokens, hooks)
        x = clean[hook_name].float()
        for name, one in saes.items():
            x_hat, new = one(x).x_hat, {}
            ratios[name].append(x_hat.norm(dim=-1) / x.norm(dim=-1))
            keep = [(at, lambda r, hook, at=at: new.__setitem__(at, r.flatten(2))) for at in hooks]
            run_spliced(lm, tokens, hook_name, torch.cat([x[:, :1], x_hat[:, 1:]], 1), hooks=keep)
            for at in hooks:
                r, r_new = clean[at][:, 1:].flatten(0, 1), new[at][:, 1:].flatten(0, 1)
                scores[name, at].add(r, r - r_new)
    results = {}
    for name in saes:
        ratio = torch.cat(ratios[name]).double()
        results[name] = {"downstream_fvu": {at: 1 - scores[name, at].r2() for at in hooks}}
        results[name] |= {"norm_ratio": float(ratio[:, 1:].mean()), "norm_ratio_first": float(ratio[:, 0].mean())}
    return results if isinstance(sae, dict) else results[""]


def alive_latents(sae, batches, window: int) -> Tensor:
    """Which latents are active on at least one of the first `window` tokens of `batches`, by the inference rule: bool [d_sae].

    batches: tensors [..., d_in] or batch dicts. Their number grows with the window: say which (arXiv 2405.12241: 500,000).
    Raises ValueError if the stream ends before.

    >>> sae = ReluSAE(2, 2)
    >>> alive_latents(sae, [sae.W_dec[:1].detach()], window=1)[0]
    tensor(True)
    """
    left, fired = whole("window", window), torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_dec.device)
    for batch in batches:
        x = sae.rows(as_batch(batch)["x"])[:left]
        fired |= (sae.encode(x.to(fired.device)) > 0).any(0)
        left -= len(x)
        if not left:
            return fired
    raise ValueError(f"window={window:,}: the stream ended {left:,} tokens before")
