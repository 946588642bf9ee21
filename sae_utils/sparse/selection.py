"""The k largest of every row of a product x W + b: exactly, and at little more than the cost of that product."""

import functools
import math
import threading

import torch
from torch import Tensor

from ..device import bf16_is_fast
from .bags import Active, bag_dot, triton_for

WORKSPACE = 1 << 25  # largest number of pre-activations held at once
NARROW = 256  # a d_in below which the fp32 product is as cheap as candidates in bfloat16 and their rescoring


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
    n = z.shape[1]
    group = 1 << round(math.log2(n / k) / 2)
    n_groups = n // group
    if group < 4:
        return topk(z, k)
    grouped, rest = z[:, : group * n_groups].unflatten(1, (group, n_groups)), z[:, group * n_groups :]
    best = topk(grouped.amax(1), k)[1]  # groups are strided: their maxima are vector code
    members = grouped.gather(2, best[:, None].expand(-1, group, -1)).flatten(1)
    values, at = topk(torch.cat([members, rest], 1) if rest.numel() else members, k)
    columns = at.div(k, rounding_mode="floor") * n_groups + best.gather(1, at.remainder(k))
    return values, torch.where(at < group * k, columns, at + group * (n_groups - k)) if rest.numel() else columns


def topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`z.topk(k, dim=1, sorted=False)`; on a CPU by NumPy, which partitions integers several times as fast.

    Their high 32 bits are those of a value, so turned that they rise with it, and the low 32 its column. So of equal values
    the last are taken.
    """
    if z.device.type != "cpu" or z.dtype not in (torch.float32, torch.bfloat16) or z.detach().amax().isnan():
        return tuple(z.topk(k, dim=1, sorted=False))
    bits = z.detach().float().view(torch.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long().bitwise_left_shift_(32).add_(torch.arange(z.shape[1]))
    keys.numpy().partition(z.shape[1] - k, axis=1)
    columns = keys[:, -k:] & 0xFFFFFFFF
    return z.gather(1, columns), columns


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
