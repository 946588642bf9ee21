"""ActivationStore: run the language model once, keep the activations at its hooks in memory maps, read them shuffled.

One file a hook, [rows, n_ctx, d_in] in float16 or bfloat16, under a key made of model, hook and token rows, so that every
notebook finds what another has harvested. Hooks harvested from the same rows are aligned entry by entry.
"""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import array_writer, cache_dir, digest, disk_errors, lock, open_array, replacing, tensors_hash
from ..values import flag, one_of, whole
from .hooks import check_hook, check_tokens, run_prefix, run_with_gradient

GRAD = ".grad"  # after a hook's name: the gradient there


class ActivationStore:
    """Activations of `lm` at one or several hooks over `rows` of tokens, integers [n_rows, n_ctx] of any type.

    hook_names: one name or a list; `x` of a batch is the first, and `batch[name]` each of a list of several.
    dtype: "float16" (an activation over 65,504 is refused: use "bfloat16") or "bfloat16".
    skip_first: leave position 0, an outlier in most models, out of `batches` and `activations`.
    gradients: store ∇ₓ of the summed next-token loss at the first hook too (`run_with_gradient`; 0 at position 0 and at the
    last), as `grad` of a batch. Always in bfloat16: gradients are small, and float16 would lose those under 6e-8.

    Raises before any work: ValueError for an unknown hook, rows that are no tokens of the model, or a context over the
    model's. OSError at the first batch if the disk is too small. ValueError for a stored file that is damaged.

    >>> rows = np.arange(64).reshape(2, 32)
    >>> ActivationStore(lm, rows, "blocks.1.hook_resid_post").activations(62).shape  # position 0 is left out
    torch.Size([62, 128])
    """

    def __init__(
        self, lm, rows: np.ndarray, hook_names, *, dtype="float16", skip_first=True, batch_rows=32, gradients=False
    ):
        one_of("dtype", dtype, ["float16", "bfloat16"])
        names = [hook_names] if isinstance(hook_names, str) or not hasattr(hook_names, "__iter__") else hook_names
        self.hook_names = list(dict.fromkeys(map(str, names)))
        if not self.hook_names:
            raise ValueError(f"hook_names={hook_names!r}: name at least one hook")
        for name in self.hook_names:
            check_hook(lm, name)
        if held := [name for name, hook in lm.hook_dict.items() if hook.fwd_hooks or hook.bwd_hooks]:
            raise ValueError(f"the model has hooks of its own at {held[0]}, which change its values: lm.reset_hooks()")
        self.skip, batch_rows = int(flag("skip_first", skip_first)), whole("batch_rows", batch_rows)
        self.rows = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        check_tokens(lm, self.rows)
        smallest = np.uint16 if lm.cfg.d_vocab <= 1 << 16 else np.uint32
        self.rows = self.rows.astype(smallest, copy=self.rows.flags.writeable)
        self.n_ctx = self.rows.shape[1]
        if self.n_ctx < 1 + max(self.skip, flag("gradients", gradients)):
            raise ValueError(f"rows has n_ctx={self.n_ctx}: position 0 is left out, and a gradient needs a next token")
        self.device = torch.device(lm.cfg.device)
        self.dtype = getattr(torch, dtype)
        rows_hash = hashlib.sha256(np.ascontiguousarray(self.rows)).hexdigest()
        self.path = cache_dir() / "activations" / digest([weights_hash(lm), rows_hash, self.rows.shape, dtype])
        stored = self.hook_names + ([self.hook_names[0] + GRAD] if gradients else [])
        if not all(self.file(name).exists() for name in stored):
            with disk_errors(self.path), lock(self.path):
                if missing := [name for name in stored if not self.file(name).exists()]:
                    self.harvest(lm, missing, batch_rows)
        self.maps = {"grad" if name.endswith(GRAD) else name: self.open(name) for name in stored}
        self.d_in = self.maps[self.hook_names[0]].shape[-1]

    def file(self, hook_name: str) -> Path:
        return self.path / f"{hook_name}.npy"

    def open(self, hook_name: str) -> Tensor:
        array = open_array(self.file(hook_name), mode="c")  # copy-on-write: torch knows no read-only tensors
        if array.dtype != np.uint16 or array.shape[:2] != self.rows.shape:
            raise ValueError(f"{self.file(hook_name)} holds another array, {array.dtype}{list(array.shape)}: delete it")
        return torch.from_numpy(array.view(np.int16)).view(self.dtype_of(hook_name))

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name.endswith(GRAD) else self.dtype

    def harvest(self, lm, names: list[str], batch_rows: int) -> None:
        """Run the model over all rows and write one file a hook, the gradient's last. No file is seen before it is whole."""
        hooks, gradient = [name for name in names if not name.endswith(GRAD)], self.hook_names[0] + GRAD
        if gradient in names:
            # logits and their gradients have to fit; on a CPU, into memory that is used again
            most = 1 << (23 if self.device.type == "cpu" else 25)
            batch_rows = max(1, min(batch_rows, most // (self.n_ctx * lm.cfg.d_vocab)))
        append = {}
        with contextlib.ExitStack() as stack:
            for start in range(0, len(self.rows), batch_rows):
                part = self.rows[start : start + batch_rows].astype(np.int64)
                tokens = torch.from_numpy(part).to(self.device)
                if gradient in names:
                    found, grad = run_with_gradient(lm, tokens, hooks, self.hook_names[0])
                    found[gradient] = grad
                else:
                    found = run_prefix(lm, tokens, hooks)
                for name, x in found.items():
                    if name not in append:
                        new = stack.enter_context(replacing(self.file(name)))
                        shape = (*self.rows.shape, x.shape[-1])
                        append[name] = stack.enter_context(array_writer(new, shape, np.uint16))
                    stored = x.to(self.dtype_of(name))
                    check_finite(name, x, stored, start)
                    append[name](stored.cpu().view(torch.int16).numpy().view(np.uint16))

    def __len__(self) -> int:
        """Number of activations that `batches` draws from."""
        return len(self.rows) * (self.n_ctx - self.skip)

    def take(self, entries) -> dict[str, Tensor]:
        """The activations numbered `entries` (0 … len − 1, sorted reads are fastest): x [batch, d_in] fp32, row, position, tokens."""
        row, position = np.divmod(numbers("entries", entries, len(self)), self.n_ctx - self.skip)
        position = position + self.skip
        flat = {name: x.flatten(0, 1) for name, x in self.maps.items()}
        tokens = self.rows[row, position].astype(np.int64)
        return self.read(flat, row * self.n_ctx + position, row=row, position=position, tokens=tokens)

    def take_rows(self, rows) -> dict[str, Tensor]:
        """Whole rows: x [n, n_ctx, d_in] fp32 (position 0 included), tokens [n, n_ctx], row [n], position [n_ctx]."""
        rows = numbers("rows", rows, len(self.rows))
        tokens = self.rows[rows].astype(np.int64)
        return self.read(self.maps, rows, row=rows, position=np.arange(self.n_ctx), tokens=tokens)

    def read(self, maps: dict, index: np.ndarray, **about: np.ndarray) -> dict[str, Tensor]:
        """A batch: entries of the maps, the first hook's as `x` too, and what is known about them."""
        index = torch.from_numpy(index)
        batch = {name: x.index_select(0, index).to(self.device).float() for name, x in maps.items()}
        about = {key: torch.from_numpy(value).to(self.device) for key, value in about.items()}
        return {"x": batch[self.hook_names[0]]} | batch | about

    def batches(self, batch_size: int, seed: int = 0, whole_rows: bool = False) -> "Batches":
        """Endless shuffled batches: of `batch_size` activations, or of `batch_size` whole rows."""
        n = len(self.rows) if flag("whole_rows", whole_rows) else len(self)
        if (batch_size := whole("batch_size", batch_size)) > n:
            what = "rows" if whole_rows else "activations"
            raise ValueError(f"batch_size={batch_size}: this store holds {n:,} {what}")
        return Batches(self.take_rows if whole_rows else self.take, n, batch_size, whole("seed", seed, least=0))

    def activations(self, n: int = 0) -> Tensor:
        """The first n activations in row order (all by default), [n, d_in] fp32 on the store's device."""
        return self.take(np.arange(min(whole("n", n, least=0) or len(self), len(self))))["x"]


class Batches:
    """An endless stream of batches: every epoch a new permutation, drawn from (seed, epoch); the partial last batch is dropped."""

    def __init__(self, take, n: int, batch_size: int, seed: int):
        self.take, self.n, self.batch_size, self.seed = take, n, batch_size, seed

    def __iter__(self):
        return self.from_step(0)

    def from_step(self, step: int):
        """The stream as it is after `step` batches, at no cost."""
        epoch, start = divmod(step, self.n // self.batch_size)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            for i in range(start, self.n // self.batch_size):
                yield self.take(np.sort(order[i * self.batch_size : (i + 1) * self.batch_size]))
            epoch, start = epoch + 1, 0


def check_finite(name: str, x: Tensor, stored: Tensor, start: int) -> None:
    """FloatingPointError for values that are not finite as they are stored: it names the hook and the row, and says why."""
    bad = (~torch.isfinite(stored)).flatten(1).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        why = f"is NaN or infinite in row {start + row} of the tokens: the model overflows there, try it in float32"
        if (most := x[row].abs().max()).isfinite():
            why = f"reaches {most:.3g} in row {start + row}, too large for {stored.dtype}: use dtype='bfloat16'"
        raise FloatingPointError(f"{name} {why}")


def numbers(name: str, values, n: int) -> np.ndarray:
    """The values as an array of whole numbers below n; ValueError if they are none."""
    array = np.atleast_1d(np.asarray(values.cpu() if isinstance(values, Tensor) else values))
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size or array.min() < 0 or array.max() >= n:
        raise ValueError(f"{name}={values!r}: they have to be whole numbers from 0 to {n - 1:,}, in a list or array")
    return array.astype(np.int64, copy=False)


def weights_hash(lm) -> str:
    """SHA-256 over the language model's configuration and parameters."""
    weights = {name: value for name, value in lm.state_dict().items() if isinstance(value, Tensor)}
    return tensors_hash(weights, lm.original_model.config.to_json_string())
