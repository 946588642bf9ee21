"""Triton kernels for the sparse step on a GPU: selection, sums and dot products over bags of rows.

A bag is a run of entries, `offsets[b]` to `offsets[b + 1]`; an entry is a value and the index of a row. A token's active
latents are one bag (decoding), a latent's tokens are one (weight gradients). Nothing here sees autograd: `sparse.py` builds
forward and backward from these three functions. Results are deterministic. Sums are kept in fp32 whatever the inputs are.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = (
    256  # of a bag's sum, to a program: m rows x 1 KiB stay in the L2 cache, where whole rows of a large W_dec do not
)
UNROLL = 4  # rows that are on their way at once in a sum
LONGEST = 128  # entries that one program adds up; a longer bag is cut


def available(tensor: Tensor) -> bool:
    """Can the kernels take `tensor`? On a GPU that Triton supports (8.0 and newer), or anywhere under TRITON_INTERPRET=1."""
    if triton.knobs.runtime.interpret:
        return True
    return tensor.is_cuda and (
        torch.version.hip is not None or torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    )


def power_of_2(n: float) -> int:
    """The least power of two that is not below n."""
    return triton.next_power_of_2(math.ceil(n))


@triton.jit
def largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def distinct(z, index, valid, SHORT: tl.constexpr):
    bits = z.to(tl.float32).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(z == z, key, 0x7FFFFFFF)
    key = tl.where(valid, key, -0x80000000)
    if SHORT:
        return (key & -65536) | index
    else:
        return (key.to(tl.int64) << 20) | index


@triton.jit
def threshold(key, low, k):
    count = tl.sum((key >= low).to(tl.int32))
    high = tl.max(key).to(tl.int64) + 1
    low = low.to(tl.int64)
    while count > k:
        middle = (low + high) >> 1
        above = tl.sum((key >= middle.to(key.dtype)).to(tl.int32))
        if above >= k:
            low = middle
            count = above
        else:
            high = middle
    return low.to(key.dtype)


@triton.jit
def select_kernel(
    z, values, indices, stride, d: tl.constexpr, k: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    values += row * k
    indices += row * k
    group = tl.arange(0, GROUPS)
    tile = group[:, None] * RUN + tl.arange(0, RUN)[None, :]
    best = tl.full([GROUPS, RUN], -float("inf"), tl.float32)
    for start in range(0, d, GROUPS * RUN):
        block = tl.load(z + start + tile, mask=start + tile < d, other=-float("inf")).to(tl.float32)
        best = largest(best, block)
    best = tl.reduce(best, 1, largest)
    key = distinct(best, group, group * RUN < d, SHORT)
    low = threshold(key, tl.min(tl.where(group * RUN < d, key, tl.max(key))), k)
    tl.store(indices + tl.cumsum((key >= low).to(tl.int32)) - 1, group.to(tl.int64), mask=key >= low)
    tl.debug_barrier()

    slot = tl.arange(0, K)
    group = tl.load(indices + slot, mask=slot < k, other=0).to(tl.int32)
    member = tl.arange(0, RUNS * RUN)
    column = (member // RUN * (GROUPS * RUN) + member % RUN)[None, :] + group[:, None] * RUN
    valid = (column < d) & (slot < k)[:, None]
    SIZE: tl.constexpr = K * RUNS * RUN
    candidate = tl.reshape(tl.load(z + column, mask=valid, other=-float("inf")), [SIZE])
    key = distinct(candidate, tl.arange(0, SIZE), tl.reshape(valid, [SIZE]), SHORT)
    low = threshold(key, low & (-65536 if SHORT else -1048576), k)
    place = tl.cumsum((key >= low).to(tl.int32)) - 1
    tl.debug_barrier()
    tl.store(values + place, candidate, mask=key >= low)
    tl.store(indices + place, tl.reshape(column, [SIZE]).to(tl.int64), mask=key >= low)


def shape_of_selection(d: int, k: int, itemsize: int) -> dict:
    K = power_of_2(k)
    groups = power_of_2(max(K, math.sqrt(d * K)))
    run = 4 if groups * 4 <= d else 1
    return dict(K=K, GROUPS=groups, RUN=run, RUNS=power_of_2(d / (groups * run)))
