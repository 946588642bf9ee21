"""ActivationStore: run the language model once, keep the activations at its hooks in memory maps, read them shuffled.

One file a hook, [rows, n_ctx, d_in] in float16 or bfloat16, under a key made of model, hook and token rows, so that every
notebook finds what another has harvested. Hooks harvested from the same rows are aligned entry by entry.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import open_array
from .files import cache_dir, digest, lock
from .lm import check_hook, check_tokens, run_prefix, run_with_gradient

GRAD = ".grad"  # after a hook's name: the gradient there


class ActivationStore:
    """Activations of `lm` at one or several hooks over `rows` of tokens [n_rows, n_ctx].

    hook_names: one name or a list; `x` of a batch is the first, and `batch[name]` each of a list of several.
    dtype: "float16" (an activation over 65,504 is refused: use "bfloat16") or "bfloat16".
    skip_first: leave position 0, an outlier in most models, out of `batches` and `activations`.
    gradients: store ∇ₓ of the summed next-token loss at the first hook too (`run_with_gradient`; 0 at position 0 and at the
    last), as `grad` of a batch. Always in bfloat16: gradients are small, and float16 would lose those under 6e-8.

    Raises before any work: ValueError for an unknown hook or a context over the model's; OSError if the disk is too small.
    """

    def __init__(
        self,
        lm,
        rows: np.ndarray,
        hook_names,
        *,
        dtype: str = "float16",
        skip_first: bool = True,
        batch_rows: int = 32,
        gradients: bool = False,
    ):
        self.hook_names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
        if dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype={dtype!r}: activations are stored as 'float16' or 'bfloat16'")
        if not self.hook_names:
            raise ValueError("hook_names=[]: name at least one hook")
        for name in self.hook_names:
            check_hook(lm, name)
        if rows.ndim != 2 or not rows.size:
            raise ValueError(
                f"rows has shape {list(rows.shape)}: token rows are [n_rows, n_ctx], as `tokens` gives them"
            )
        check_tokens(lm, rows)
        if (largest := int(rows.max())) >= lm.cfg.d_vocab:
            raise ValueError(
                f"rows holds token {largest}, and the model's vocabulary has {lm.cfg.d_vocab}: another tokenizer's"
            )
        self.rows, self.n_ctx, self.skip = rows, rows.shape[1], int(skip_first)
        self.device = torch.device(lm.cfg.device)
        self.dtype = getattr(torch, dtype)
        key = digest([weights_hash(lm), hashlib.sha256(np.ascontiguousarray(rows)).hexdigest(), rows.shape, dtype])
        self.path = cache_dir() / "activations" / key
        stored = self.hook_names + ([self.hook_names[0] + GRAD] if gradients else [])
        missing = [name for name in stored if not self.file(name).exists()]
        if missing:
            with lock(self.path):
                for leftover in self.path.glob(".*"):  # of a harvest that was killed: we hold the lock
                    shutil.rmtree(leftover, ignore_errors=True)
                if missing := [name for name in missing if not self.file(name).exists()]:
                    self.harvest(lm, missing, batch_rows)
        self.maps = {name: self.open(name) for name in stored}
        self.d_in = self.maps[self.hook_names[0]].shape[-1]

    def file(self, hook_name: str) -> Path:
        return self.path / f"{hook_name}.npy"

    def open(self, hook_name: str) -> Tensor:
        array = open_array(self.file(hook_name), mode="c")  # copy-on-write: torch knows no read-only tensors
        if array.dtype != np.uint16 or array.shape[:2] != self.rows.shape:
            found = f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"{self.file(hook_name)} holds {found}, not uint16{[*self.rows.shape, 'd_in']}: delete it")
        return torch.from_numpy(array.view(np.int16)).view(self.dtype_of(hook_name))

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name.endswith(GRAD) else self.dtype

    def harvest(self, lm, hook_names: list[str], batch_rows: int) -> None:
        """Run the model over all rows and write one memory map a hook; nothing is left behind by a kill or an error."""
        wanted = [name.removesuffix(GRAD) for name in hook_names]
        first = run_prefix(lm, self.tokens(slice(0, 1)), wanted)
        first = {name: first[hook] for name, hook in zip(hook_names, wanted)}
        if hook_names[-1].endswith(GRAD):
            # logits and their gradients have to fit; on a CPU, into memory that is used again
            most = 1 << (23 if self.device.type == "cpu" else 25)
            batch_rows = max(1, min(batch_rows, most // (self.n_ctx * lm.cfg.d_vocab)))
        shapes = {name: (*self.rows.shape, first[name].shape[-1]) for name in hook_names}
        need = sum(2 * int(np.prod(shape)) for shape in shapes.values())
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if need > 0.95 * free:
            raise OSError(
                f"the activations of {', '.join(hook_names)} need {need / 2**30:.1f} GiB and {self.path} has "
                f"{free / 2**30:.1f} GiB free: lower n_tokens, harvest fewer hooks, or set SAE_UTILS_CACHE to a larger disk"
            )
        with tempfile.TemporaryDirectory(prefix=".", dir=self.path) as scratch:
            files = {name: Path(scratch, f"{name}.npy") for name in hook_names}
            maps = {n: np.lib.format.open_memmap(files[n], "w+", np.uint16, shape) for n, shape in shapes.items()}
            for start in range(0, len(self.rows), batch_rows):
                chunk = slice(start, start + batch_rows)
                for name, x in self.run(lm, self.tokens(chunk), hook_names).items():
                    stored = x.to(self.dtype_of(name))
                    if not torch.isfinite(stored).all():
                        raise FloatingPointError(self.why_not_finite(name, x, start))
                    maps[name][chunk] = stored.cpu().view(torch.int16).numpy().view(np.uint16)
            for name in hook_names:
                maps[name].flush()
                files[name].replace(self.file(name))

    def run(self, lm, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Activations, and the gradient if it is among the names, from one forward."""
        if not names[-1].endswith(GRAD):
            return run_prefix(lm, tokens, names)
        found, grad = run_with_gradient(lm, tokens, names[:-1], names[-1].removesuffix(GRAD))
        return found | {names[-1]: grad}

    def why_not_finite(self, name: str, x: Tensor, start: int) -> str:
        i = int((~torch.isfinite(x.to(self.dtype_of(name)))).flatten(1).any(1).nonzero()[0])
        if torch.isfinite(x[i]).all():
            reason = (
                f"reaches {x[i].abs().max():.3g} in row {start + i}, too large for {self.dtype}: use dtype='bfloat16'"
            )
        else:
            reason = (
                f"is NaN or infinite in row {start + i} of the tokens: the model overflows there, try it in float32"
            )
        return f"{name} {reason}"

    def tokens(self, rows) -> Tensor:
        return torch.from_numpy(self.rows[rows].astype(np.int64)).to(self.device)

    def __len__(self) -> int:
        """Number of activations that `batches` draws from."""
        return len(self.rows) * (self.n_ctx - self.skip)

    def take(self, entries) -> dict[str, Tensor]:
        """The activations numbered `entries` (0 … len − 1, sorted reads are fastest): x [batch, d_in] fp32, row, position, tokens."""
        row, position = np.divmod(np.asarray(entries), self.n_ctx - self.skip)
        position = position + self.skip
        flat = torch.from_numpy(row * self.n_ctx + position)
        batch = {name: m.view(-1, m.shape[-1]).index_select(0, flat) for name, m in self.maps.items()}
        batch = {name: x.to(self.device).float() for name, x in batch.items()}
        about = {"row": row, "position": position, "tokens": self.rows[row, position].astype(np.int64)}
        batch |= {key: torch.from_numpy(value).to(self.device) for key, value in about.items()}
        return self.named(batch)

    def take_rows(self, rows) -> dict[str, Tensor]:
        """Whole rows: x [n, n_ctx, d_in] fp32 (position 0 included), tokens [n, n_ctx], row [n], position [n_ctx]."""
        index = torch.as_tensor(np.asarray(rows))
        batch = {name: m.index_select(0, index).to(self.device).float() for name, m in self.maps.items()}
        about = {"tokens": self.tokens(np.asarray(rows)), "row": index, "position": torch.arange(self.n_ctx)}
        batch |= {key: value.to(self.device) for key, value in about.items()}
        return self.named(batch)

    def named(self, batch: dict) -> dict:
        """The first hook's activation as `x`, its gradient, if stored, as `grad`."""
        first = self.hook_names[0]
        return {"x": batch[first]} | {"grad" if name == first + GRAD else name: v for name, v in batch.items()}

    def batches(self, batch_size: int, seed: int = 0, whole_rows: bool = False) -> "Batches":
        """Endless shuffled batches: of `batch_size` activations, or of `batch_size` whole rows."""
        n = len(self.rows) if whole_rows else len(self)
        if not 1 <= batch_size <= n:
            raise ValueError(
                f"batch_size={batch_size}: this store holds {n:,} {'rows' if whole_rows else 'activations'}"
            )
        return Batches(self.take_rows if whole_rows else self.take, n, batch_size, seed)

    def activations(self, n: int = 0) -> Tensor:
        """The first n activations in row order (all by default), [n, d_in] fp32 on the store's device."""
        return self.take(np.arange(min(n or len(self), len(self))))["x"]


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


def weights_hash(lm) -> str:
    """SHA-256 over the language model's configuration and parameters."""
    sha = hashlib.sha256(lm.original_model.config.to_json_string().encode())
    for name, parameter in sorted(lm.state_dict().items()):
        if isinstance(parameter, Tensor):
            sha.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
