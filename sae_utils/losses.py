"""Objectives: functions (sae, batch) → dict of scalars, of which "loss" is minimised and the rest is logged.

`batch` is a dict with `x` [..., d_in] and what else the stream gives (`grad`, `tokens`, `position`, `progress`); a bare tensor
is taken as x. Settings are bound by `functools.partial`.
"""

import torch
from torch import Tensor


def as_batch(batch) -> dict:
    return batch if isinstance(batch, dict) else {"x": batch}


def batch_fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    """Σ‖x − x̂‖² / Σ‖x − mean(x)‖², sums over the batch and d_in, mean over the batch: 0 perfect, 1 no better than the mean.

    Both arguments [..., d_in]. The scale of x drops out, so coefficients beside it need no units.
    """
    x, x_hat = x.reshape(-1, x.shape[-1]).to(x_hat.dtype), x_hat.reshape(-1, x.shape[-1])
    variance = (x - x.mean(0)).square().sum()
    return (x - x_hat).square().sum() / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def auxk_loss(sae, x: Tensor, x_hat: Tensor, k_aux: int | None = None) -> Tensor:
    """How badly the dead latents alone explain the error (arXiv 2406.04093, A.2): ‖sg(e) − ê‖² / ‖sg(e) − mean sg(e)‖².

    e = x − x̂, stopped; ê = z_aux W_dec, without b_dec (which x̂ already holds); z_aux = the k_aux largest relu
    pre-activations among dead latents (default d_in/2, or all if fewer are dead). Zero where none is dead.
    """
    dead = sae.dead().nonzero().squeeze(1)
    if not len(dead):
        return x_hat.new_zeros(())
    error = (sae.rows(x) - x_hat.reshape(-1, sae.d_in)).detach()
    z = sae.pre_activations(x, dead).relu()
    k_aux = k_aux or sae.d_in // 2
    if k_aux < len(dead):
        top = z.topk(k_aux, dim=1, sorted=False)
        z = torch.zeros_like(z).scatter(1, top.indices, top.values)
    return batch_fvu(error, z @ sae.W_dec[dead])


def reconstruction_loss(sae, batch, alpha: float = 1 / 32, k_aux: int | None = None) -> dict[str, Tensor]:
    """Batch FVU + α · AuxK: the loss of TopK SAEs. alpha = 0 leaves AuxK out."""
    batch = as_batch(batch)
    x = batch["x"]
    out = sae(x, batch.get("grad"))
    fvu = batch_fvu(x, out.x_hat)
    l0 = ((out.values if out.dense is None else out.dense) > 0).sum() / (x.numel() // sae.d_in)
    terms = {"loss": fvu, "fvu": fvu, "l0": l0}
    if alpha:
        terms["auxk"] = auxk_loss(sae, x, out.x_hat, k_aux)
        terms["loss"] = fvu + alpha * terms["auxk"]
    return terms
