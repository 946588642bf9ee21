"""What an SAE leaves unexplained (arXiv 2410.14670).

Probes predict the error e = x − x̂ from x by least squares, and split it into a linear and a nonlinear part. `controls` (ours) holds
what the numbers are compared with, and `world` data in which every part of the error is known.

A *stream* is an iterable, gone through more than once, of dicts with `x` [n, d_in] and `row` [n], the context of each token.
"""

import collections
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..activations.hooks import run_prefix, run_spliced, token_loss
from ..saes.base import measuring
from .least_squares import ROWS_PER_INPUT, Linear, Moments, Scores, resamples, slices, with_interval

FIVE = ("x", "x_hat", "error", "linear", "nonlinear")


def verdict(value: list[float], within: tuple[float, float], control: float, name: str = "") -> dict:
    """Whether a claim is true here, from its value [value, low, high] and the range that the claim allows.

    The claim holds if the whole interval is in the range, and does not if all of it is outside. If a control, which knows nothing
    of what the claim is about, is in the range as well, a claim that holds is no evidence.
    """
    (here, low, high), (at_least, at_most) = value, within
    says = "undecided"  # also where the interval is NaN
    if high < at_least or low > at_most:
        says = "does not hold here"
    elif at_least <= low and high <= at_most:
        says = f"holds, and {'in' if at_least <= control <= at_most else 'not in'} the control"
    numbers = {"here": here, "low": low, "high": high, "range": list(within), "control": control}
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
    """What `split_error` finds. Scores and norms are those of the test stream."""

    vector: Linear  # x → e
    norm: Linear  # x → ‖e‖²
    scores: dict[str, Scores]
    norms: dict[str, Tensor]  # "error" and "nonlinear", [n] each, of every test token

    def summary(self) -> dict[str, float | list[float]]:
        """r2 of e from x, r2_norm_* of the squared norms of `FIVE` from x, each with its `_interval`; fvu and fvu_nonlinear.

        At a decoder that is optimal for its latents fvu_nonlinear ≤ fvu_bound = FVU (1 − FVU), and r2 ≥ FVU.
        """
        values = {name: 1 - self.scores[name].r2() for name in ("fvu", "fvu_nonlinear")}
        values["fvu_bound"] = values["fvu"] * (1 - values["fvu"])
        values["r2_per_coordinate"] = float(self.scores["r2"].per_coordinate().nanmean())
        for name, score in self.scores.items():
            if name.startswith("r2"):
                value, *interval = with_interval(1 - score.draws())
                values |= {name: value, f"{name}_interval": interval}
        return values


@measuring
def split_error(sae, fit, test, rows_per_input: int = ROWS_PER_INPUT) -> ErrorSplit:
    """Probe the error of an SAE (arXiv 2410.14670): fitted on one stream, scored on another, of other contexts.

    b* = argmin E‖x b + c − e‖², LinearError = x b* + c, NonlinearError = e − LinearError; a* = argmin E(aᵀx + c − ‖e‖²)².
    The norm probe is fitted to the squared norms of all of `FIVE`. FVU_nonlinear = 1 − R²(x, x̂ + LinearError), pooled.
    `sae`: any callable x → object with x_hat. Raises ValueError for fewer than 40 · d_in fitting tokens, and where a context is
    in both streams.
    """
    moments, norm_moments, seen = Moments(), Moments(), set()
    for batch in slices(fit):
        moments.add(batch["x"], batch["x"] - sae(batch["x"]).x_hat)
        seen |= set(batch["row"].unique().tolist())
    vector = moments.fit(rows_per_input)

    def five(x):
        """The vectors of `FIVE`, and their squared norms [n, 5]."""
        x_hat, linear = sae(x).x_hat, vector(x)
        parts = dict(zip(FIVE, (x, x_hat, x - x_hat, linear, x - x_hat - linear)))
        return parts, torch.stack([part.double().square().sum(1) for part in parts.values()], 1)

    for batch in slices(fit):
        norm_moments.add(batch["x"], five(batch["x"])[1])
    norm = norm_moments.fit(rows_per_input)
    scores, norms = collections.defaultdict(Scores), collections.defaultdict(list)
    for batch in slices(test):
        x, row = batch["x"], batch["row"]
        if both := seen & set(row.unique().tolist()):
            raise ValueError(f"context {min(both)} is in both streams: split by context, not by token")
        parts, squares = five(x)
        scores["r2"].add(parts["error"], parts["nonlinear"], row)
        scores["fvu"].add(x, parts["error"], row)
        scores["fvu_nonlinear"].add(x, parts["nonlinear"], row)
        residual = squares - norm(x.double())
        for i, name in enumerate(FIVE):
            scores[f"r2_norm_{name}"].add(squares[:, [i]], residual[:, [i]], row)
        for name in ("error", "nonlinear"):
            norms[name].append(parts[name].norm(dim=1).cpu())
    at = FIVE.index("error")
    norm = Linear(norm.W[:, at], norm.c[at])
    return ErrorSplit(vector, norm, dict(scores), {name: torch.cat(found) for name, found in norms.items()})


@torch.no_grad()
def map_from(inputs, target, fit, test, rows_per_input: int = ROWS_PER_INPUT) -> Scores:
    """Least squares from inputs(batch) [n, d_u] to target(batch) [n, d_v], fitted on one stream and scored on the other.

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


def map_of_norms(inputs: Tensor, norm: Tensor, n_contexts: int) -> Scores:
    """Least squares with bias of ‖e‖ [n] on other norms of the same tokens, [n] or [n, d_u], scored on these tokens by context."""
    u, v = inputs.view(len(norm), -1).double(), norm[:, None].double()
    stream = [{"u": u, "v": v, "row": torch.arange(len(norm)) // (len(norm) // n_contexts)}]
    return map_from(lambda batch: batch["u"], lambda batch: batch["v"], stream, stream, rows_per_input=1)


@measuring
def norm_baselines(sae, fit, test, power: int = 2) -> dict[str, float]:
    """R² of ‖e‖^power on the test stream from less than x: its length (‖x‖, ‖x‖²), the token, or the position.

    Token and position predict the mean of their fitting tokens, and the mean of all where they are new. Both streams need
    `tokens` and `position` [n] as well.
    """

    def target(batch):
        return (batch["x"] - sae(batch["x"]).x_hat).norm(dim=1, keepdim=True) ** power

    def length(batch):
        norm = batch["x"].norm(dim=1, keepdim=True)
        return torch.cat([norm, norm.square()], 1)

    def table(batch):
        return pd.DataFrame({"target": target(batch)[:, 0].double().cpu()} | {key: batch[key].cpu() for key in groups})

    groups = ("tokens", "position")
    values = {"‖x‖, ‖x‖²": map_from(length, target, fit, test).r2()}
    known, new = (pd.concat([table(batch) for batch in stream]) for stream in (fit, test))
    for key in groups:
        predicted = new[key].map(known.groupby(key)["target"].mean()).fillna(known["target"].mean())
        scores, v = Scores(), torch.tensor(new["target"].to_numpy())[:, None]
        scores.add(v, v - torch.tensor(predicted.to_numpy())[:, None])
        values[key] = scores.r2()
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
    length the patch puts back; ratio = recovered / share as [value, low, high], with batches of rows drawn again. "fraction" is a
    control (ours): x̂ + s e with the share of the nonlinear error. Means are over predictions at positions ≥ 1 of `rows` [n, n_ctx].
    """
    sums, n = [], 0
    for i in range(0, len(rows), batch_rows):
        tokens = torch.from_numpy(np.asarray(rows[i : i + batch_rows]).astype("int64")).to(lm.cfg.device)
        x = run_prefix(lm, tokens, [hook_name])[hook_name].float()
        x_hat = sae(x).x_hat
        linear, error = split.vector(x), x - x_hat
        left = (linear[:, 1:].square().sum() / error[:, 1:].square().sum().clamp_min(1e-30)).sqrt()
        patches = {"clean": x, "sae": x_hat, "linear": x_hat + linear, "nonlinear": x - linear}
        patches["fraction"] = x - left * error  # leaves as much of ‖e‖² as x̂ + NonlinearError does
        for patch in patches.values():
            patch = torch.cat([x[:, :1], patch[:, 1:]], 1)
            loss = token_loss(run_spliced(lm, tokens, hook_name, patch), tokens)[:, 1:]
            sums.append([float(loss.double().sum()), float((x - patch).double().square().sum())])
        n += loss.numel()
    nats, squares = torch.tensor(sums, dtype=torch.double).view(-1, len(patches), 2).unbind(2)  # [n_batches, 5]
    values = {f"ce_{name}": float(total) / n for name, total in zip(patches, nats.sum(0))}
    nats, squares = resamples(len(nats)) @ nats, resamples(len(nats)) @ squares  # [1 + 1000, 5]
    for at, name in enumerate(list(patches)[2:], start=2):
        recovered = (nats[:, 1] - nats[:, at]) / (nats[:, 1] - nats[:, 0])
        share = 1 - squares[:, at] / squares[:, 1]
        values |= {f"recovered_{name}": float(recovered[0]), f"share_{name}": float(share[0])}
        values[f"ratio_{name}"] = with_interval(recovered / share)
    return values
