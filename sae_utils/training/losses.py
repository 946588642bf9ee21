"""Objectives: functions (sae, batch) → dict of scalars, of which "loss" is minimised and the rest is logged.

`batch` is a dict with `x` [..., d_in] and what else the stream gives (`grad`, `tokens`, `position`, `progress`); a bare tensor
is taken as x. Settings are bound by `functools.partial`. `distance(x, x_hat)` is what an objective makes small beside its
sparsity: None is the batch FVU, in whose place `sae_utils.end_to_end` puts what the language model makes of x̂.

A batch without variance (one token repeated) has nothing to be measured against. So no denominator falls below what a batch
with 1% of the SAE's usual variance, `x_scale`² a coordinate, would have (ours); ordinary batches never come near it.
"""

import functools
import inspect
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..sparse.bags import Active
from ..sparse.select_encode import sparse_decode
from ..sparse.selection import topk
from ..values import flag, real, whole

squares = functools.partial(torch.nn.functional.mse_loss, reduction="sum")  # Σ (a − b)², of two passes instead of six
FLOATS = ("float16", "bfloat16", "float32", "float64")


def as_batch(batch) -> dict:
    """The batch as a dict with a floating-point tensor x [..., d_in]; ValueError, saying what it is, for anything else.

    A bare tensor or array is x, and so is the only member of a list, as `DataLoader(TensorDataset(x))` gives it. x and grad
    may be NumPy arrays.
    """
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        batch = batch[0]
    batch = batch if isinstance(batch, dict) else {"x": batch}
    for key in ("x", "grad"):
        if isinstance(array := batch.get(key), np.ndarray) and array.dtype.name in FLOATS:
            batch = batch | {key: torch.from_numpy(array.astype(np.promote_types(array.dtype, np.float32)))}
    x = batch.get("x")
    good = isinstance(x, Tensor) and x.is_floating_point() and x.ndim and x.numel() and x.layout == torch.strided
    if not good:
        about = f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
        about += f" in the layout {x.layout}" if getattr(x, "layout", torch.strided) != torch.strided else ""
        keys = f" (its keys are {', '.join(map(repr, batch))})" if x is None else ""
        raise ValueError(f"x of a batch is {about}{keys}: it has to be activations in floating point, [..., d_in]")
    return batch


def batch_fvu(x: Tensor, x_hat: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """Σ‖x − x̂‖² / Σ‖x − mean(x)‖², sums over the batch and d_in, mean over the batch: 0 perfect, 1 no better than the mean.

    x, x_hat [..., d_in]. The scale of x drops out, so coefficients beside it need no units. The denominator is at least `least`.

    >>> batch_fvu(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [3.0]]))  # 1 / (1 + 1)
    tensor(0.5000)
    """
    x, x_hat = x.reshape(-1, x.shape[-1]).to(x_hat.dtype), x_hat.reshape(-1, x.shape[-1])
    error, variance = squares(x_hat, x), squares(x.mean(0).expand_as(x), x)
    return error / variance.clamp_min(least).clamp_min(torch.finfo(variance.dtype).tiny)


def fvu_of(sae):
    """`batch_fvu` for batches of this SAE: with 1% of its usual variance as the least."""
    return lambda x, x_hat: batch_fvu(x, x_hat, 0.01 * x.numel() * sae.x_scale.square())


def auxk_loss(sae, x: Tensor, x_hat: Tensor, k_aux: int | None = None, among: Tensor | None = None) -> Tensor:
    """How badly the dead latents alone explain the error (arXiv 2406.04093, A.2): ‖sg(e) − ê‖² / ‖sg(e) − mean sg(e)‖².

    e = x − x̂, stopped; ê = z_aux W_dec, without b_dec (which x̂ already holds); z_aux = the k_aux largest relu
    pre-activations among dead latents (default d_in/2, or all if fewer are dead). Zero where none is dead.
    `among`: bool [d_sae], latents that take the place of the dead. The denominator is at least 1% of Σ‖e‖², plus what an FVU
    of 1e-6 leaves: where all errors are the same, or nothing but rounding, there is nothing to learn from them (ours).
    """
    dead = (sae.dead() if among is None else among).nonzero().squeeze(1)
    if not len(dead):
        return x_hat.new_zeros(())
    error = (sae.rows(x) - x_hat.reshape(-1, sae.d_in)).detach()
    z = sae.pre_activations(x, dead).relu()
    k_aux = k_aux or sae.d_in // 2
    if k_aux < len(dead):
        values, columns = topk(z, k_aux)
        z = torch.zeros_like(z).scatter(1, columns, values)
    least = 0.01 * error.square().sum() + 1e-6 * error.numel() * sae.x_scale.square()
    return batch_fvu(error, z @ sae.W_dec.index_select(0, dead), least)


def spread(sae, x: Tensor) -> Tensor:
    """Mean over the batch of ‖x − mean(x)‖², x [batch, d_in]: the unit of squared errors; its root that of latents."""
    least = (0.01 * sae.d_in * sae.x_scale.square()).clamp_min(torch.finfo(x.dtype).tiny)
    return (x - x.mean(0)).square().sum(1).mean().clamp_min(least)


def l0_of(out, n_tokens: int) -> Tensor:
    """Active latents per token."""
    return (out.entries > 0).sum() / n_tokens


def opened(sae, batch, coefficient: float, warmup: float) -> tuple:
    """What a loss with a penalty begins with: x [batch, d_in], the SAE's output, and the penalty's weight.

    The coefficient ≥ 0 rises linearly from 0 over the first `warmup` share of the run (ours; 0 turns it off).
    """
    real("coefficient", coefficient, 0), real("warmup", warmup, 0, 1)
    batch = as_batch(batch)
    x = sae.rows(batch["x"])
    weight = coefficient * min(1.0, batch.get("progress", 1.0) / warmup) if warmup else coefficient
    return x, sae(x), weight


def reconstruction_loss(
    sae, batch, alpha: float = 1 / 32, k_aux: int | None = None, distance=None, among=None
) -> dict[str, Tensor]:
    """Batch FVU + α · AuxK: the loss of TopK SAEs. alpha = 0 leaves AuxK out; `among(sae)` says for which latents it is.

    AuxK is a share of the squared error. A `distance` in another unit says by its attribute `unit` what AuxK is multiplied by.

    >>> sorted(reconstruction_loss(TopKSAE(8, 32, k=2), torch.randn(100, 8)))
    ['auxk', 'fvu', 'l0', 'loss']
    """
    real("alpha", alpha, 0), k_aux is None or whole("k_aux", k_aux)
    batch = as_batch(batch)
    x = batch["x"]
    out = sae(x, batch.get("grad"))
    fvu = (distance or fvu_of(sae))(x, out.x_hat)
    terms = {"loss": fvu, "fvu": fvu, "l0": l0_of(out, x.numel() // sae.d_in)}
    if alpha:
        terms["auxk"] = auxk_loss(sae, x, out.x_hat, k_aux, among and among(sae))
        terms["loss"] = fvu + alpha * getattr(distance, "unit", 1.0) * terms["auxk"]
    return terms


def aux_zipf_loss(
    sae,
    batch,
    alpha: float = 1 / 32,
    k_aux: int | None = None,
    s: float | None = None,
    q: float | None = None,
    share: float = 0.3,
    distance=None,
) -> dict[str, Tensor]:
    """Batch FVU + α · AuxK of the underused latents, dead or not (our reading of arXiv 2411.02124, which gives no formula).

    Underused: a running density below `share` of what Zipf's law, (r + q)^(−s), expects of the latent's rank r; see
    `MutualChoiceSAE.underused`. Where every expectation is 0⁺ this is `reconstruction_loss`. At share = 1 half of the latents are
    below, and having to explain the error besides kills many of them (measured in notebook 05). For the Choice SAEs.

    >>> sorted(aux_zipf_loss(MutualChoiceSAE(8, 32, k=2), torch.randn(100, 8), s=1.0, q=0.0))
    ['auxk', 'fvu', 'l0', 'loss']
    """
    for name, value in (("s", s), ("q", q), ("share", share)):
        value is None or real(name, value, 0)
    check_density(sae)
    return reconstruction_loss(sae, batch, alpha, k_aux, distance, among=lambda sae: sae.underused(s, q, share))


def l1_loss(sae, batch, coefficient: float = 0.1, warmup: float = 0.05, distance=None) -> dict[str, Tensor]:
    """Batch FVU + λ · mean over tokens of Σ_i f_i / σ, σ² = mean ‖x − x̄‖²: the loss of ReLU SAEs.

    In these units (ours) λ has no dimension: a lone latent of size f comes out as f − λσ/2, which is the shrinkage.
    λ rises over the first `warmup` share of the run.

    >>> terms = l1_loss(ReluSAE(8, 32), torch.randn(100, 8), coefficient=0.5)
    >>> torch.allclose(terms["loss"], terms["fvu"] + 0.5 * terms["l1"])
    True
    """
    x, out, weight = opened(sae, batch, coefficient, warmup)
    fvu = (distance or fvu_of(sae))(x, out.x_hat)
    l1 = out.entries.sum() / len(x) / spread(sae, x).sqrt()
    loss = fvu + weight * l1
    return {"loss": loss, "fvu": fvu, "l1": l1, "l0": l0_of(out, len(x))}


def gated_loss(
    sae, batch, coefficient: float = 0.1, warmup: float = 0.05, frozen: bool = True, distance=None
) -> dict[str, Tensor]:
    """FVU(x̂) + λ · mean Σ_i relu(π_i) / σ + FVU(x̂_gate): the three terms of arXiv 2404.16014, eq. 8, over mean ‖x − x̄‖².

    x̂_gate = relu(π) sg(W_dec) + sg(b_dec): the gate alone has to reconstruct, through a decoder that it cannot move. Its
    coefficient is 1. The b_dec by which the encoder centres x is not stopped. `frozen=False` is the ablation that stops nothing.

    >>> sorted(gated_loss(GatedSAE(8, 32), torch.randn(100, 8)))
    ['aux', 'fvu', 'l0', 'l1', 'loss']
    """
    distance = distance or fvu_of(sae)
    x, out, weight = opened(sae, batch, coefficient, warmup)
    gate = extra(sae, out, "gate", "gated_loss")
    W_dec, b_dec = (sae.W_dec.detach(), sae.b_dec.detach()) if flag("frozen", frozen) else (sae.W_dec, sae.b_dec)
    from_gate = gate @ W_dec if out.active is None else sparse_decode(gate, out.active, W_dec)
    fvu, aux = distance(x, out.x_hat), distance(x, from_gate + b_dec)
    l1 = gate.sum() / len(x) / spread(sae, x).sqrt()
    loss = fvu + weight * l1 + aux
    return {"loss": loss, "fvu": fvu, "l1": l1, "aux": aux, "l0": l0_of(out, len(x))}


def jumprelu_loss(
    sae, batch, coefficient: float = 0.01, target_l0: float | None = None, warmup: float = 0.05, distance=None
) -> dict[str, Tensor]:
    """FVU + λ · L0, or with a target FVU + λ (L0 / target − 1)² (arXiv 2407.14435; L0 per token, its gradient the smeared step's)."""
    target_l0 is None or real("target_l0", target_l0, above=0)
    x, out, weight = opened(sae, batch, coefficient, warmup)
    fvu = (distance or fvu_of(sae))(x, out.x_hat)
    l0 = extra(sae, out, "step", "jumprelu_loss").sum(1).mean()
    penalty = l0 if target_l0 is None else (l0 / target_l0 - 1).square()
    return {"loss": fvu + weight * penalty, "fvu": fvu, "l0": l0}


def nested_loss(sae, batch, *, prefixes: Sequence[int], local=None) -> dict[str, Tensor]:
    """`local` with a mean over nested prefixes of the latents in place of its FVU: a Matryoshka SAE (arXiv 2503.17547).

        1/|prefixes| · Σ_m FVU(x, b_dec + Σ_{i < m} f_i W_dec_i),    m in prefixes, and what else `local` has, once

    prefixes: widths m that rise, each from 1 to d_sae and the last d_sae; ValueError for others. A mean, where the paper has a
    sum, so that a penalty weighs what it did (ours). The paper takes a few nested widths, and Mutual Choice.
    local: the objective of the SAE's class if None, else one that fits it, its settings bound by `functools.partial`. What
    the gate of a gated SAE reconstructs alone is not nested.
    Returns the terms of `local`, where fvu is that of all latents, and fvu_m of each shorter prefix. Each active latent is decoded
    once more than without prefixes, whatever their number: with three, a step takes 10–25% longer on a CPU.

    >>> terms = nested_loss(MutualChoiceSAE(8, 32, k=2), torch.randn(100, 8), prefixes=(4, 16, 32))
    >>> sorted(terms)
    ['auxk', 'fvu', 'fvu_16', 'fvu_4', 'l0', 'loss']
    """
    if not isinstance(prefixes, (Sequence, np.ndarray)) or isinstance(prefixes, str):
        raise ValueError(f"prefixes={prefixes!r}: widths that rise to d_sae, as in (64, 256, {sae.d_sae})")
    widths = [0, *(whole("prefixes", m, 1, sae.d_sae) for m in prefixes)]
    sizes = [m - before for before, m in itertools.pairwise(widths)]
    if widths[-1] != sae.d_sae or min(sizes) < 1:
        raise ValueError(
            f"prefixes={prefixes!r}: they have to rise, and the last has to be d_sae={sae.d_sae}, so that all latents count"
        )
    outputs, fvus = [], {}

    def distance(x: Tensor, x_hat: Tensor) -> Tensor:
        if fvus:  # a second call is an auxiliary one
            return fvu_of(sae)(x, x_hat)
        (out,), x_hat = outputs, sae.b_dec
        for start, m, W_dec in zip(widths, widths[1:], sae.W_dec.split(sizes)):
            if (active := out.active) is None:
                part = out.dense[:, start:m] @ W_dec
            else:
                kept = ((start <= active.indices) & (active.indices < m)).nonzero().squeeze(1)
                token, indices = active.token[kept], active.indices[kept] - start
                block = Active.by_token(token, indices, len(active.offsets) - 1, m - start)
                part = sparse_decode(out.values.flatten().index_select(0, kept), block, W_dec)
            x_hat = x_hat + part
            fvus[f"fvu_{m}"] = fvu_of(sae)(x, x_hat)
        return sum(fvus.values()) / len(fvus)

    def keep(sae, args, out) -> None:
        outputs.append(out)

    hook = sae.register_forward_hook(keep)  # `distance` is given x̂ alone
    try:
        terms = (local or own_objective(sae))(sae, batch, distance=distance)
    finally:
        hook.remove()
    return terms | {"fvu": fvus.pop(f"fvu_{sae.d_sae}")} | fvus


def extra(sae, out, name: str, objective: str) -> Tensor:
    """What a class's forward has to give for the loss of its own; ValueError if it does not."""
    if name not in out.extra:
        raise ValueError(f"{objective} does not fit {type(sae).__name__}: its forward gives no {name!r} in `extra`")
    return out.extra[name]


GRADIENTS = (
    "ActivationStore(..., gradients=True) stores it; in a stream of your own each batch is {'x': x, 'grad': grad}; "
    "the objective selected_by_gradient makes it"
)


def attribution_loss(sae, batch, alpha: float = 0.1) -> dict[str, Tensor]:
    """Batch FVU + α · A, A = Σ|(x − x̂) ⊙ g| / Σ|(x − x̄) ⊙ g|: what a coordinate's error does to the loss, to first order.

    Sums over the batch and d_in; both terms are over what the mean x̄ would leave, so α has no units (ours). Without AuxK. The
    SAE selects without g, so that selection and loss can be told apart.

    >>> batch = {"x": torch.randn(100, 8), "grad": torch.randn(100, 8)}
    >>> sorted(attribution_loss(TopKSAE(8, 32, k=2), batch))
    ['attribution', 'fvu', 'l0', 'loss']
    """
    return weighted_by_gradient(sae, batch, alpha, "attribution", 1)


def gradient_weighted_loss(sae, batch, alpha: float = 0.1) -> dict[str, Tensor]:
    """Batch FVU + α · Σ((x − x̂) ⊙ g)² / Σ((x − x̄) ⊙ g)²: squared errors weighted by how sensitive the loss is (ours).

    Reductions as in `attribution_loss`.

    >>> batch = {"x": torch.randn(100, 8), "grad": torch.ones(100, 8)}
    >>> terms = gradient_weighted_loss(TopKSAE(8, 32, k=2), batch)
    >>> torch.allclose(terms["weighted"], terms["fvu"])  # equal gradients weigh nothing
    True
    """
    return weighted_by_gradient(sae, batch, alpha, "weighted", 2)


def weighted_by_gradient(sae, batch, alpha: float, name: str, power: int) -> dict[str, Tensor]:
    """Batch FVU + α · Σ|(x − x̂) ⊙ g|ᵖ / Σ|(x − x̄) ⊙ g|ᵖ; ValueError if the stream gives no gradient."""
    real("alpha", alpha, 0)
    if not isinstance(batch, dict) or batch.get("grad") is None:
        raise ValueError(f"{type(sae).__name__}: the batch has no 'grad'. {GRADIENTS}")
    x, g = sae.rows(batch["x"]), sae.rows(batch["grad"]).detach()
    if len(x) != len(g):
        raise ValueError(
            f"grad has shape {list(batch['grad'].shape)}: it has to be that of x, {list(batch['x'].shape)}"
        )
    out = sae(x)
    size = torch.abs if power == 1 else torch.square
    least = size(0.01 * sae.x_scale) * size(g).sum()
    unit = size((x - x.mean(0)) * g).sum().clamp_min(least).clamp_min(torch.finfo(x.dtype).tiny)
    fvu, weighted = fvu_of(sae)(x, out.x_hat), size((x - out.x_hat) * g).sum() / unit
    return {"loss": fvu + alpha * weighted, "fvu": fvu, name: weighted, "l0": l0_of(out, len(x))}


NO_PENALTY = ("reconstruction_loss",), "it has no penalty that keeps the latents of this class sparse"
FITS = {  # a loss of ours: the own losses of the classes that it trains, and why it trains no others
    "reconstruction_loss": NO_PENALTY,
    "aux_zipf_loss": NO_PENALTY,
    "attribution_loss": NO_PENALTY,
    "gradient_weighted_loss": NO_PENALTY,
    "l1_loss": (("l1_loss", "reconstruction_loss", "jumprelu_loss"), "no gradient of it reaches the gate"),
    "gated_loss": (("gated_loss",), "this class has no gate"),
    "jumprelu_loss": (("jumprelu_loss",), "this class learns no threshold"),
}


def own_objective(sae):
    """The loss of the SAE's class, as its attribute `objective` names it."""
    own = type(sae).objective  # not the instance's, which would be a method
    if isinstance(own, str) and own not in globals():
        raise ValueError(
            f"{type(sae).__name__}.objective={own!r} is no loss of sae_utils.losses: give `train` an objective"
        )
    return globals()[own] if isinstance(own, str) else own


def check_fit(sae, objective) -> None:
    """ValueError if a loss of ours does not fit a class of ours; what users write, losses or forwards, is theirs to judge."""
    func, settings = objective, {}
    while isinstance(func, functools.partial):
        func, settings = func.func, func.keywords | settings
    if not str(getattr(func, "__module__", "")).startswith("sae_utils."):
        return
    name, own = func.__name__, type(sae).__name__
    if settings.get("local") is not None:
        if getattr(func, "gives_grad", False):  # it only adds the gradient to the batch
            return check_fit(sae, settings["local"])
        try:
            inspect.signature(settings["local"]).bind_partial(distance=None)
        except TypeError:
            raise ValueError(f"local={settings['local']!r}: {func.__name__} needs one with a `distance`") from None
        return check_fit(sae, settings["local"])
    forward = next(cls for cls in type(sae).__mro__ if "forward" in vars(cls))
    fits, why = FITS.get(name, ((), ""))
    if fits and forward.__module__.startswith("sae_utils.") and type(sae).objective not in fits:
        raise ValueError(f"{name} does not fit {own}: {why}. Use {type(sae).objective}, or leave objective out")
    if name == "aux_zipf_loss":
        check_density(sae)


def check_density(sae) -> None:
    """ValueError for an SAE without the running density that `aux_zipf_loss` reads."""
    if not hasattr(sae, "underused"):
        own = type(sae).__name__
        raise ValueError(f"aux_zipf_loss does not fit {own}, which keeps no running density: it is for the Choice SAEs")
