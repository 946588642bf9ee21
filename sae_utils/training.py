"""The training loop: any SAEs, any objectives, one stream; checkpoints and exact resume.

Per step and SAE: objective, backward, W_dec's gradient projected off its rows, gradient clipped, Adam, rows of W_dec
renormalised (arXiv 2406.04093: project and renormalise, both).
"""

import contextlib
import functools
import inspect
import itertools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .files import digest, replacing, source_hashes
from .losses import as_batch, reconstruction_loss
from .store import tensors_hash


def train(
    sae,
    batches,
    objective=reconstruction_loss,
    *,
    n_steps: int,
    lr: float | None = None,
    seed: int = 0,
    warmup: int | None = None,
    decay: float = 0.2,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    bf16: bool = False,
    resample: Sequence[float] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> pd.DataFrame:
    """Train one SAE, or several on the same batches, `{"name": (sae, objective), …}`. Returns the history.

    batches: any iterable of tensors [..., d_in] or batch dicts; a list or data loader is gone through again when it ends.
    lr: Adam's peak rate; None applies the width rule 2e-4/√(d_sae/2¹⁴). It warms up over `warmup` steps (default
    min(1,000, 5% of n_steps)), stays, and falls linearly to 0 over the last `decay` share of the steps (ours).
    clip: largest gradient norm, per SAE. bf16: products in bfloat16 (autocast); otherwise exact fp32.
    resample: shares of the run, (0.25, 0.5) say, at which dead latents begin anew by `resample_dead`; after each lr rises again
    from 0.1 × along a cosine, over min(1,000, 5% of n_steps) steps (arXiv 2404.16014; the 5% ours).
    checkpoint: a file, written every `checkpoint_every` steps (rounded up to a row of the history) and at the end. If it
    holds a training of these very settings, that one goes on where it stopped.

    The first time an SAE is trained b_dec becomes the mean of the first batch, and its spread per coordinate the unit in which
    biases learn, so that the scale of x plays no part; a second `train` keeps both. `dead_after` becomes min(10M, 10% of
    the run's tokens). On one machine equal seeds give equal bits on CPU, interrupted or not.
    History: ~200 rows a SAE: step, tokens, lr, the objective's scalars (each averaged since the row before), dead (the share
    of dead latents), and with several SAEs `sae`, the name. A UserWarning says so if an objective's coefficient kills every
    latent, or none.

    Raises FloatingPointError naming the batch if x or a loss is not finite (the checkpoint keeps the last good state);
    ValueError for settings out of range, an empty stream, a damaged checkpoint or one of another training.
    """
    jobs = sae if isinstance(sae, dict) else {"": (sae, objective)}
    if not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"n_steps={n_steps!r}: it has to be a whole number of at least 1")
    if lr is not None and not lr > 0:
        raise ValueError(f"lr={lr!r}: it has to be above 0, or None for the width rule")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay!r}: a share of the steps, between 0 and 1")
    if not all(0 < share < 1 for share in resample):
        raise ValueError(f"resample={resample!r}: shares of the run, each between 0 and 1")
    warmup = min(1000, n_steps // 20) if warmup is None else warmup
    resample_at = sorted(max(1, round(share * n_steps)) for share in resample)
    rates = {name: lr or 2e-4 / math.sqrt(sae.d_sae / 2**14) for name, (sae, _) in jobs.items()}
    optimizers = {name: Optimizer(sae, betas) for name, (sae, _) in jobs.items()}
    described = {n: [type(s).__name__, s.arguments, describe(o)] for n, (s, o) in jobs.items()}
    signature = digest([described, n_steps, lr, seed, warmup, decay, clip, betas, bf16, resample_at])
    device = next(iter(jobs.values()))[0].W_dec.device
    log_every = max(1, n_steps // 200)
    save_every = log_every * math.ceil(checkpoint_every / log_every)
    step, history, scalars, scales = 0, [], [], {}

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if checkpoint and Path(checkpoint).exists():
            step, history = load_checkpoint(checkpoint, jobs, optimizers, signature)
        steps = tqdm(total=n_steps, initial=step, desc="train", mininterval=10, disable=not progress)
        for batch in stream(batches, step, n_steps):
            batch = as_batch(batch) | {"progress": step / n_steps}
            x = batch["x"] = batch["x"].to(device)
            if not scales:
                for name, (sae, _) in jobs.items():
                    if step == 0:
                        sae.initialise(rows := sae.rows(x if x.ndim < 3 else x[:, 1:]))  # position 0 is an outlier
                        sae.dead_after = min(10_000_000, max(1, n_steps * len(rows) // 10))
                    scales[name] = sae.x_scale.item()
            factor = min(1, (step + 1) / max(warmup, 1), (n_steps - step) / max(decay * n_steps, 1))
            factor *= recovery(step, resample_at, min(1000, n_steps // 20))
            if step in resample_at:
                for name, (sae, _) in jobs.items():
                    resample_dead(sae, x, optimizers[name], torch.Generator().manual_seed(seed * n_steps + step))
            scalars.append({"x": {"sum": x.sum(dtype=torch.float32)}})
            for name, (sae, loss) in jobs.items():
                sae.train()
                with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
                    terms = loss(sae, batch)
                optimizers[name].update(terms["loss"], rates[name] * factor, scales[name], clip)
                scalars[-1][name] = {key: value.detach() for key, value in terms.items()}
            step += 1
            steps.update()
            log = step % log_every == 0 or step == n_steps
            if log or device.type == "cpu":  # reading a scalar makes a GPU wait, so there it is done once in a while
                check_finite(scalars if log else scalars[-1:], step, checkpoint)
            if log:
                for name, (sae, _) in jobs.items():
                    row = {"sae": name} if name else {}
                    row |= {"step": step, "tokens": step * (x.numel() // x.shape[-1]), "lr": rates[name] * factor}
                    for key in scalars[0][name]:
                        row[key] = torch.stack([s[name][key].float() for s in scalars]).mean().item()
                    history.append(row | {"dead": sae.dead().float().mean().item()})
                scalars = []
                if checkpoint and (step % save_every == 0 or step == n_steps):
                    save_checkpoint(checkpoint, jobs, optimizers, signature, step, history)
        steps.close()
    for name, (sae, loss) in jobs.items():
        sae.eval()
        l0 = next((row.get("l0") for row in reversed(history) if row.get("sae", "") == name), None)
        if advice := on_coefficient(sae, loss, l0):
            warnings.warn(f"{name!r}: {advice}" if name else advice)
    if step < n_steps:
        warnings.warn(f"the batches ended after {step} of n_steps={n_steps}: the learning rate never reached its end")
    return pd.DataFrame(history)


def stream(batches, start: int, n_steps: int):
    """Batches `start` … n_steps − 1. A stream with `from_step` is asked for its place; any other is skipped through."""
    if hasattr(batches, "from_step"):
        return itertools.islice(batches.from_step(start), n_steps - start)

    def again():
        while True:
            empty = True
            for batch in batches:
                empty = False
                yield batch
            if empty or iter(batches) is batches:  # a generator ends once and for all
                return

    first = next(iterator := again(), None)
    if first is None:
        raise ValueError("batches is empty: it has to yield at least one [..., d_in] tensor or batch dict")
    return itertools.islice(itertools.chain([first], iterator), start, n_steps)


class Optimizer:
    """Fused Adam over an SAE's parameters, with what comes before and after its step.

    `leaves` are the parameters as they lie in memory: a transposed one (W_enc) Adam would copy back and forth in every step.
    Adam's step does not grow with the gradient, so what scales with x (`in_units_of_x`) needs a rate that does.
    """

    def __init__(self, sae, betas: tuple[float, float]):
        self.sae, self.leaves = sae, {}
        for name, p in sae.named_parameters():
            self.leaves[name] = p if p.is_contiguous() else torch.nn.Parameter(p.detach().T, p.requires_grad)
        scaled = [self.leaves[name] for name in sae.in_units_of_x]
        others = [leaf for name, leaf in self.leaves.items() if name not in sae.in_units_of_x]
        self.adam = torch.optim.Adam([{"params": others}, {"params": scaled}], betas=betas, fused=True)

    def update(self, loss: Tensor, lr: float, x_scale: float, clip: float) -> None:
        """Backward, projection, clipping at a gradient norm, Adam, renormalisation."""
        parameters = list(self.sae.parameters())
        for p in parameters:
            p.grad = None
        loss.backward()
        self.sae.project_decoder_gradient()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if norm.is_cuda or not norm <= clip:  # on a GPU asking costs more than multiplying by 1
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        for leaf, p in zip(self.leaves.values(), parameters):
            if leaf is not p and p.grad is not None:
                leaf.grad = p.grad.T
        weights, scaled = self.adam.param_groups
        weights["lr"], scaled["lr"] = lr, lr * x_scale
        self.adam.step()
        self.sae.after_step()

    def state(self) -> dict[str, Tensor]:
        return {f"{name}/{k}": v for name, leaf in self.leaves.items() for k, v in self.adam.state[leaf].items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            name, k = key.split("/")
            self.adam.state[self.leaves[name]][k] = value.to(self.leaves[name].device)


def recovery(step: int, resample_at: list[int], n: int) -> float:
    """The factor of lr in the n steps after a resampling: from 0.1 up to 1 along half a cosine."""
    since = min((step - at for at in resample_at if at <= step), default=n)
    return 1 if since >= n else 0.55 - 0.45 * math.cos(math.pi * since / n)


@torch.no_grad()
def resample_dead(sae, x: Tensor, optimizer: Optimizer, generator: torch.Generator) -> None:
    """Let dead latents begin anew at inputs that are reconstructed badly (Bricken et al. 2023); live ones stay as they are.

    Inputs are drawn with probability ∝ (‖x − x̂‖²)², each for one latent at most; in whole rows position 0 is not drawn. W_dec
    gets the direction of x − b_dec, W_enc the same at 0.2 × the mean norm of the live, biases and Adam's moments become 0.
    No random state but `generator` is touched.
    """
    rows, live = sae.rows(x if x.ndim < 3 else x[:, 1:]), ~sae.dead()
    dead = (~live).nonzero().squeeze(1)[: len(rows)]
    if not len(dead):
        return
    error = (rows - sae.eval()(rows).x_hat).square().sum(1).double()
    weight = (error / error.max().clamp_min(1e-30)).square().nan_to_num().cpu() + 1e-12  # never 0
    chosen = rows[torch.multinomial(weight, len(dead), generator=generator).to(rows.device)]
    directions = torch.nn.functional.normalize(chosen - sae.b_dec, dim=1)
    for name, parameter in sae.named_parameters():
        new, leaf = directions if name == "W_dec" else 0, optimizer.leaves[name]
        if name in ("W_enc", "W_mag"):
            new = 0.2 * parameter.norm(dim=0)[live if live.any() else slice(None)].mean() * directions
        by_latent = 0 if name == "W_dec" or leaf is not parameter else -1  # the axis
        moments = [(m, 0) for m in optimizer.adam.state[leaf].values() if m.ndim]
        for tensor, value in [(leaf, new), *moments] if name != "b_dec" else []:
            tensor.movedim(by_latent, 0)[dead] = value
    sae.tokens_since_fired[dead] = 0


def check_finite(scalars: list[dict], step: int, checkpoint) -> None:
    """Raise FloatingPointError naming the first batch in which x or a term of a loss is not finite."""
    values = {(i, n, k): v for i, terms in enumerate(scalars) for n, t in terms.items() for k, v in t.items()}
    finite = torch.isfinite(torch.stack([v.double() for v in values.values()])).tolist()
    for (i, name, key), good in zip(values, finite):
        if not good:
            what = (
                "the activations x" if name == "x" else f"{key!r} of the objective" + (f" of {name!r}" if name else "")
            )
            kept = f" The last good state is in {checkpoint}." if checkpoint and Path(checkpoint).exists() else ""
            raise FloatingPointError(f"{what} became NaN or infinite in batch {step - len(scalars) + i}.{kept}")


def on_coefficient(sae, objective, l0: float | None) -> str:
    """Which way to move the sparsity coefficient of an objective that has one, if L0 says that it is far off, else `""`.

    Off means (ours): fewer than one active latent in ten tokens; or more of them than x has coordinates (than half of all, in
    a narrow dictionary), where a dense code of the same size would lose nothing.
    """
    settings = inspect.signature(objective).parameters
    if "local" in settings:  # an end-to-end objective has its coefficient from the local one
        settings = inspect.signature(settings["local"].default).parameters
    with_target = "target_l0" in settings and settings["target_l0"].default is not None
    if "coefficient" not in settings or with_target or l0 is None:
        return ""
    most, now = min(sae.d_in, sae.d_sae / 2), f"coefficient={settings['coefficient'].default}"
    if l0 < 0.1:
        return f"{now} leaves almost no latent active (L0 {l0:.2g} at the end): lower it, by half say"
    if l0 > most:
        return f"{now} leaves hardly any latent inactive (L0 {l0:.3g} of {sae.d_sae} at the end): raise it, twofold say"
    return ""


def describe(objective) -> str:
    """Name and bound settings of an objective, the same in every process."""
    if isinstance(objective, functools.partial):
        bound = {key: describe(v) if callable(v) else v for key, v in objective.keywords.items()}
        return f"{describe(objective.func)}{objective.args}{sorted(bound.items())}"
    return getattr(objective, "__qualname__", type(objective).__name__)


def save_checkpoint(path, jobs, optimizers, signature: str, step: int, history: list[dict]) -> None:
    tensors = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for name, (sae, _) in jobs.items():
        tensors |= {f"{name}/{key}": value for key, value in sae.state_dict().items()}
        tensors |= {f"{name}/adam/{key}": value for key, value in optimizers[name].state().items()}
    about = {"signature": signature, "sources": digest(source_hashes()), "step": step, "history": history}
    about["dead_after"] = {name: sae.dead_after for name, (sae, _) in jobs.items()}
    tensors, text = {key: value.contiguous() for key, value in tensors.items()}, json.dumps(about)
    with replacing(path, len(text) + sum(value.nbytes for value in tensors.values())) as new:
        save_file(tensors, new, {"training": text, "sha256": tensors_hash(tensors, text)})


def load_checkpoint(path, jobs, optimizers, signature: str) -> tuple[int, list[dict]]:
    """Restore everything in place; return the step and history. A checkpoint of older `sae_utils` sources is passed over."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata["training"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if metadata["sha256"] != tensors_hash(tensors, metadata["training"]):
            raise ValueError("its checksum is wrong")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint of ours ({error}): delete it to train from the start"
        ) from None
    if about["signature"] != signature:
        raise ValueError(
            f"{path} is the checkpoint of another training: give this one its own path, or delete the file"
        )
    if about["sources"] != digest(source_hashes()):
        warnings.warn(f"{path} was made by other sae_utils sources: training starts anew")
        return 0, []
    for name, (sae, _) in jobs.items():
        sae.dead_after = about["dead_after"][name]
        sae.load_state_dict({key: tensors[f"{name}/{key}"] for key in sae.state_dict()})
        prefix = f"{name}/adam/"
        optimizers[name].load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    return about["step"], about["history"]


def undertrained(history: pd.DataFrame) -> bool:
    """Whether FVU still fell by more than 1% over the last tenth of the run (means of 5% of the run, a tenth apart)."""
    fvu = history["fvu"].to_numpy()
    n = max(1, len(fvu) // 20)
    return len(fvu) > 3 * n and bool(fvu[-n:].mean() < 0.99 * fvu[-3 * n : -2 * n].mean())
