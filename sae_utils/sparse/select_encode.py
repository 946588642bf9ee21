"""Top-k selection, and encoding and decoding of the selected latents with hand-written backward passes.

After the selection no dense [batch, d_sae] tensor exists: only `Active`, the entries (token, latent) that survived it. Products
with W_dec and the weight gradients touch those entries alone. Gradients follow the selection as it was made (its indices are
constants). The dense form, which the tests hold all of this to, is

    z = relu((x − b_dec) W_enc + b_enc);  latents = z where z is among its row's k largest, else 0;  x̂ = latents W_dec + b_dec

Two sums do all the work, `bag_sum` and `bag_dot`; on a GPU with Triton they, and the selection, are kernels of our own.
"""

import functools
import math
import os
import threading

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..device import bf16_is_fast


@functools.cache
def kernels():
    """The Triton kernels, or None where Triton is missing."""
    try:
        from . import kernels
    except ImportError:
        return None
    return kernels


def on_triton(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor: on a GPU, or anywhere under TRITON_INTERPRET=1."""
    wanted = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return bool(wanted and tensor.dtype != torch.float64 and kernels() and kernels().available(tensor))


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """(x − b_dec) W_enc + b_enc, [batch, d_sae], by one product: the centring is moved into the bias."""
    return torch.addmm(b_enc - b_dec @ W_enc, x, W_enc)


class Active:
    """The active latents of a batch: `indices` [n] of latents, token after token; token t has entries offsets[t] … offsets[t + 1].

    `by_latent` holds the same entries latent after latent, sorted once for both weight gradients.
    """

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
        """(order, token[order], offsets): entries order[offsets[i]] … are those of latent i."""
        order = self.indices.argsort(stable=True)
        return order, self.token[order], starts(self.indices, self.d_sae)


def starts(bag: Tensor, n_bags: int) -> Tensor:
    """[n_bags + 1], where each bag begins among entries in the order of their bags."""
    offsets = torch.zeros(n_bags + 1, dtype=torch.long, device=bag.device)
    torch.cumsum(torch.bincount(bag, minlength=n_bags), 0, out=offsets[1:])
    return offsets


def bag_sum(values: Tensor, indices: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """Σ over a bag's entries e of values[e] · rows[indices[e]], [n_bags, d]; bag b holds entries offsets[b] … offsets[b + 1]."""
    if on_triton(rows):
        return kernels().bag_sum(values, indices, offsets, rows)
    return embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


def bag_dot(rows: Tensor, active: Active, W: Tensor) -> Tensor:
    """rows[t] · W[i] for every entry (t, i), [n]; rows [batch, d], W [d_sae, d]."""
    if on_triton(rows):
        return kernels().bag_dot(rows, active.indices, active.offsets, W)
    dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return dot(rows.contiguous(), W, active.indices, active.offsets[:-1], active.token, 0)


def latent_sum(values: Tensor, active: Active, rows: Tensor) -> Tensor:
    """Fᵀ rows, [d_sae, d], where F [batch, d_sae] has `values` at the active entries: one bag of tokens for every latent."""
    order, token, offsets = active.by_latent
    return bag_sum(values[order], token, offsets, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Selection: no gradient goes through it
# ---------------------------------------------------------------------------------------------------------------------


WORKSPACE = 1 << 25  # largest number of pre-activations held at once
NARROW = 256  # a d_in below which the fp32 product is as cheap as candidates in bfloat16 and their rescoring
FEW = 1 / 32  # a share of active latents below which sparse is faster than dense


class Workspace(threading.local):
    """One buffer a thread, used again in every step: fresh pages for [batch, d_sae] cost a fifth of the product."""

    buffer = torch.empty(0)

    def __call__(self, shape: tuple[int, int], dtype: torch.dtype, device) -> Tensor:
        n = shape[0] * shape[1]
        if self.buffer.numel() < n or self.buffer.dtype != dtype or self.buffer.device != device:
            self.buffer = torch.empty(n, dtype=dtype, device=device)
        return self.buffer[:n].view(shape)


workspace = Workspace()


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row of z [batch, n] and their columns, both [batch, k], in no order.

    In two stages, exactly: the k largest lie in the k groups whose maxima are largest. Groups of √(n/k) balance the stages.
    """
    if on_triton(z):
        return kernels().select(z, k)
    batch, n = z.shape
    group = 1 << round(math.log2(n / k) / 2)
    n_groups = n // group
    if group < 4 or n_groups <= k:
        top = z.topk(k, dim=1, sorted=False)
        return top.values, top.indices
    grouped = z[:, : group * n_groups].unflatten(1, (group, n_groups))  # strided groups: their maxima are vector code
    best = grouped.amax(1).topk(k, dim=1, sorted=False).indices  # [batch, k], groups
    members = grouped.gather(2, best[:, None].expand(-1, group, -1)).flatten(1)  # [batch, group · k]
    rest = z[:, group * n_groups :]
    top = (torch.cat([members, rest], 1) if rest.shape[1] else members).topk(k, dim=1, sorted=False)
    at = top.indices.clamp_max(group * k - 1)
    columns = at.div(k, rounding_mode="floor") * n_groups + best.gather(1, at % k)
    return top.values, torch.where(top.indices < group * k, columns, top.indices + (group * n_groups - group * k))


def top_of_product(x: Tensor, W: Tensor, b: Tensor, k: int, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest of every row of x Wᵀ + b: values and columns, [batch, k]; x [batch, d_in], W [d_sae, d_in].

    bf16: of the product in bfloat16, as asked for by autocast. Otherwise exact: where bfloat16 is fast (`bf16_is_fast`), an fp32 product is replaced by one in bfloat16 that proposes 2k candidates,
    rescored in fp32. A row counts only if that is certain to hold its k largest; the others are done again in fp32.
    """
    n = len(W)
    if len(x) > (at_once := max(1, WORKSPACE // n)):
        parts = [top_of_product(part, W, b, k, bf16) for part in x.split(at_once)]
        return tuple(map(torch.cat, zip(*parts)))
    if bf16:
        values, columns = largest(product16(x.bfloat16(), W.bfloat16(), b), k)
        return values.to(x.dtype), columns
    if x.dtype == torch.float32 and 4 * k <= n and x.shape[1] >= NARROW and bf16_is_fast(x.device.type):
        return certified(x, W, b, k)
    return largest(torch.addmm(b, x, W.T, out=workspace((len(x), n), x.dtype, x.device)), k)


def product16(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b.bfloat16(), x, W.T, out=workspace((len(x), len(W)), torch.bfloat16, x.device))


def certified(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_of_product` by 2k candidates of a bfloat16 product.

    With x = x₁₆ + δx, W = W₁₆ + δW and unit roundoff u = 2⁻⁸, a pre-activation z and its approximation z₁₆ differ by at most

        ‖x‖ ‖δW_i‖ + ‖δx‖ ‖W₁₆_i‖ + 2u (|z₁₆| + |b_i|) + d_in 2⁻²³ ‖x‖ ‖W_i‖

    (roundings of the inputs, of bias and result, and of the sum in fp32). No latent outside the candidates can be above the
    k-th largest rescored value if the lowest candidate plus this bound, with its maxima over latents, stays below it.
    """
    x16, W16 = x.bfloat16(), W.bfloat16()
    rough, columns = largest(product16(x16, W16, b), 2 * k)
    exact = bag_dot(x, Active.of_rows(columns, len(W)), W).view_as(rough) + b[columns]
    top = exact.topk(k, dim=1, sorted=False)
    lowest = rough.amin(1).float()
    norm = functools.partial(torch.linalg.vector_norm, dim=1)
    x_norm, W_norm = norm(x), norm(W).max()
    W_error = torch.stack([norm(a - b).max() for a, b in zip(W.split(1024), W16.split(1024))]).max()
    bound = x_norm * W_error + norm(x - x16) * W_norm * (1 + 2**-8)
    bound += 2**-7 * (lowest.abs() + b.abs().max()) + x.shape[1] * 2**-23 * x_norm * W_norm
    certain = lowest + bound < top.values.amin(1)  # False for a row with NaN
    values, columns = top.values, columns.gather(1, top.indices)
    if not certain.all():
        again = (~certain).nonzero().squeeze(1)
        values[again], columns[again] = largest(torch.addmm(b, x[again], W.T), k)
    return values, columns


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding
# ---------------------------------------------------------------------------------------------------------------------


class Encode(torch.autograd.Function):
    """The pre-activations (x − b_dec) W_enc + b_enc at active entries, [n], as `values` holds them already; with gradients."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, centred, values, active):
        ctx.save_for_backward(centred, W_enc)
        ctx.active = active
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        (centred, W_enc), active = ctx.saved_tensors, ctx.active
        grad_W = latent_sum(grad, active, centred)  # [d_sae, d_in]
        grad_b_enc = grad.new_zeros(active.d_sae).index_add_(0, active.indices, grad)
        grad_x = bag_sum(grad, active.indices, active.offsets, W_enc.T) if ctx.needs_input_grad[0] else None
        return grad_x, grad_W.T, grad_b_enc, -(grad_b_enc @ W_enc.T), None, None, None


class DenseEncode(torch.autograd.Function):
    """The same for all entries, relu'd: `f` [batch, d_sae] = relu((x − b_dec) W_enc + b_enc); products in the dtype `half`."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, centred, f, half):
        ctx.save_for_backward(centred, W_enc, f)
        ctx.half = half
        return f

    @staticmethod
    def backward(ctx, grad):
        centred, W_enc, f = ctx.saved_tensors
        grad = grad * (f > 0)
        grad_b_enc, half = grad.sum(0), grad.to(ctx.half)
        grad_W = (half.T @ centred.to(ctx.half)).to(grad.dtype)
        grad_x = (half @ W_enc.T.to(ctx.half)).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_W.T, grad_b_enc, -(grad_b_enc @ W_enc.T), None, None, None


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


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Active]:
    """The k largest of relu((x − b_dec) W_enc + b_enc) per row: values [batch · k] (≥ 0, unsorted) and where they are."""
    bf16 = torch.is_autocast_enabled(x.device.type)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        centred = x - b_dec
        values, columns = top_of_product(centred, W_enc.T, b_enc, k, bf16)
        active = Active.of_rows(columns, W_enc.shape[1])
    return Encode.apply(x, W_enc, b_enc, b_dec, centred, values.flatten(), active).relu(), active


def gradient_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, grad: Tensor, W_dec: Tensor, weight
) -> tuple[Tensor, Active, Tensor]:
    """Like `topk_encode`, but the k are largest in z (1 + weight · |W_dec g|), g = grad [batch, d_in]; the values stay z.

    As a third result the sum of |W_dec g| over tokens and latents. One product more than TopK; no gradient reaches the score.
    """
    half = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
    d_sae = W_enc.shape[1]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        centred, found, total = x - b_dec, [], 0.0
        W, b, D = W_enc.to(half), b_enc.to(half), W_dec.T.to(half)
        for part, g in zip(*(t.to(half).split(max(1, WORKSPACE // (2 * d_sae))) for t in (centred, grad))):
            z, effect = workspace((2 * len(part), d_sae), half, x.device).split(len(part))
            torch.addmm(b, part, W, out=z)
            torch.mm(g, D, out=effect).abs_()
            total = total + effect.sum(dtype=torch.float32)
            columns = largest(effect.mul_(weight).add_(1).mul_(z), k)[1]
            found.append((z.gather(1, columns).to(x.dtype), columns))
        values, columns = map(torch.cat, zip(*found))
        active = Active.of_rows(columns, d_sae)
    return Encode.apply(x, W_enc, b_enc, b_dec, centred, values.flatten(), active).relu(), active, total


def relu_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor | None = None
) -> tuple[Tensor, Active | None]:
    """relu((x − b_dec) W_enc + b_enc): the positive values, flat, and where they are, if few are positive; else dense, and None.

    With a threshold ≥ 0 [d_sae] only the values above it; it is a constant.

    Few is less than one in 32 (`FEW`), as after some hundred steps with a penalty on activity; then a step costs little more
    than its one dense product, where a dense one has five.
    """
    half = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        centred = x - b_dec
        shape = len(x), W_enc.shape[1]
        z = torch.addmm(b_enc.to(half), centred.to(half), W_enc.to(half), out=workspace(shape, half, x.device))
        positive = z > (0 if threshold is None else threshold.to(half))
        if few := bool(positive.sum() < FEW * z.numel()):
            token, latent = positive.nonzero(as_tuple=True)
            values = z[token, latent].to(x.dtype)
            active = Active.by_token(token, latent, *shape)
    if few:
        return Encode.apply(x, W_enc, b_enc, b_dec, centred, values, active), active
    f = z.to(x.dtype, copy=True).relu_() if threshold is None else z.to(x.dtype) * positive
    return DenseEncode.apply(x, W_enc, b_enc, b_dec, centred, f, half), None


def encode_at(active: Active, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """(x − b_dec) W_enc + b_enc at the active entries, [n]."""
    with torch.no_grad():
        centred = x - b_dec
        values = bag_dot(centred, active, W_enc.T) + b_enc[active.indices]
    return Encode.apply(x, W_enc, b_enc, b_dec, centred, values, active)


def at(v: Tensor, active: Active | None) -> Tensor:
    """A vector over latents, [d_sae], spread over the active entries, or over all if `active` is None."""
    return v if active is None else v.index_select(0, active.indices)


def sparse_decode(values: Tensor, active: Active, W_dec: Tensor) -> Tensor:
    """Σ over a token's active latents of value · W_dec[latent], [batch, d_in]."""
    return Decode.apply(values, W_dec, active)


def densify(values: Tensor, active: Active) -> Tensor:
    """The dense [batch, d_sae] view of sparse latents; gradients reach `values`."""
    dense = values.new_zeros(len(active.offsets) - 1, active.d_sae)
    return dense.index_put((active.token, active.indices), values)
