"""What an SAE leaves unexplained (arXiv 2410.14670).

Probes predict the error e = x − x̂ from x by least squares, and split it into a linear and a nonlinear part. `controls` (ours) holds
what the numbers are compared with, `world` data in which every part of the error is known, and `pursuit` says how much of the error
is the encoder's fault.

Probes read streams: an iterable, gone through more than once, of dicts with `x` [n, d_in] and `row` [n], the context of each token.
"""

import collections
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..activations.hooks import run_prefix, run_spliced, token_loss
from ..saes.base import measuring
from .least_squares import ROWS_PER_INPUT, Linear, Moments, Scores, in_batches, resamples, slices, with_interval


def verdict(value: list[float], within: tuple[float, float], control: float, name: str = "") -> dict:
    """Whether a claim is true here, from its value [value, low, high] and the range that the claim allows.

    The claim holds if the whole interval is in the range, and does not if all of it is outside. If a control, which knows nothing
    of what the claim is about, is in the range as well, a claim that holds is no evidence.
    """
    (v, low, high), (at_least, at_most) = value, within
    known = low <= high  # not where they are NaN
    if known and (high < at_least or low > at_most):
        says = "does not hold here"
    elif not known or low < at_least or high > at_most:
        says = "undecided"
    else:
        says = f"holds, and {'in' if at_least <= control <= at_most else 'not in'} the control"
    numbers = {"here": v, "low": low, "high": high, "range": list(within), "control": control}
    return numbers | {"control is": name, "verdict": says}


class Contexts:
    """A stream over whole rows of an ActivationStore without the first `skip` of each context (ours: a fifth)."""

    def __init__(self, store, rows, skip: float = 0.2, batch_rows: int = 64):
        self.store, self.rows, self.batch_rows = store, np.asarray(rows), batch_rows
        self.first = max(int(skip * store.n_ctx), store.skip)

    def __iter__(self):
        for i in range(0, len(self.rows), self.batch_rows):
            batch = self.store.take_rows(self.rows[i : i + self.batch_rows])
            shape = len(batch["row"]), self.store.n_ctx
            batch |= {"row": batch["row"][:, None].expand(shape), "position": batch["position"].expand(shape)}
            yield {k: v[:, self.first :].flatten(0, 1) for k, v in batch.items() if v.shape[:2] == shape}


@dataclass
class ErrorSplit:
    """What `split_error` finds; R² and FVU on the test stream."""

    vector: Linear  # x → e
    norm: Linear  # x → ‖e‖²
    scores: dict[str, Scores]
    norms: dict[str, Tensor]  # of every test token: "error", "nonlinear" [n]

    def nonlinear(self, x: Tensor, error: Tensor) -> Tensor:
        """e − LinearError(x)."""
        return error - self.vector(x)

    def summary(self) -> dict[str, float | list[float]]:
        """r2: of e from x; r2_norm_*: of five squared norms from x; fvu, fvu_nonlinear; each r2_* with `_interval`.

        fvu_bound = FVU (1 − FVU), and r2 ≥ FVU, hold at a decoder that is optimal for its latents.
        """
        values = {"fvu": 1 - self.scores["fvu"].r2(), "fvu_nonlinear": 1 - self.scores["fvu_nonlinear"].r2()}
        values["fvu_bound"] = values["fvu"] * (1 - values["fvu"])
        values["r2_per_coordinate"] = float(self.scores["r2"].per_coordinate().nanmean())
        for name, score in self.scores.items():
            if name.startswith("r2"):
                values |= {name: score.r2(), f"{name}_interval": list(score.interval())}
        return values


FIVE = ("x", "x_hat", "error", "linear", "nonlinear")


@measuring
def split_error(sae, fit, test, rows_per_input: int = ROWS_PER_INPUT) -> ErrorSplit:
    """Probe the error of an SAE (arXiv 2410.14670): fitted on one stream, scored on another, of other contexts.

    b* = argmin E‖x b + c − e‖², LinearError = x b* + c, NonlinearError = e − LinearError; a* = argmin E(aᵀx + c − ‖e‖²)².
    The norm probe is fitted to the squared norms of all of `FIVE`. FVU_nonlinear = 1 − R²(x, x̂ + LinearError), pooled.
    `sae`: any callable x → object with x_hat. Raises ValueError for fewer than 40 · d_in fitting tokens, and where a context is
    in both streams.
    """
    moments, seen = Moments(), set()
    for batch in slices(fit):
        moments.add(batch["x"], batch["x"] - sae(batch["x"]).x_hat)
        seen |= set(batch["row"].unique().tolist())
    vector = moments.fit(rows_per_input)

    def five(x):
        x_hat, linear = sae(x).x_hat, vector(x)
        return dict(zip(FIVE, (x, x_hat, x - x_hat, linear, x - x_hat - linear)))

    def squares(parts):
        return torch.stack([part.double().square().sum(1) for part in parts.values()], 1)

    norm_moments = Moments(of=moments)
    for batch in slices(fit):
        norm_moments.add(batch["x"], squares(five(batch["x"])))
    norm = norm_moments.fit(rows_per_input)
    scores, norms = collections.defaultdict(Scores), collections.defaultdict(list)
    for batch in slices(test):
        x, row = batch["x"], batch["row"]
        if both := seen & set(row.unique().tolist()):
            raise ValueError(f"context {min(both)} is in both streams: split by context, not by token")
        parts = five(x)
        scores["r2"].add(parts["error"], parts["nonlinear"], row)
        scores["fvu"].add(x, parts["error"], row)
        scores["fvu_nonlinear"].add(x, parts["nonlinear"], row)
        target = squares(parts)
        residual = target - norm(x.double())
        for i, name in enumerate(FIVE):
            scores[f"r2_norm_{name}"].add(target[:, [i]], residual[:, [i]], row)
        for name in ("error", "nonlinear"):
            norms[name].append(parts[name].norm(dim=1).cpu())
    at = FIVE.index("error")
    norm = Linear(norm.W[:, at], norm.c[at])
    return ErrorSplit(vector, norm, dict(scores), {name: torch.cat(found) for name, found in norms.items()})


def norm_scaling(norm_i: Tensor, norm_j: Tensor, nonlinear_i: Tensor) -> dict[str, float]:
    """How well ‖e_i‖ predicts ‖e_j‖ of the same tokens [n], by least squares with bias.

    r2: of ‖e_i‖ alone; removed: the share of what remains that ‖nonlinear_i‖ removes.
    """
    one, two = (
        map_of_norms(inputs, norm_j, 1).draws(0)[0] for inputs in (norm_i, torch.stack([norm_i, nonlinear_i], 1))
    )
    return {"r2": float(1 - one), "removed": float(1 - two / one)}


def map_of_norms(norm_i: Tensor, norm_j: Tensor, n_contexts: int) -> Scores:
    """Least squares of ‖e_j‖ [n] on ‖e_i‖ [n], or on several inputs [n, d_u], as scores by context for the interval of its R²."""
    both = torch.cat([norm_i.view(len(norm_j), -1), norm_j[:, None]], 1).double()
    stream = in_batches(both, len(both) // n_contexts)
    return map_from(lambda b: b["x"][:, :-1], lambda b: b["x"][:, -1:], stream, stream, rows_per_input=1)


def group_r2(fit: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """R² on test tokens of the mean of their group over the fitting tokens; a new group gets the mean of all.

    fit, test: (values [n], group [n]).
    """
    (v, group), (v_test, group_test) = fit, test
    mean = pd.Series(v.double().numpy()).groupby(group.numpy()).mean()
    predicted = mean.reindex(group_test.numpy()).fillna(float(v.double().mean()))
    scores = Scores()
    scores.add(v_test[:, None], (v_test - torch.tensor(predicted.to_numpy()))[:, None])
    return scores.r2()


@measuring
def norm_baselines(sae, fit, test, power: int = 2) -> dict[str, float]:
    """R² of ‖e‖^power on the test stream from less than x: its length (‖x‖, ‖x‖²), the token, the position (means of groups)."""

    def target(batch):
        return (batch["x"] - sae(batch["x"]).x_hat).norm(dim=1, keepdim=True) ** power

    def length(batch):
        norm = batch["x"].norm(dim=1, keepdim=True)
        return torch.cat([norm, norm.square()], 1)

    values = {"‖x‖, ‖x‖²": map_from(length, target, fit, test).r2()}
    gathered = [
        {"target": torch.cat([target(b)[:, 0].cpu() for b in part])}
        | {key: torch.cat([b[key].cpu() for b in part]) for key in ("tokens", "position")}
        for part in (fit, test)
    ]
    for key in ("tokens", "position"):
        values[key] = group_r2(*((part["target"], part[key]) for part in gathered))
    return values


@measuring
def along_latents(sae, split: ErrorSplit, stream) -> dict[str, Tensor]:
    """The mean activation of each latent that fires on the stream, and its W_dec · a for the probes a of ‖e‖² and of ‖x‖²."""
    moments, total = Moments(), 0
    for batch in stream:
        moments.add(batch["x"], batch["x"].square().sum(1, keepdim=True))
        total = total + sum(sae.encode(x).double().sum(0) for x in batch["x"].split(8192))
    W_dec, fired = sae.W_dec.double(), total > 0
    found = {"activation": total / moments.n, "‖e‖²": W_dec @ split.norm.W, "‖x‖²": W_dec @ moments.fit().W[:, 0]}
    return {name: value[fired].cpu() for name, value in found.items()}


@measuring
def patched_ce(lm, rows, hook_name: str, sae, split: ErrorSplit, batch_rows: int = 4) -> dict[str, float | list[float]]:
    """Cross-entropy with the activation at positions ≥ 1 replaced by x̂, x̂ + LinearError, x̂ + NonlinearError.

    recovered = (CE_sae − CE_setting) / (CE_sae − CE_clean); share = 1 − Σ‖x − patch‖² / Σ‖e‖², how much of the error's squared
    length the patch puts back; ratio = recovered / share as (value, low, high), with batches of rows drawn again. "fraction" is a
    control (ours): x̂ + s e with the share of the nonlinear error. Means are over predictions at positions ≥ 1 of `rows` [n, n_ctx].
    """
    settings = ("linear", "nonlinear", "fraction")
    nats, squares, n = [], [], 0
    for i in range(0, len(rows), batch_rows):
        tokens = torch.from_numpy(np.asarray(rows[i : i + batch_rows]).astype("int64")).to(lm.cfg.device)
        x = run_prefix(lm, tokens, [hook_name])[hook_name].float()
        x_hat = sae(x).x_hat
        linear, error = split.vector(x), x - x_hat
        patches = {"clean": x, "sae": x_hat, "linear": x_hat + linear, "nonlinear": x - linear}
        left = (linear[:, 1:].square().sum() / error[:, 1:].square().sum().clamp_min(1e-30)).sqrt()
        patches["fraction"] = x - left * error  # leaves as much of ‖e‖² as x̂ + NonlinearError does
        patches = {name: torch.cat([x[:, :1], patch[:, 1:]], 1) for name, patch in patches.items()}
        losses = [token_loss(run_spliced(lm, tokens, hook_name, p), tokens)[:, 1:] for p in patches.values()]
        nats.append([float(loss.double().sum()) for loss in losses])
        squares.append([float((x - patch).double().square().sum()) for patch in patches.values()])
        n += tokens[:, 2:].numel()
    nats, squares = torch.tensor(nats, dtype=torch.double), torch.tensor(squares, dtype=torch.double)
    values = {f"ce_{name}": float(total) / n for name, total in zip(patches, nats.sum(0))}
    nats, squares = (resamples(len(nats)) @ sums for sums in (nats, squares))  # [1 + 1000, 5]
    for at, name in enumerate(settings, start=2):
        recovered = (nats[:, 1] - nats[:, at]) / (nats[:, 1] - nats[:, 0])
        share = 1 - squares[:, at] / squares[:, 1]
        values |= {f"recovered_{name}": float(recovered[0]), f"share_{name}": float(share[0])}
        values[f"ratio_{name}"] = with_interval(recovered / share)
    return values


@torch.no_grad()
def map_from(inputs, target, fit, test, rows_per_input: int = ROWS_PER_INPUT) -> Scores:
    """Least squares from inputs(batch) [n, d_u] to target(batch) [n, d_v], scored on the test stream: 1 − R² of it is left.

    With several hooks in one ActivationStore `inputs` may join what earlier components wrote, or their SAEs' reconstructions.
    """
    moments, scores = Moments(), Scores()
    for batch in fit:
        moments.add(inputs(batch), target(batch))
    linear = moments.fit(rows_per_input)
    for batch in test:
        v = target(batch)
        scores.add(v, v - linear(inputs(batch)), batch["row"])
    return scores
