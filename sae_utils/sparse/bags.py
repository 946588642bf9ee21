"""The active latents of a batch as bags of entries, and the two sums over them that do all the work of a sparse step.

They are Triton kernels of our own on a GPU, and PyTorch elsewhere.
"""

import contextlib
import functools
import os

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


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
        order = stable_order(self.indices, self.d_sae)
        return order, self.token[order], starts(self.indices, self.d_sae)


def stable_order(numbers: Tensor, n: int) -> Tensor:
    """What sorts whole numbers below n, equal ones in the order they came. On a CPU by their 16 bits, if these are enough."""
    if numbers.device.type != "cpu" or n > 2**16:
        return numbers.argsort(stable=True)
    return torch.from_numpy(np.argsort(numbers.numpy().astype(np.uint16), kind="stable"))  # a radix sort


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
