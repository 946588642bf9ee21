"""Sums over active latents, selection of latents, encoding and decoding, with hand-written backward passes.

The dense form, which the tests hold all of this to, is

    z = (x − b_dec) W_enc + b_enc,    latents = relu(z) where selected and 0 elsewhere,    x̂ = latents W_dec + b_dec

After the selection no dense [batch, d_sae] tensor exists, only `Active`: the entries (token, latent) that were selected. Products
with W_dec and the weight gradients touch those entries alone. Gradients take the selection as a constant. Two sums do all the
work, `bag_sum` and `bag_dot`. They and `largest` are Triton kernels of our own on a GPU, and PyTorch elsewhere.
"""

import contextlib
import functools
import math
import os
import threading

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..device import bf16_is_fast

WORKSPACE = 1 << 25  # largest number of pre-activations held at once
NARROW = 256  # a d_in below which the fp32 product is as cheap as candidates in bfloat16 and their rescoring
FEW = 1 / 32  # a share of active latents below which sparse is faster than dense


def triton_for(tensor: Tensor):
    """The module of Triton kernels if it takes this tensor: on a GPU, or anywhere under TRITON_INTERPRET=1. Else None."""
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        with contextlib.suppress(ImportError):
            from . import kernels

            return kernels if kernels.available(tensor) else None
    return None


class Active:
    """The active latents of a batch: `indices` [n] of latents, token after token; token t has entries offsets[t] … offsets[t + 1]."""

    def __init__(self, indices: Tensor, offsets: Tensor, d_sae: int):
        self.indices, self.offsets, self.d_sae = indices, offsets, d_sae

    @classmethod
    def of_rows(cls, columns: Tensor, d_sae: int) -> "Active":
        """Of as many latents for every token, [batch, k]."""
        offsets = torch.arange(0, columns.numel() + 1, columns.shape[1], device=columns.device)
        return cls(columns.flatten(), offsets, d_sae)

    @classmethod
    def by_token(cls, token: Tensor, indices: Tensor, batch: int, d_sae: int) -> "Active":
        """Of entries that come token after token, of which some tokens may have none."""
        active = cls(indices, starts(token, batch), d_sae)
        active.token = token
        return active

    @functools.cached_property
    def token(self) -> Tensor:
        """[n], the token of each entry."""
        batch = torch.arange(len(self.offsets) - 1, device=self.indices.device)
        return batch.repeat_interleave(self.offsets.diff(), output_size=len(self.indices))

    @functools.cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order, token[order], offsets): entries order[offsets[i]] … are those of latent i. Both weight gradients need it."""
        order = self.indices.argsort(stable=True)
        return order, self.token[order], starts(self.indices, self.d_sae)


def starts(bag: Tensor, n_bags: int) -> Tensor:
    """[n_bags + 1], where each bag begins among entries in the order of their bags."""
    return torch.nn.functional.pad(torch.bincount(bag, minlength=n_bags).cumsum(0), (1, 0))


def bag_sum(values: Tensor, indices: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """Σ over a bag's entries e of values[e] · rows[indices[e]], [n_bags, d]; bag b holds entries offsets[b] … offsets[b + 1]."""
    if triton := triton_for(rows):
        return triton.bag_sum(values, indices, offsets, rows)
    return embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


def latent_sum(values: Tensor, active: Active, rows: Tensor) -> Tensor:
    """Fᵀ rows, [d_sae, d], where F [batch, d_sae] has `values` at the active entries: one bag of tokens for every latent."""
    order, token, offsets = active.by_latent
    return bag_sum(values[order], token, offsets, rows)


def bag_dot(rows: Tensor, active: Active, W: Tensor) -> Tensor:
    """rows[t] · W[i] for every entry (t, i), [n]; rows [batch, d], W [d_sae, d]."""
    if triton := triton_for(rows):
        return triton.bag_dot(rows, active.indices, active.offsets, W)
    dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return dot(rows.contiguous(), W, active.indices, active.offsets[:-1], active.token, 0)


class Workspace(threading.local):
    """One buffer a thread, used again in every step: fresh pages for [batch, d_sae] cost a fifth of the product."""

    buffer = torch.empty(0)

    def __call__(self, rows: int, columns: int, dtype: torch.dtype, device) -> Tensor:
        n = rows * columns
        if self.buffer.numel() < n or self.buffer.dtype != dtype or self.buffer.device != device:
            self.buffer = torch.empty(n, dtype=dtype, device=device)
        return self.buffer[:n].view(rows, columns)


workspace = Workspace()


def product(x: Tensor, W: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """x W + b, computed in `dtype`, in the workspace: the next product overwrites it."""
    out = workspace(len(x), W.shape[1], dtype, x.device)
    return torch.addmm(b.to(dtype), x.to(dtype), W.to(dtype), out=out)


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row of z [batch, n] and their columns, both [batch, k], in no order.

    In two stages, exactly: the k largest lie in the k groups whose maxima are largest. Groups of √(n/k) balance the stages.
    """
    if triton := triton_for(z):
        return triton.select(z, k)
    batch, n = z.shape
    group = 1 << round(math.log2(n / k) / 2)
    n_groups = n // group
    if group < 4:
        return tuple(z.topk(k, dim=1, sorted=False))
    grouped, rest = z[:, : group * n_groups].unflatten(1, (group, n_groups)), z[:, group * n_groups :]
    best = grouped.amax(1).topk(k, dim=1, sorted=False).indices  # groups are strided: their maxima are vector code
    members = grouped.gather(2, best[:, None].expand(-1, group, -1)).flatten(1)
    values, at = torch.cat([members, rest], 1).topk(k, dim=1, sorted=False)
    columns = at.div(k, rounding_mode="floor") * n_groups + best.gather(1, at.remainder(k))
    return values, torch.where(at < group * k, columns, at + group * (n_groups - k))


def top_of_product(x: Tensor, W: Tensor, b: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k largest of every row of x W + b, a product in `dtype`: values and columns, [batch, k]."""
    n = W.shape[1]
    if len(x) > (at_once := max(1, WORKSPACE // n)):
        parts = [top_of_product(part, W, b, k, dtype) for part in x.split(at_once)]
        return tuple(map(torch.cat, zip(*parts)))
    if dtype == torch.float32 and 4 * k <= n and len(W) >= NARROW and bf16_is_fast(x.device.type):
        return certified(x, W, b, k)
    return largest(product(x, W, b, dtype), k)


def certified(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_of_product` in fp32: a faster product in bfloat16 proposes 2k candidates, which are rescored in fp32.

    With x = x₁₆ + δx, W = W₁₆ + δW and unit roundoff u = 2⁻⁸, a pre-activation z and its approximation z₁₆ differ by at most

        ‖x‖ ‖δW_i‖ + ‖δx‖ ‖W₁₆_i‖ + 2u (|z₁₆| + |b_i|) + d_in 2⁻²³ ‖x‖ ‖W_i‖

    (roundings of the inputs, of bias and result, and of the sum in fp32). No latent outside the candidates can be above the
    k-th largest rescored value if the lowest candidate plus this bound, with its maxima over latents, stays below it. Rows for
    which that is not certain are done again in fp32.
    """
    x16, W16, directions = x.bfloat16(), W.bfloat16(), W.T
    rough, columns = largest(product(x16, W16, b, torch.bfloat16), 2 * k)
    exact = bag_dot(x, Active.of_rows(columns, len(directions)), directions).view_as(rough) + b[columns]
    values, best = exact.topk(k, dim=1, sorted=False)
    columns = columns.gather(1, best)
    lowest = rough.amin(1).float()
    norm = functools.partial(torch.linalg.vector_norm, dim=1)
    x_norm, W_norm = norm(x), norm(directions).max()
    W_error = torch.stack([norm(a - b).max() for a, b in zip(directions.split(1024), W16.T.split(1024))]).max()
    bound = x_norm * W_error + norm(x - x16) * W_norm * (1 + 2**-8)
    bound += 2**-7 * (lowest.abs() + b.abs().max()) + len(W) * 2**-23 * x_norm * W_norm
    certain = lowest + bound < values.amin(1)  # False for a row with NaN
    if not certain.all():
        again = (~certain).nonzero().squeeze(1)
        values[again], columns[again] = largest(torch.addmm(b, x[again], W), k)
    return values, columns


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
    W, b, D, size = W.to(dtype), b.to(dtype), W_dec.T.to(dtype), max(1, WORKSPACE // (2 * d_sae))
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
