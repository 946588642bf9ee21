"""Triton kernels for the sparse step on a GPU: the k largest of each row, and sums and dot products over bags of rows.

An entry is a value and the index of a row; a bag is a run of entries, from `offsets[bag]` to `offsets[bag + 1]`. The active
latents of a token are a bag (decoding, and the gradient of its activations), and so are the tokens of a latent (the weight
gradients). `bags.py` and `select_encode.py` build every forward and backward pass from these functions, which autograd does not see.

Products and sums are fp32, and exact fp32 for fp32 inputs; equal inputs give equal bits. Sizes of blocks were chosen by
counting bytes and instructions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
COLUMNS = 256  # that one program adds; then 25,000 rows are 25 MB of fp32 at a time, which an L2 cache holds
UNROLL = 4  # rows on their way from memory at once, for one program
LONGEST = 128  # entries that one program adds; longer bags are cut


def available(tensor: Tensor) -> bool:
    """Whether these kernels take `tensor`: fp32 or bf16, on a GPU that Triton compiles for or under TRITON_INTERPRET=1."""
    if tensor.dtype not in DTYPES:
        return False
    if not tensor.is_cuda or torch.version.hip:
        return tensor.is_cuda or triton.knobs.runtime.interpret
    return torch.cuda.get_device_capability(tensor.device) >= (7, 5)


def select(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z [batch, d_sae] (fp32 or bf16): values and int64 indices, [batch, k], in no set order.

    Ties go to the same indices every time; NaN counts as the largest. z is read once. ValueError unless 1 ≤ k ≤ d_sae.
    """
    (batch, d), z = z.shape, unit_stride(z)
    if not 1 <= k <= d or z.dtype not in DTYPES:
        raise ValueError(f"k = {k} of {d} values in {z.dtype}: take 1 ≤ k ≤ {d}, and float32 or bfloat16")
    values, indices = z.new_empty(batch, k), torch.empty(batch, k, dtype=torch.long, device=z.device)
    # Two selections, from n and from k · d / n numbers, cost least where those are alike; a group takes more registers.
    k_padded = power_of_2(k)
    groups = power_of_2(max(k_padded, math.sqrt(d * k_padded / 2)))
    run = 4 if 4 * groups <= d else 1
    runs = power_of_2(d / (groups * run))
    # 128 groups to a warp are 16 numbers to a thread: four loads of 16 bytes on their way at once, no register spilled, and
    # enough warps to fill a GPU also where z comes in chunks of a few hundred rows.
    warps = min(max(groups // 128, 1), 16)
    short = z.dtype == torch.bfloat16 and max(groups, k_padded * runs * run) <= 2**16
    sizes = dict(d=d, k=k, K=k_padded, GROUPS=groups, RUN=run, RUNS=runs, SHORT=short, num_warps=warps)
    with torch.cuda.device_of(z):
        select_kernel[(batch,)](z, values, indices, z.stride(0), **sizes)
    return values, indices


def bag_sum(values: Tensor, indices: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """out[bag] = Σ_e values[e] · rows[indices[e]] over the bag's entries e: fp32 [n_bags, d] from rows [m, d].

    values and indices (int64) are [n], offsets (int64) [n_bags + 1] from 0 to n. Bags may be empty, and of very unlike
    sizes: what is longer than LONGEST is cut into pieces, added in a fixed order.
    """
    rows, n, n_bags, d = unit_stride(rows), len(indices), len(offsets) - 1, rows.shape[1]
    out = torch.empty(n_bags, d, dtype=torch.float32, device=rows.device)
    pieces = out.new_empty(2 * triton.cdiv(n, LONGEST), d)
    columns = min(power_of_2(d), COLUMNS)
    grid = triton.cdiv(d, columns)
    entries = values.contiguous(), indices.contiguous(), offsets, rows, rows.stride(0), d, pieces
    sizes = dict(COLUMNS=columns, UNROLL=UNROLL, LONGEST=LONGEST, num_warps=1)  # one warp: it waits for no other
    with torch.cuda.device_of(rows):
        if n > LONGEST:
            pieces_kernel[(len(pieces), grid)](*entries, n, n_bags, **sizes)
        bag_sum_kernel[(n_bags, grid)](*entries, out, **sizes)
    return out


def bag_dot(rows: Tensor, indices: Tensor, offsets: Tensor, W: Tensor) -> Tensor:
    """out[e] = rows[bag of e] · W[indices[e]], fp32 [n], from rows [n_bags, d], W [m, d], indices [n], offsets [n_bags + 1].

    One program takes a whole bag: meant for bags of like sizes, right for any.
    """
    rows, W, d = unit_stride(rows), unit_stride(W), rows.shape[1]
    out = torch.empty(len(indices), dtype=torch.float32, device=rows.device)
    sizes = dict(d=d, ENTRIES=UNROLL, COLUMNS=min(power_of_2(d), COLUMNS), num_warps=1)
    with torch.cuda.device_of(rows):
        bag_dot_kernel[(len(rows),)](rows, indices.contiguous(), offsets, W, out, rows.stride(0), W.stride(0), **sizes)
    return out


def power_of_2(n: float) -> int:
    """The least power of two that is not below n."""
    return triton.next_power_of_2(math.ceil(n))


def unit_stride(rows: Tensor) -> Tensor:
    """`rows` with each row's elements side by side in memory: itself, or a copy."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def distinct_keys(z, place, valid, SHORT: tl.constexpr):
    """Integers in the order of z, no two alike: `place` in the low bits breaks ties. NaN is largest, what is not valid least."""
    z = z.to(tl.float32)
    bits = z.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the bits of a negative float count downwards
    key = tl.where(z == z, key, 0x7FFFFFFF)
    key = tl.where(valid, key, -0x80000000)  # -inf is more
    if SHORT:  # a bf16 has only the upper 16 bits
        return (key & -(2**16)) | place
    else:
        return (key.to(tl.int64) << 20) | place  # no Triton tensor has more than 2^20 elements


@triton.jit
def threshold(keys, low, k):
    """A number that exactly k of the distinct keys reach, by bisection from `low`, which at least k reach.

    The bisection ends as soon as it parts k keys from the others, long before it has seen all bits of a usual row.
    """
    count = tl.sum((keys >= low).to(tl.int32))
    low, high = low.to(tl.int64), tl.max(keys).to(tl.int64) + 1
    while count > k:
        middle = (low + high) >> 1
        reach = tl.sum((keys >= middle.to(keys.dtype)).to(tl.int32))
        if reach >= k:
            low = middle
            count = reach
        else:
            high = middle
    return low.to(keys.dtype)


@triton.jit
def select_kernel(
    z, values, indices, stride, d: tl.constexpr, k: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """One row: the maximum of each group of pre-activations; the k groups of the largest maxima; the k largest in those.

    No other group can be needed: k maxima are at least as large as anything in it. Group g holds the runs of RUN neighbours
    that start at RUN · g, + RUN · GROUPS, + 2 RUN · GROUPS, ...; so the first, and only whole, reading of the row needs one
    operation for each number and no exchange between threads, and the second reads little, from the L2 cache.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    values += row * k
    indices += row * k

    group = tl.arange(0, GROUPS)
    column = group[:, None] * RUN + tl.arange(0, RUN)[None, :]
    best = tl.full([GROUPS, RUN], -float("inf"), tl.float32)
    for start in range(0, d, GROUPS * RUN):
        best = larger(best, tl.load(z + start + column, mask=start + column < d, other=-float("inf")).to(tl.float32))
    valid = group * RUN < d
    keys = distinct_keys(tl.reduce(best, 1, larger), group, valid, SHORT)
    low = threshold(keys, tl.min(tl.where(valid, keys, tl.max(keys))), k)
    chosen = keys >= low
    place = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(indices + place, group.to(tl.int64), mask=chosen)  # from here all threads read them
    tl.debug_barrier()

    slot = tl.arange(0, K)
    group = tl.load(indices + slot, mask=slot < k, other=0).to(tl.int32)
    member = tl.arange(0, RUNS * RUN)
    column = (member // RUN * GROUPS * RUN + member % RUN)[None, :] + group[:, None] * RUN
    valid = (column < d) & (slot < k)[:, None]
    candidates = tl.reshape(tl.load(z + column, mask=valid, other=0), [K * RUNS * RUN])
    keys = distinct_keys(candidates, tl.arange(0, K * RUNS * RUN), tl.reshape(valid, [K * RUNS * RUN]), SHORT)
    chosen = keys >= threshold(keys, low & -(2**16 if SHORT else 2**20), k)  # candidates reach the least chosen maximum
    place = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.debug_barrier()  # all have read
    tl.store(values + place, candidates, mask=chosen)
    tl.store(indices + place, tl.reshape(column, [K * RUNS * RUN]).to(tl.int64), mask=chosen)


@triton.jit
def add_entries(values, indices, rows, stride, column, d, start, end, COLUMNS: tl.constexpr, UNROLL: tl.constexpr):
    """Σ_e values[e] · rows[indices[e], column] over start ≤ e < end, in that order."""
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(start, end, UNROLL):
        for i in tl.static_range(UNROLL):
            value = tl.load(values + first + i, mask=first + i < end, other=0).to(tl.float32)
            index = tl.load(indices + first + i, mask=first + i < end, other=0).to(tl.int64)
            row = tl.load(rows + index * stride + column, mask=(column < d) & (first + i < end), other=0)
            total += value * row.to(tl.float32)
    return total


@triton.jit
def pieces_kernel(
    values, indices, offsets, rows, stride, d, pieces, n, n_bags,
    COLUMNS: tl.constexpr, UNROLL: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """The sums of long bags' pieces. All entries are cut at the multiples of LONGEST: a block has at most two pieces of long
    bags, one (pieces[2 · block]) with its first entry and another (pieces[2 · block + 1]) with its last."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = piece // 2 * LONGEST
    end = tl.minimum(start + LONGEST, n)
    entry = tl.where(piece % 2 == 0, start, end - 1)
    bag, above = 0, n_bags  # the last bag that starts at or before the entry
    while above - bag > 1:
        middle = (bag + above) // 2
        if tl.load(offsets + middle) <= entry:
            bag = middle
        else:
            above = middle
    bag_start, bag_end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    if (bag_end - bag_start > LONGEST) & ((piece % 2 == 0) == (bag_start <= start)):
        start, end = tl.maximum(start, bag_start), tl.minimum(end, bag_end)
        total = add_entries(values, indices, rows, stride, column, d, start, end, COLUMNS, UNROLL)
        tl.store(pieces + piece * d + column, total, mask=column < d)


@triton.jit
def bag_sum_kernel(
    values, indices, offsets, rows, stride, d, pieces, out,
    COLUMNS: tl.constexpr, UNROLL: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one bag's sum. Programs of the same columns run together: see COLUMNS."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    if end - start <= LONGEST:
        total = add_entries(values, indices, rows, stride, column, d, start, end, COLUMNS, UNROLL)
    else:
        last = (end - 1) // LONGEST
        for first in range(start // LONGEST, last + 1, UNROLL):
            for i in tl.static_range(UNROLL):
                block = first + i
                piece = 2 * block + (block * LONGEST < start).to(tl.int64)
                total += tl.load(pieces + piece * d + column, mask=(column < d) & (block <= last), other=0)
    tl.store(out + bag * d + column, total, mask=column < d)


@triton.jit
def bag_dot_kernel(
    rows, indices, offsets, W, out, stride, W_stride, d: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One bag, ENTRIES entries at a time: partial products stay in registers, threads add them up once for all columns."""
    bag = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets + bag + 1)
    for first in range(tl.load(offsets + bag), end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        index = tl.load(indices + entry, mask=entry < end, other=0).to(tl.int64)
        total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            row = tl.load(rows + bag * stride + column, mask=column < d, other=0).to(tl.float32)
            inside = (entry < end)[:, None] & (column < d)[None, :]
            weight = tl.load(W + index[:, None] * W_stride + column[None, :], mask=inside, other=0)
            total += row[None, :] * weight.to(tl.float32)
        tl.store(out + entry, tl.sum(total, 1), mask=entry < end)
