"""Dose and response of steering: how much a direction does to its target tokens, and what that costs in fluency.

`Curves` of one set of n directions are a dict of arrays: "strengths" [n_strengths], "nats" [n_strengths, n, n_texts], and for each
measure of `steering.effects` [n_strengths, n, n_contexts]. What "useful" means is ours.
"""

import math

import numpy as np
import torch
from torch import Tensor

from . import steering

Curves = dict[str, np.ndarray]


@torch.no_grad()
def next_token(lm, contexts: Tensor, batch_rows: int = 64) -> Tensor:
    """Mean over contexts [..., contexts, n_prompt] of the probabilities of the token that follows, [..., d_vocab].

    >>> next_token(lm, torch.tensor([[1, 2, 3], [1, 2, 4]])).sum().round(decimals=4)
    tensor(1.)
    """
    parts = contexts.flatten(0, -2).split(batch_rows)
    p = torch.cat([lm(part.to(lm.cfg.device))[:, -1].softmax(-1) for part in parts])
    return p.unflatten(0, contexts.shape[:-1]).mean(-2)


def with_targets(lm, directions: Tensor, windows: Tensor, strength_there: Tensor, usual: Tensor, n_own: int) -> dict:
    """For directions [n, d_in] their own contexts and two sets of ten target tokens: {"directions", "own", "writes", "follows"}.

    windows [n_windows, n_prompt]: contexts to choose from. strength_there [n_windows, n]: how strong each direction is on their
    last tokens. usual [d_vocab]: `next_token` of contexts drawn at random.
    own [n, n_own, n_prompt]: the windows where a direction is strongest. writes [n, 10]: the tokens of its largest `direct_logits`.
    follows [n, 10]: those whose probability after its own contexts exceeds the usual one most.

    >>> W, windows, there = torch.eye(128)[:2], torch.arange(12).view(4, 3), torch.rand(4, 2)
    >>> found = with_targets(lm, W, windows, there, usual=next_token(lm, windows), n_own=3)
    >>> {name: list(value.shape) for name, value in found.items()}
    {'directions': [2, 128], 'own': [2, 3, 3], 'writes': [2, 10], 'follows': [2, 10]}
    """
    own = windows[strength_there.topk(n_own, dim=0).indices.T.cpu()]
    writes, follows = (
        scores.topk(10).indices for scores in (steering.direct_logits(lm, directions), next_token(lm, own) - usual)
    )
    return {"directions": directions, "own": own, "writes": writes, "follows": follows}


def dose_response(
    lm, hook_name: str, directions: Tensor, contexts: Tensor, targets: dict, strengths, *, scale, n_new, n_texts, seed=0
) -> Curves:
    """Add directions [n, d_in] at rising strengths, each of length strength · scale, and measure response and price.

    contexts: tokens [n_contexts, n_prompt], or [n, n_contexts, n_prompt]. targets {name: tokens [n, n_targets]}: as in `effects`,
    measured after the context. nats: `generation_nats` of n_new tokens after n_texts of the contexts. Of shared contexts each
    direction takes the next few, so that all are used; of its own the first.

    >>> W, contexts, targets = torch.eye(128)[:2], torch.arange(12).view(4, 3), {"first": torch.tensor([[5], [6]])}
    >>> sizes = dict(scale=1.0, n_new=2, n_texts=2)
    >>> dose_response(lm, "blocks.1.hook_resid_post", W, contexts, targets, [0, 1, 2], **sizes)["first"].shape
    (3, 2, 4)
    """
    unit, n, n_prompt = steering.scaled(directions, 1.0), len(directions), contexts.shape[-1]
    turn = (np.arange(n)[:, None] * n_texts + np.arange(n_texts)) % len(contexts)
    prompts = contexts[turn] if contexts.ndim == 2 else contexts[:, :n_texts]
    rows = []
    for strength in strengths:
        edit = steering.Add(unit * strength * scale)
        found = steering.effects(lm, contexts, hook_name, edit, targets, at=[n_prompt - 1], each_context=True)
        texts = steering.generate(lm, prompts, n_new, hook_name, edit, seed=seed)
        rows.append(found | {"nats": steering.generation_nats(lm, texts, n_prompt)})
    curves = {key: torch.stack([row[key] for row in rows]).numpy() for key in rows[0]}
    return curves | {"strengths": np.array(strengths)}


def useful_range(strengths, effect, nats, factor: float = 2.0) -> tuple[float, float]:
    """(the largest effect to be had before fluency breaks, the strength at which it breaks), linearly interpolated.

    Fluency breaks where the perplexity of what is generated is first `factor` times that without steering, and at the last strength
    if it never does. strengths, effect and nats are [n_strengths] each; nats is the mean cross-entropy of generations. Raises
    ValueError for strengths that do not rise from 0.

    >>> useful_range([0, 1, 2], effect=[0.0, 2.0, 4.0], nats=[1.0, 1.0, 3.0], factor=math.e)
    (3.0, 1.5)
    """
    strengths, effect, nats = (np.asarray(values, dtype=float) for values in (strengths, effect, nats))
    if not len(strengths) == len(effect) == len(nats) or strengths[0] != 0 or not (np.diff(strengths) > 0).all():
        raise ValueError(f"strengths={strengths}: they have to rise from 0, with one effect and one loss for each")
    excess = nats - nats[0] - math.log(factor)
    end = strengths[-1]
    if len(broken := np.flatnonzero(excess > 0)):
        around = slice(broken[0] - 1, broken[0] + 1)
        end = np.interp(0, excess[around], strengths[around])
    return float(max(np.interp(end, strengths, effect), effect[strengths <= end].max())), float(end)


def useful(curves: Curves, key: str, of_directions=None, of_contexts=None) -> tuple[float, float]:
    """(useful effect, strength at which fluency breaks) of the mean curves; weights of directions and contexts are a resample's.

    >>> effect, nats = np.array([0.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])  # fluency never breaks
    >>> useful({"strengths": np.arange(3), "first": effect[:, None, None], "nats": nats[:, None, None]}, "first")
    (4.0, 2.0)
    """
    effect = np.average(np.average(curves[key], 2, of_contexts), 1, of_directions)
    nats = np.average(curves["nats"].mean(2), 1, of_directions)
    return useful_range(curves["strengths"], effect, nats)


def resampled(curves: Curves, key: str, shared: bool, seed: int, which: int = 0, n: int = 400) -> np.ndarray:
    """Useful effects of n bootstrap resamples: of the directions, and of the contexts if all sets have them (`shared`).

    With equal seed and sizes two sets get the same draw of contexts, and with the same `which` of directions too, so that luck
    cancels in their difference.
    """
    n_directions, n_contexts = curves[key].shape[1:]
    draws = [
        np.random.default_rng([seed, stream]).multinomial(size, np.full(size, 1 / size), n)
        for stream, size in ((1 + which, n_directions), (0, n_contexts))
    ]
    return np.array([useful(curves, key, a, b if shared else None)[0] for a, b in zip(*draws)])


def interval(draws) -> dict[str, float]:
    """The 95% percentile interval, {"low", "high"}."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def summary(curves: Curves, key: str, shared=True, seed=0) -> dict[str, float]:
    """{"useful", "low", "high", "breaks at"}: the useful effect, its 95% bootstrap interval, the strength where fluency breaks.

    >>> effect, nats = np.array([0.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])  # of one direction in one context
    >>> summary({"strengths": np.arange(3), "first": effect[:, None, None], "nats": nats[:, None, None]}, "first")
    {'useful': 4.0, 'low': 4.0, 'high': 4.0, 'breaks at': 2.0}
    """
    effect, end = useful(curves, key)
    return {"useful": effect} | interval(resampled(curves, key, shared, seed)) | {"breaks at": end}


def verdict(a: Curves, b: Curves, key: str, shared=True, same_latents=False, seed=0) -> dict:
    """Whether a has more useful effect than b: {"difference", "low", "high", "verdict"}, by the 95% bootstrap interval.

    "more" if it lies above 0, "less" if below, else "undecided". same_latents: both sets belong to the same latents.

    >>> effect, nats = np.array([0.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])
    >>> a = {"strengths": np.arange(3), "first": effect[:, None, None], "nats": nats[:, None, None]}
    >>> verdict(a, a | {"first": a["first"] / 2}, "first")["verdict"]
    'more'
    """
    other = resampled(b, key, shared, seed, which=int(not same_latents))
    found = interval(resampled(a, key, shared, seed) - other)
    word = "more" if found["low"] > 0 else "less" if found["high"] < 0 else "undecided"
    return {"difference": useful(a, key)[0] - useful(b, key)[0]} | found | {"verdict": word}
