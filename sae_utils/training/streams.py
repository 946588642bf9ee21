"""The batches that training sees: activations in any form, their order, and tokens of high norm among them."""

import itertools
import warnings

import numpy as np
import torch
from torch import Tensor

from ..activations.store import Batches
from ..saes.base import HIGH_NORM, high_norm, inference
from ..values import whole
from .losses import FLOATS, as_batch, fvu_of


def warn_of_high_norms(x: Tensor, usual) -> bool:
    """Whether a few tokens of high norm hold over half of the variance of a batch; then a UserWarning says what to do."""
    rows = without_first(x).flatten(0, -2).float()
    high = high_norm(rows, *usual)
    deviation = (rows - rows.mean(0)).square().sum(1)
    share, held = high.float().mean().item(), (deviation[high].sum() / deviation.sum()).item()
    if not (share < 0.1 and held > 0.5):
        return False
    warnings.warn(
        f"{share:.2%} of the tokens of a batch have a norm over {HIGH_NORM:g} times the usual and hold {held:.0%} of its variance, so "
        f"FVU says little about the others: the history has theirs as fvu_ordinary from here on. "
        f"skip_norm_above={HIGH_NORM:g} leaves such tokens out of training"
    )
    return True


@torch.no_grad()
def ordinary_fvu(sae, x: Tensor, usual) -> float:
    """Batch FVU over the tokens that are not of high norm, by the inference rule."""
    rows = sae.rows(without_first(x))
    rows = rows[~high_norm(rows, *usual)]
    with inference(sae):
        return fvu_of(sae)(rows, sae(rows).x_hat).item()


def without_first(x: Tensor) -> Tensor:
    """x [..., d_in] without position 0, an outlier in most models, where it is of whole rows [rows, n_ctx, d_in]."""
    return x if x.ndim < 3 or x.shape[1] < 2 else x[:, 1:]


def without(batch: dict, skipped: Tensor) -> dict:
    """The batch without the tokens marked in `skipped` [n]: of every tensor that has a row for each token."""
    kept = {key: v for key, v in batch.items() if torch.is_tensor(v) and v.shape[:1] == skipped.shape}
    return batch | {key: value[~skipped] for key, value in kept.items()}


def as_stream(batches, batch_size: int | None, seed: int):
    """An iterable of batches; activations in one piece, an array or a store, are shuffled by the seed."""
    form = f"batches is a {type(batches).__name__}"
    whole_array = getattr(batches, "ndim", 3) < 3 and hasattr(batches, "shape")
    if not whole_array and not is_store(batches):
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size!r}: these batches come as they are; it is for arrays and stores")
        iterable = any(hasattr(batches, name) for name in ("__iter__", "__getitem__", "from_step"))
        if isinstance(batches, (str, bytes, dict)) or not iterable:
            raise ValueError(f"{form}: it has to be activations [n, d_in], a store, or an iterable of batches")
        if is_store(getattr(batches, "dataset", None)):
            raise ValueError(f"{form} over a store: give the store itself, and `batch_size` to `train`")
        return batches
    n = len(batches)
    if whole_array:
        if not (isinstance(batches, (Tensor, np.ndarray)) and batches.ndim == 2 and n > 1):
            raise ValueError(
                f"{form} {list(batches.shape)}: activations in one piece are a tensor or NumPy array [n, d_in], n at least 2"
            )
        tensor = torch.is_tensor(batches)
        if not (batches.is_floating_point() if tensor else batches.dtype.name in FLOATS):
            raise ValueError(
                f"batches has dtype {batches.dtype}: activations are in floating point, {', '.join(FLOATS)}"
            )
        if tensor and batches.layout != torch.strided:
            raise ValueError(f"batches is a tensor in the layout {batches.layout}: make it dense with `to_dense()`")
    batch_size = whole("batch_size", min(1024, n) if batch_size is None else batch_size, 2, n)
    if not whole_array:
        return batches.batches(batch_size, seed)
    if tensor:
        return Batches(lambda i: batches.detach()[torch.from_numpy(i).to(batches.device)], n, batch_size, seed)
    return Batches(lambda i: batches[i], n, batch_size, seed)


def is_store(batches) -> bool:
    return hasattr(batches, "batches") and hasattr(batches, "take")


def stream(batches):
    """The first batch, and the endless or finite iterator that begins with it."""

    def again():
        while True:
            empty = True
            for batch in batches:
                empty = False
                yield batch
            if empty or iter(batches) is batches:  # a generator ends once and for all
                return

    iterator = batches.from_step(0) if hasattr(batches, "from_step") else apart(again())
    first = next(iterator, None)
    if first is None:
        raise ValueError("batches is empty: it has to yield at least one [..., d_in] tensor or batch dict")
    return first, itertools.chain([first], iterator)


def apart(iterator):
    """The batches of an iterator that draws by a random state of its own.

    What the training draws moves it in no way, so that it can be gone through again without the training.
    """
    start = own = torch.get_rng_state()
    for i in itertools.count():
        outside = torch.get_rng_state()
        torch.set_rng_state(own)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            own = torch.get_rng_state()
            torch.set_rng_state(outside)
        if i == 0 and not torch.equal(own, start):  # the training must not draw the same numbers
            torch.manual_seed(torch.initial_seed() + 1)
        yield batch


def skip(batches, iterator, step: int):
    """The iterator at batch `step`. A stream with `from_step` is asked for its place; any other is gone through."""
    if hasattr(batches, "from_step"):
        return batches.from_step(step) if step else iterator
    next(itertools.islice(iterator, step, step), None)
    return iterator


def on_device(batch, device) -> dict:
    """A batch as `train` hands it to objectives: its tensors on the device, cut off from any graph that made them."""
    batch = {key: v.detach().to(device) if torch.is_tensor(v) else v for key, v in as_batch(batch).items()}
    return {key: v.clone() if torch.is_tensor(v) and v.is_inference() else v for key, v in batch.items()}
