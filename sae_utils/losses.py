"""Objectives: functions (sae, batch) → dict of scalars, of which "loss" is minimised and the rest is logged.

`batch` is a dict with `x` [..., d_in] and what else the stream gives (`grad`, `tokens`, `position`, `progress`); a bare tensor
is taken as x. Settings are bound by `functools.partial`. `distance(x, x_hat)` is what an objective makes small beside its
sparsity: the batch FVU, in whose place `sae_utils.end_to_end` puts what the language model makes of x̂.
"""

import torch
from torch import Tensor

from .sparse import sparse_decode


def as_batch(batch) -> dict:
    return batch if isinstance(batch, dict) else {"x": batch}


def batch_fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    """Σ‖x − x̂‖² / Σ‖x − mean(x)‖², sums over the batch and d_in, mean over the batch: 0 perfect, 1 no better than the mean.

    Both arguments [..., d_in]. The scale of x drops out, so coefficients beside it need no units.
    """
    x, x_hat = x.reshape(-1, x.shape[-1]).to(x_hat.dtype), x_hat.reshape(-1, x.shape[-1])
    variance = (x - x.mean(0)).square().sum()
    return (x - x_hat).square().sum() / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def auxk_loss(sae, x: Tensor, x_hat: Tensor, k_aux: int | None = None, among: Tensor | None = None) -> Tensor:
    """How badly the dead latents alone explain the error (arXiv 2406.04093, A.2): ‖sg(e) − ê‖² / ‖sg(e) − mean sg(e)‖².

    e = x − x̂, stopped; ê = z_aux W_dec, without b_dec (which x̂ already holds); z_aux = the k_aux largest relu
    pre-activations among dead latents (default d_in/2, or all if fewer are dead). Zero where none is dead.
    `among`: bool [d_sae], latents that take the place of the dead.
    """
    dead = (sae.dead() if among is None else among).nonzero().squeeze(1)
    if not len(dead):
        return x_hat.new_zeros(())
    error = (sae.rows(x) - x_hat.reshape(-1, sae.d_in)).detach()
    z = sae.pre_activations(x, dead).relu()
    k_aux = k_aux or sae.d_in // 2
    if k_aux < len(dead):
        top = z.topk(k_aux, dim=1, sorted=False)
        z = torch.zeros_like(z).scatter(1, top.indices, top.values)
    return batch_fvu(error, z @ sae.W_dec.index_select(0, dead))


def spread(x: Tensor) -> Tensor:
    """Mean over the batch of ‖x − mean(x)‖², x [batch, d_in]: the unit of squared errors; its root that of latents."""
    return (x - x.mean(0)).square().sum(1).mean().clamp_min(torch.finfo(x.dtype).tiny)


def l0_of(out, n_tokens: int) -> Tensor:
    """Active latents per token."""
    return ((out.values if out.dense is None else out.dense) > 0).sum() / n_tokens


def warmed(coefficient: float, warmup: float, batch: dict) -> float:
    """A coefficient that rises linearly from 0 over the first `warmup` share of the run (ours; 0 turns it off)."""
    return coefficient * min(1.0, batch.get("progress", 1.0) / warmup) if warmup else coefficient


def reconstruction_loss(
    sae, batch, alpha: float = 1 / 32, k_aux: int | None = None, distance=batch_fvu, among=None
) -> dict[str, Tensor]:
    """Batch FVU + α · AuxK: the loss of TopK SAEs. alpha = 0 leaves AuxK out; `among(sae)` says for which latents it is."""
    batch = as_batch(batch)
    x = batch["x"]
    out = sae(x, batch.get("grad"))
    fvu = distance(x, out.x_hat)
    terms = {"loss": fvu, "fvu": fvu, "l0": l0_of(out, x.numel() // sae.d_in)}
    if alpha:
        terms["auxk"] = auxk_loss(sae, x, out.x_hat, k_aux, among and among(sae))
        terms["loss"] = fvu + alpha * terms["auxk"]
    return terms


def aux_zipf_loss(
    sae,
    batch,
    alpha: float = 1 / 32,
    k_aux: int | None = None,
    s: float | None = None,
    q: float | None = None,
    share: float = 0.3,
    distance=batch_fvu,
) -> dict[str, Tensor]:
    """Batch FVU + α · AuxK of the underused latents, dead or not (our reading of arXiv 2411.02124, which gives no formula).

    Underused: a running density below `share` of what Zipf's law, (r + q)^(−s), expects of the latent's rank r; see
    `MutualChoiceSAE.underused`. Where every expectation is 0⁺ this is `reconstruction_loss`. At share = 1 half of the latents are
    below, and having to explain the error besides kills many of them (measured in notebook 05). For the Choice SAEs.
    """
    if not hasattr(sae, "underused"):
        raise ValueError(f"{type(sae).__name__} keeps no running density: aux_zipf_loss is for the Choice SAEs")
    return reconstruction_loss(sae, batch, alpha, k_aux, distance, among=lambda sae: sae.underused(s, q, share))


def l1_loss(sae, batch, coefficient: float = 0.1, warmup: float = 0.05, distance=batch_fvu) -> dict[str, Tensor]:
    """Batch FVU + λ · mean over tokens of Σ_i f_i / σ, σ² = mean ‖x − x̄‖²: the loss of ReLU SAEs.

    In these units (ours) λ has no dimension: a lone latent of size f comes out as f − λσ/2, which is the shrinkage.
    λ rises over the first `warmup` share of the run.
    """
    batch = as_batch(batch)
    x = sae.rows(batch["x"])
    out = sae(x)
    fvu = distance(x, out.x_hat)
    l1 = (out.values if out.dense is None else out.dense).sum() / len(x) / spread(x).sqrt()
    loss = fvu + warmed(coefficient, warmup, batch) * l1
    return {"loss": loss, "fvu": fvu, "l1": l1, "l0": l0_of(out, len(x))}


def gated_loss(
    sae, batch, coefficient: float = 0.1, warmup: float = 0.05, frozen: bool = True, distance=batch_fvu
) -> dict[str, Tensor]:
    """FVU(x̂) + λ · mean Σ_i relu(π_i) / σ + FVU(x̂_gate): the three terms of arXiv 2404.16014, eq. 8, over mean ‖x − x̄‖².

    x̂_gate = relu(π) sg(W_dec) + sg(b_dec): the gate alone has to reconstruct, through a decoder that it cannot move. Its
    coefficient is 1. The b_dec by which the encoder centres x is not stopped. `frozen=False` is the ablation that stops nothing.
    """
    batch = as_batch(batch)
    x = sae.rows(batch["x"])
    out = sae(x)
    gate = out.extra["gate"]
    W_dec, b_dec = (sae.W_dec.detach(), sae.b_dec.detach()) if frozen else (sae.W_dec, sae.b_dec)
    from_gate = gate @ W_dec if out.active is None else sparse_decode(gate, out.active, W_dec)
    fvu, aux = distance(x, out.x_hat), distance(x, from_gate + b_dec)
    l1 = gate.sum() / len(x) / spread(x).sqrt()
    loss = fvu + warmed(coefficient, warmup, batch) * l1 + aux
    return {"loss": loss, "fvu": fvu, "l1": l1, "aux": aux, "l0": l0_of(out, len(x))}


def jumprelu_loss(
    sae, batch, coefficient: float = 0.01, target_l0: float | None = None, warmup: float = 0.05, distance=batch_fvu
) -> dict[str, Tensor]:
    """FVU + λ · L0, or with a target FVU + λ (L0 / target − 1)² (arXiv 2407.14435; L0 per token, its gradient the smeared step's)."""
    batch = as_batch(batch)
    x = sae.rows(batch["x"])
    out = sae(x)
    fvu = distance(x, out.x_hat)
    l0 = out.extra["step"].sum(1).mean()
    penalty = l0 if target_l0 is None else (l0 / target_l0 - 1).square()
    return {"loss": fvu + warmed(coefficient, warmup, batch) * penalty, "fvu": fvu, "l0": l0}


def with_gradient(sae, batch, use_in_selection: bool):
    """(x [batch, d_in], grad likewise, output); ValueError if the stream gives no gradient."""
    if not isinstance(batch, dict) or batch.get("grad") is None:
        raise ValueError("batch has no 'grad': make the store with gradients=True")
    x, g = sae.rows(batch["x"]), sae.rows(batch["grad"]).detach()
    if len(x) != len(g):
        raise ValueError(
            f"grad has shape {list(batch['grad'].shape)}: it has to be that of x, {list(batch['x'].shape)}"
        )
    return x, g, sae(x, g if use_in_selection else None)


def attribution_loss(sae, batch, alpha: float = 0.1, use_in_selection: bool = False) -> dict[str, Tensor]:
    """Batch FVU + α · A, A = Σ|(x − x̂) ⊙ g| / Σ|(x − x̄) ⊙ g|: what a coordinate's error does to the loss, to first order.

    Sums over the batch and d_in; both terms are over what the mean x̄ would leave, so α has no units (ours). Without AuxK.
    `use_in_selection` hands g to the SAE as well, so that selection and loss can be told apart.
    """
    x, g, out = with_gradient(sae, batch, use_in_selection)
    fvu = batch_fvu(x, out.x_hat)
    unit = ((x - x.mean(0)) * g).abs().sum().clamp_min(torch.finfo(x.dtype).tiny)
    attribution = ((x - out.x_hat) * g).abs().sum() / unit
    return {"loss": fvu + alpha * attribution, "fvu": fvu, "attribution": attribution, "l0": l0_of(out, len(x))}


def gradient_weighted_loss(sae, batch, alpha: float = 0.1, use_in_selection: bool = False) -> dict[str, Tensor]:
    """Batch FVU + α · Σ((x − x̂) ⊙ g)² / Σ((x − x̄) ⊙ g)²: squared errors weighted by how sensitive the loss is (ours).

    Reductions as in `attribution_loss`.
    """
    x, g, out = with_gradient(sae, batch, use_in_selection)
    fvu = batch_fvu(x, out.x_hat)
    unit = ((x - x.mean(0)) * g).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    weighted = ((x - out.x_hat) * g).square().sum() / unit
    return {"loss": fvu + alpha * weighted, "fvu": fvu, "weighted": weighted, "l0": l0_of(out, len(x))}


def __getattr__(name):
    """The end-to-end objectives stand in a module of their own: they need the language model, on which nothing here depends."""
    if name in ("e2e_loss", "e2e_downstream_loss"):
        from . import end_to_end

        return getattr(end_to_end, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
