"""Encoding and decoding with hand-written backward passes.

The dense form, which the tests hold all of this to, is

    z = (x − b_dec) W_enc + b_enc,    latents = relu(z) where selected and 0 elsewhere,    x̂ = latents W_dec + b_dec

After the selection no dense [batch, d_sae] tensor exists, only `Active`: the entries (token, latent) that were selected. Products
with W_dec and the weight gradients touch those entries alone. Gradients take the selection as a constant.
"""

import functools

import torch
from torch import Tensor

from . import selection
from .bags import Active, bag_dot, bag_sum, latent_sum
from .selection import largest, product, top_of_product, workspace

FEW = 1 / 32  # a share of active latents below which sparse is faster than dense


class Encode(torch.autograd.Function):
    """Gives `values` the gradients of (x − b_dec) W_enc + b_enc, which they are already; centred is x − b_dec.

    They are those at the active entries, [n], or all of them, [batch, d_sae], if active is None. Then products are in `dtype`.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, centred, values, active, dtype):
        ctx.save_for_backward(centred, W_enc)
        ctx.active, ctx.dtype = active, dtype
        return values.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx, grad):
        (centred, W_enc), active, dtype, grad_x = ctx.saved_tensors, ctx.active, ctx.dtype, None
        if active is None:
            low = grad.to(dtype)
            grad_b_enc = grad.sum(0)
            grad_W = (low.T @ centred.to(dtype)).to(grad.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = (low @ W_enc.T.to(dtype)).to(grad.dtype)
        else:
            grad_b_enc = grad.new_zeros(active.d_sae).index_add_(0, active.indices, grad)
            grad_W = latent_sum(grad, active, centred)  # [d_sae, d_in]
            if ctx.needs_input_grad[0]:
                grad_x = bag_sum(grad, active.indices, active.offsets, W_enc.T)
        return grad_x, grad_W.T, grad_b_enc, -(grad_b_enc @ W_enc.T), None, None, None, None


class Decode(torch.autograd.Function):
    """(values, W_dec) → Σ_e values[e] W_dec[indices[e]] for every token, [batch, d_in]."""

    @staticmethod
    def forward(ctx, values, W_dec, active):
        ctx.save_for_backward(values, W_dec)
        ctx.active = active
        return bag_sum(values, active.indices, active.offsets, W_dec)

    @staticmethod
    def backward(ctx, grad):
        values, W_dec = ctx.saved_tensors
        grad_values = bag_dot(grad, ctx.active, W_dec) if ctx.needs_input_grad[0] else None
        grad_W_dec = latent_sum(values, ctx.active, grad) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W_dec, None


def encoder(select):
    """A decorator that makes a selection an encoder: it is then called with (x, W_enc, b_enc, b_dec, …), and has gradients.

    The selection itself gets x − b_dec, W_enc, b_enc, its other arguments, and the `dtype` of its products: bfloat16 under
    autocast. It returns pre-activations, where they are, and what else it likes. The encoder makes negative values 0.
    """

    @functools.wraps(select)
    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, *arguments):
        dtype = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            centred = x - b_dec
            values, active, *more = select(centred, W_enc, b_enc, *arguments, dtype=dtype)
        return Encode.apply(x, W_enc, b_enc, b_dec, centred, values, active, dtype).relu_(), active, *more

    return encode


@encoder
def topk_encode(x: Tensor, W: Tensor, b: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Active]:
    """The k largest of x W + b per row: values [batch · k], unsorted, and where they are."""
    values, columns = top_of_product(x, W, b, k, dtype)
    return values.flatten(), Active.of_rows(columns, W.shape[1])


@encoder
def gradient_encode(
    x: Tensor, W: Tensor, b: Tensor, k: int, grad: Tensor, W_dec: Tensor, weight, signed: bool, dtype: torch.dtype
) -> tuple[Tensor, Active, Tensor]:
    """Like `topk_encode`, but the k are largest in z (1 + weight · |W_dec g|), g = grad [batch, d_in]; the values stay z.

    signed: largest in z (z − weight · W_dec g), z > 0. What has no positive score has the value 0.

    As a third result the sum of |W_dec g| over tokens and latents. One product more than TopK.
    """
    d_sae, found, total = W.shape[1], [], 0.0
    W, b, D, size = W.to(dtype), b.to(dtype), W_dec.T.to(dtype), max(1, selection.WORKSPACE // (2 * d_sae))
    for part, g in zip(x.to(dtype).split(size), grad.to(dtype).split(size)):
        z, effect = workspace(2 * len(part), d_sae, dtype, x.device).split(len(part))
        torch.addmm(b, part, W, out=z)
        torch.mm(g, D, out=effect)
        total = total + (effect.abs() if signed else effect.abs_()).sum(dtype=torch.float32)
        effect = effect.mul_(-weight).add_(z.relu_()) if signed else effect.mul_(weight).add_(1)
        scores, columns = largest(effect.mul_(z), k)
        found.append((z.gather(1, columns).masked_fill_(scores <= 0, 0), columns))
    values, columns = map(torch.cat, zip(*found))
    return values.flatten(), Active.of_rows(columns, d_sae), total


@encoder
def relu_encode(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor | None = None, *, dtype: torch.dtype
) -> tuple[Tensor, Active | None]:
    """The positive values of x W + b, flat, and where they are, if few are positive; else all of x W + b, dense, and None.

    With a threshold ≥ 0 [d_sae], a constant, only the values above it. Few is less than one in 32 (`FEW`), as after some hundred
    steps with a penalty on activity. Such a step costs little more than its one dense product; a dense step has five.
    """
    z = product(x, W, b, dtype)
    positive = z > (0 if threshold is None else threshold.to(dtype))
    if positive.sum() < FEW * z.numel():
        token, latent = positive.nonzero(as_tuple=True)
        return z[token, latent], Active.by_token(token, latent, *z.shape)
    return z if threshold is None else z.mul_(positive), None


def encode_at(active: Active, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """(x − b_dec) W_enc + b_enc at the active entries, [n]."""
    with torch.no_grad():
        centred = x - b_dec
        values = bag_dot(centred, active, W_enc.T) + b_enc[active.indices]
    return Encode.apply(x, W_enc, b_enc, b_dec, centred, values, active, x.dtype)


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """(x − b_dec) W_enc + b_enc, [batch, d_sae], by one product: the centring is moved into the bias."""
    return torch.addmm(b_enc - b_dec @ W_enc, x, W_enc)


def sparse_decode(values: Tensor, active: Active, W_dec: Tensor) -> Tensor:
    """Σ over a token's active latents of value · W_dec[latent], [batch, d_in]."""
    return Decode.apply(values, W_dec, active)


def densify(values: Tensor, active: Active) -> Tensor:
    """The dense [batch, d_sae] view of sparse latents; gradients reach `values`."""
    dense = values.new_zeros(len(active.offsets) - 1, active.d_sae)
    return dense.index_put((active.token, active.indices), values)


def at(v: Tensor, active: Active | None) -> Tensor:
    """A vector over latents, [d_sae], spread over the active entries, or over all if `active` is None."""
    return v if active is None else v.index_select(0, active.indices)
