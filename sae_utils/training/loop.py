"""The training loop: any SAEs, any objectives, one stream; checkpoints and exact resume.

Per step and SAE: objective, backward, W_dec's gradient projected off its rows, gradient clipped, Adam, rows of W_dec
renormalised (arXiv 2406.04093: project and renormalise, both).
"""

import contextlib
import inspect
import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ..device import bf16_is_fast
from ..saes.base import SAE, check_parameters, high_norm, scale_of, typical
from ..values import flag, real, whole
from .checkpoint import load_checkpoint, place_of, save_checkpoint, set_random
from .identity import check_fixed, of, training_parts
from .losses import GRADIENTS, check_fit, own_objective
from .optimizer import Optimizer, resample_dead
from .streams import as_stream, on_device, ordinary_fvu, skip, stream, warn_of_high_norms, without, without_first


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    sae,
    batches,
    objective=None,
    *,
    n_steps: int,
    stop_after: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    warmup: int | None = None,
    decay: float = 0.2,
    cosine: bool = False,
    final_lr: float = 0.0,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    bf16: bool = False,
    resample: Sequence[float] = (),
    skip_norm_above: float | None = None,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> pd.DataFrame:
    """Train one SAE, or several on the same batches, `{"name": sae, "other": (sae, objective), …}`. Returns the history.

    batches: any iterable of tensors or arrays [..., d_in] or batch dicts; a list or data loader is gone through again when it
    ends. Or activations in one piece, which are shuffled by `seed` into batches of `batch_size` (default 1,024, or all if fewer):
    a tensor, a NumPy array or a memory map [n, d_in], of which one batch at a time is read and converted, or an ActivationStore.
    objective: (sae, batch) → dict of scalars with "loss". None is the own loss of the SAE's class.
    lr: Adam's peak rate; None applies the width rule 2e-4/√(d_sae/2¹⁴). It warms up over `warmup` steps (default
    min(1,000, 5% of n_steps)), stays, and falls to `final_lr` × the peak over the last `decay` share of the steps (ours): along
    a line, or along half a `cosine`. So decay=1, cosine=True, final_lr=0.1 is the schedule of arXiv 2405.12241.
    stop_after: leave off after this many of the n_steps, whose schedule holds: what the whole run is at that step, bit for bit, its
    learning rate not fallen yet. It is the control for what little training does. (A short run of its own, n_steps=64 say,
    warms up and decays within it.) With a checkpoint the run without `stop_after` goes on from there, its history one row longer.
    clip: largest gradient norm, per SAE, with biases in units of x. bf16: products in bfloat16 (autocast), where the hardware has
    them; otherwise exact fp32.
    resample: shares of the run, (0.25, 0.5) say, at which dead latents begin anew by `resample_dead`; after each lr rises again
    from 0.1 × along a cosine, over min(1,000, 5% of n_steps) steps (arXiv 2404.16014; the 5% ours).
    skip_norm_above: leave out of training, and of x_scale and b_dec's start, every token with ‖x − m‖ > skip_norm_above · the
    median of ‖x − m‖ in the first batch, m the median of each coordinate there; 5, say. For batches [n, d_in].
    checkpoint: a file, written every `checkpoint_every` steps (rounded up to a row of the history) and at the end. If it
    holds this very training, that one goes on where it stopped. The same training has the same settings, first batch, SAEs with the
    same weights at the start, and code and values of objectives and classes. So begin with SAEs made anew from the same
    seed: one that was trained in the meantime has other weights. Other sources of `sae_utils` start it anew.

    The first time an SAE is trained b_dec becomes the mean of the first batch, and the spread per coordinate of its ordinary
    tokens the unit of biases, so that the scale of x plays no part; a second `train` keeps both. `dead_after` becomes min(10M,
    10% of the run's tokens), but no less than it was in a training before: a short second one cannot tell which latents are dead. On one machine and number of threads equal seeds give equal bits on CPU, interrupted or not.
    History: ~200 rows a SAE: step, tokens, lr, the objective's scalars (each averaged since the row before), dead (the share
    of dead latents), and with several SAEs `sae`, the name. A UserWarning says so if an objective's coefficient kills every
    latent, or none; if bf16 is not there; and if a few tokens of high norm (over 5 times the usual, as above) hold most of the
    variance of a batch: from then on each row has `fvu_ordinary`, the FVU of its last batch without them.

    Raises FloatingPointError naming the batch if x, a loss or its gradient is not finite (the checkpoint keeps the last good
    state); ValueError for settings out of range, an objective that does not fit, a stream that is empty, of another width or scale,
    without variance or with a batch of one token, a damaged checkpoint or one of another training, which says what differs. With
    a checkpoint also for what changes in an SAE or objective while it trains and is in no persistent buffer.

    >>> history = train(TopKSAE(8, 32, k=2), torch.randn(4096, 8), n_steps=20, progress=False)
    >>> bool(history["fvu"].iloc[-1] < history["fvu"].iloc[0])
    True
    """
    jobs = as_jobs(sae, objective)
    device = next(iter(jobs.values()))[0].W_dec.device
    rate = n_steps, lr, warmup, decay, cosine, final_lr, resample
    rest = seed, clip, betas, bf16, skip_norm_above, batch_size
    asked = checked(*rate, *rest, device)
    flag("progress", progress)
    n_steps, log_every = asked.n_steps, max(1, asked.n_steps // 200)
    last = n_steps if stop_after is None else whole("stop_after", stop_after, 1, n_steps)
    save_every = log_every * math.ceil(whole("checkpoint_every", checkpoint_every) / log_every)
    checkpoint = None if checkpoint is None else place_of(checkpoint)
    rates = {name: asked.lr or 2e-4 / math.sqrt(sae.d_sae / 2**14) for name, (sae, _) in jobs.items()}
    optimizers = {name: Optimizer(sae, asked.betas) for name, (sae, _) in jobs.items()}
    finite, step, history, rows = Finite(checkpoint, device), 0, [], {name: [] for name in jobs}

    with torch.random.fork_rng():
        torch.manual_seed(asked.seed)
        batches = as_stream(batches, batch_size, asked.seed)
        first, iterator = stream(batches)
        first = on_device(first, device)
        check_batch(jobs, first, 0, asked)
        if checkpoint:
            unsure, parts = True, training_parts(jobs, first, vars(asked))
            if checkpoint.exists():
                step, history, states = load_checkpoint(checkpoint, jobs, optimizers, parts)
                if step > last:
                    raise ValueError(f"stop_after={stop_after}: {checkpoint} is at step {step}, so use another path")
                if 0 < step < n_steps:
                    iterator = skip(batches, iterator, step)
                    set_random(states)
        usual = begin(jobs, first["x"], asked, anew=step == 0)
        scales = {name: sae.x_scale.item() for name, (sae, _) in jobs.items()}
        tokens = history[-1]["tokens"] if history else 0
        few_hold_most = any("fvu_ordinary" in row for row in history)
        bar = tqdm(total=last, initial=step, desc="train", mininterval=10, disable=not progress)
        for batch in itertools.islice(iterator, last - step):
            batch = on_device(batch, device) | {"progress": step / n_steps}
            check_batch(jobs, batch, step, asked)
            x = batch["x"]
            n_tokens = x.numel() // x.shape[-1]
            tokens += n_tokens
            finite.check({"the activations x": x.sum(dtype=torch.promote_types(x.dtype, torch.float32))}, step)
            if asked.skip_norm_above is not None:
                batch = without(batch, high_norm(x, *usual, asked.skip_norm_above))
                check_batch(jobs, batch, step, asked, f" of {n_tokens} within skip_norm_above")
                x = batch["x"]
            factor = schedule(step, asked)
            for name, (sae, loss) in jobs.items():
                if step in asked.resample:
                    resample_dead(sae, x, optimizers[name], torch.Generator().manual_seed(asked.seed * n_steps + step))
                sae.train()
                with torch.autocast(device.type, torch.bfloat16) if asked.bf16 else contextlib.nullcontext():
                    terms = check_terms(loss(sae, batch), name)
                finite.check({f"{key!r} of the objective{of(name)}": value for key, value in terms.items()}, step)
                watch = lambda norm: finite.check({f"the gradient of 'loss'{of(name)}": norm}, step)  # noqa: B023, E731
                optimizers[name].update(terms["loss"], rates[name] * factor, scales[name], asked.clip, watch)
                rows[name].append({key: value.detach().float() for key, value in terms.items()})
            step += 1
            bar.update()
            if step % log_every and step < last:
                continue
            finite.look()
            few_hold_most = few_hold_most or asked.skip_norm_above is None and warn_of_high_norms(x, usual)
            for name, (sae, _) in jobs.items():
                row = ({"sae": name} if name else {}) | {"step": step, "tokens": tokens, "lr": rates[name] * factor}
                row |= {key: torch.stack([r[key] for r in rows[name]]).mean().item() for key in rows[name][0]}
                if few_hold_most:
                    row["fvu_ordinary"] = ordinary_fvu(sae, x, usual)
                history.append(row | {"dead": sae.dead().float().mean().item()})
                rows[name].clear()
            if checkpoint and (step % save_every == 0 or step == last):
                if unsure:
                    check_fixed(jobs, parts)
                unsure = False
                save_checkpoint(checkpoint, jobs, optimizers, parts, step, history)
        bar.close()
    for name, (sae, loss) in jobs.items():
        sae.eval()
        l0 = next((row.get("l0") for row in reversed(history) if row.get("sae", "") == name), None)
        if last == n_steps and (advice := on_coefficient(sae, loss, l0)):
            warnings.warn(f"{name!r}: {advice}" if name else advice)
    if step < last:
        warnings.warn(f"the batches ended after {step} of n_steps={n_steps}: the learning rate never reached its end")
    return pd.DataFrame(history)


def checked(
    n_steps, lr, warmup, decay, cosine, final_lr, resample, seed, clip, betas, bf16, skip_norm_above, batch_size, device
):
    """The settings of `train`, each in its range, as a checkpoint knows them; ValueError, naming it, for one that is not."""
    n_steps, seed = whole("n_steps", n_steps), whole("seed", seed, 0, 2**32 - 1)
    lr = None if lr is None else real("lr", lr, above=0)
    warmup = min(1000, n_steps // 20) if warmup is None else whole("warmup", warmup, 0)
    decay, final_lr = real("decay", decay, 0, 1), real("final_lr", final_lr, 0, 1)
    cosine, clip = flag("cosine", cosine), real("clip", clip, above=0)
    if not isinstance(betas, (Sequence, np.ndarray)) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"betas={betas!r}: Adam's two rates of decay, as in (0.9, 0.999)")
    betas = tuple(real("betas", beta, 0, 1 - 1e-12) for beta in betas)
    if not isinstance(resample, (Sequence, np.ndarray)) or not all(0 < real("resample", r) < 1 for r in resample):
        raise ValueError(f"resample={resample!r}: shares of the run, each between 0 and 1, as in (0.25, 0.5)")
    resample = sorted(max(1, round(share * n_steps)) for share in resample)
    skip_norm_above = None if skip_norm_above is None else real("skip_norm_above", skip_norm_above, above=1)
    if flag("bf16", bf16) and not bf16_is_fast(device.type):
        warnings.warn(f"bf16=True: this {device.type} has no fast products in bfloat16, so fp32 is computed instead")
        bf16 = False
    rate = dict(n_steps=n_steps, lr=lr, warmup=warmup, decay=decay, cosine=cosine, final_lr=final_lr, resample=resample)
    rest = dict(seed=seed, clip=clip, betas=betas, bf16=bf16, skip_norm_above=skip_norm_above, batch_size=batch_size)
    return SimpleNamespace(**rate, **rest)


def schedule(step: int, asked) -> float:
    """The share of the peak rate at a step: warm-up, decay, and from 0.1 up to 1 along half a cosine after a resampling."""
    rise, left = (step + 1) / max(asked.warmup, 1), (asked.n_steps - step) / max(asked.decay * asked.n_steps, 1)
    if asked.cosine:
        left = 0.5 - 0.5 * math.cos(math.pi * min(1, left))
    left = asked.final_lr + (1 - asked.final_lr) * left
    n = min(1000, asked.n_steps // 20)
    since = min((step - at for at in asked.resample if at <= step), default=n)
    return min(1, rise, left) * (1 if since >= n else 0.55 - 0.45 * math.cos(math.pi * since / n))


def as_jobs(sae, objective) -> dict:
    """{name: (sae, objective)} of what `train` is given, each objective checked against its SAE's class."""
    if objective is not None and not callable(objective):
        raise ValueError(f"objective={objective!r:.100}: it has to be a function (sae, batch) → dict, or None")
    jobs = {}
    for name, job in sae.items() if isinstance(sae, dict) and sae else [("", sae)]:
        one, loss = job if name and isinstance(job, (tuple, list)) and len(job) == 2 else (job, objective)
        if not isinstance(name, str) or not isinstance(one, SAE) or not (loss is None or callable(loss)):
            raise ValueError(
                f"{name or 'sae'!r}: {job!r:.200} is no job. `train` takes an SAE and an objective, a function (sae, batch) → dict or "
                f"None, and for several SAEs a dictionary {{name: sae}} or {{name: (sae, objective)}}"
            )
        if any(one is other for other, _ in jobs.values()):
            raise ValueError(
                f"{name!r} is an SAE that has another name already: it would be trained twice on every batch"
            )
        jobs[name] = one, own_objective(one) if loss is None else loss
        check_fit(*jobs[name])
    devices = {str(p.device) for one, _ in jobs.values() for p in one.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"the parameters are on {', '.join(sorted(devices))}: put all on one device with sae.to(device)"
        )
    for name, (one, _) in jobs.items():
        check_parameters(one, name)
    return jobs


def check_batch(jobs: dict, batch: dict, step: int, asked, left: str = "") -> None:
    """ValueError if a batch does not do for these SAEs; `left` says of how many tokens it is what was left."""
    x, which = batch["x"], f"batch {step}" if step else "the first batch"
    if x.numel() <= x.shape[-1]:
        raise ValueError(
            f"{which} holds one token{left}, x of shape {list(x.shape)}: a batch needs two at least, since FVU is measured against "
            f"their variance. A DataLoader has drop_last=True; activations [n, d_in] in one tensor or array `train` cuts itself"
        )
    for name, (sae, loss) in jobs.items():
        about = f"{name!r}, " if name else ""
        if x.shape[-1] != sae.d_in:
            raise ValueError(f"x has shape {list(x.shape)}; its last axis has to be d_in={sae.d_in} of {about}{sae}")
        makes_it = sae.needs_grad and getattr(getattr(loss, "func", loss), "gives_grad", False)
        if sae.needs_grad and not makes_it and batch.get("grad") is None:
            raise ValueError(
                f"{about}{type(sae).__name__} selects by the gradient, and {which} has no 'grad'. {GRADIENTS}"
            )
    if asked.skip_norm_above is not None and x.ndim != 2:
        raise ValueError(
            f"skip_norm_above={asked.skip_norm_above}: x has shape {list(x.shape)}, and tokens can be left out of batches [n, d_in] "
            f"only, as store.batches(batch_size) gives them. Whole rows, which end-to-end objectives need, stay whole"
        )


def begin(jobs: dict, x: Tensor, asked, anew: bool) -> tuple[Tensor, Tensor]:
    """Centre and usual norm of the first batch's tokens; when training begins anew, what SAEs take from that batch as well."""
    rows = without_first(x).flatten(0, -2)
    usual = typical(rows)
    if asked.skip_norm_above is not None:
        rows = rows[~high_norm(rows, *usual, asked.skip_norm_above)]
    for name, (sae, _) in jobs.items() if anew else ():
        known = sae.x_scale.item()
        sae.initialise(sae.rows(rows))
        window = min(10_000_000, max(1, asked.n_steps * len(rows) // 10))
        sae.dead_after = max(window, sae.dead_after) if known else window
        if known and not 0.1 <= (ratio := scale_of(rows.float()).item() / known) <= 10:
            warnings.warn(
                f"{f'{name!r}: ' if name else ''}x_scale={known:.3g} is from the SAE's first training, and these activations "
                f"have {ratio:.2g} times that: its biases learn in the wrong unit. Scale x, or make a new SAE"
            )
    return usual


def check_terms(terms, name: str) -> dict[str, Tensor]:
    """What an objective returned, as scalar tensors; ValueError if it is not {"loss": scalar, …} with a gradient."""
    if not isinstance(terms, dict) or "loss" not in terms:
        found = f"a dict of {', '.join(map(str, terms))}" if isinstance(terms, dict) else f"a {type(terms).__name__}"
        raise ValueError(
            f"the objective{of(name)} returned {found}: it has to return a dict of scalars with 'loss' among them"
        )
    for key, value in terms.items():
        if not isinstance(value, (Tensor, float, int)) or isinstance(value, Tensor) and value.numel() != 1:
            about = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(f"{key!r} of the objective{of(name)} has {about}: it has to be a scalar")
    if not getattr(terms["loss"], "requires_grad", False):
        raise ValueError(
            f"'loss' of the objective{of(name)} does not depend on the SAE's parameters: it has no gradient"
        )
    device = terms["loss"].device
    return {key: torch.as_tensor(value, device=device).reshape(()) for key, value in terms.items()}


class Finite:
    """Values that have to be finite: looked at when they come, or together at `look` on a GPU, which looking makes wait."""

    def __init__(self, checkpoint: Path | None, device: torch.device):
        self.checkpoint, self.at_once, self.waiting = checkpoint, device.type == "cpu", {}

    def check(self, values: dict[str, Tensor], step: int) -> None:
        if not self.at_once or not all(math.isfinite(value.item()) for value in values.values()):
            self.waiting |= {(step, what): value.detach() for what, value in values.items()}
        if self.at_once:
            self.look()

    def look(self) -> None:
        """FloatingPointError naming the first batch in which a value is not finite."""
        values = [value.double() for value in self.waiting.values()]
        finite = torch.isfinite(torch.stack(values)).tolist() if values else []
        for (step, what), good in zip(self.waiting, finite):
            if not good:
                kept = self.checkpoint and self.checkpoint.exists()
                kept = f" The last good state is in {self.checkpoint}." if kept else ""
                raise FloatingPointError(f"{what} became NaN or infinite in batch {step}.{kept}")
        self.waiting.clear()


def on_coefficient(sae, objective, l0: float | None) -> str:
    """Which way to move the sparsity coefficient of an objective that has one, if L0 says that it is far off, else `""`.

    Off means (ours): fewer than one active latent in ten tokens; or more of them than x has coordinates (than half of all, in
    a narrow dictionary), where a dense code of the same size would lose nothing.
    """
    try:
        settings = inspect.signature(objective).parameters
    except (TypeError, ValueError):  # a callable that hides its arguments
        return ""
    if "suffix" in settings or "local" in settings:  # such an objective has its coefficient from the local one
        bound = settings["local"].default if "local" in settings else objective.keywords.get("local")
        settings = inspect.signature(bound or own_objective(sae)).parameters
    with_target = "target_l0" in settings and settings["target_l0"].default is not None
    if "coefficient" not in settings or with_target or l0 is None:
        return ""
    most, now = min(sae.d_in, sae.d_sae / 2), f"coefficient={settings['coefficient'].default}"
    if l0 < 0.1:
        return f"{now} leaves almost no latent active (L0 {l0:.2g} at the end): lower it, by half say"
    if l0 > most:
        return f"{now} leaves hardly any latent inactive (L0 {l0:.3g} of {sae.d_sae} at the end): raise it, twofold say"
    return ""


def undertrained(history: pd.DataFrame) -> bool:
    """Whether FVU still fell by more than 1% over the last tenth of the run (means of 5% of the run, a tenth apart)."""
    fvu = history["fvu"].to_numpy()
    n = max(1, len(fvu) // 20)
    return len(fvu) > 3 * n and bool(fvu[-n:].mean() < 0.99 * fvu[-3 * n : -2 * n].mean())
