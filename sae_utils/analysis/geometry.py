"""Where the directions of dictionaries lie: cosines within one and between two, a matching, intervals (arXiv 2405.12241).

A dictionary is the rows of W_dec, [d_sae, d_in], or an SAE.
"""

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

CHUNK = 2048  # latents whose cosines with all others are computed at a time


def directions(dictionary) -> Tensor:
    """Rows of unit norm, fp32, without gradient; of an SAE, its W_dec. ValueError for a row of zeros.

    >>> directions(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    W = getattr(dictionary, "W_dec", dictionary).detach().float()
    norms = W.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise ValueError(f"{int((norms == 0).sum())} of {len(W)} rows are zero and point nowhere: leave them out")
    return W / norms


def cosines(a, b):
    """Yields cos(a_i, b_j) for CHUNK latents of a at a time, [≤ CHUNK, d_sae of b]. ValueError if the two d_in differ."""
    A, B = directions(a), directions(b)
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"d_in {A.shape[1]} and {B.shape[1]}: directions of different spaces have no cosine")
    return (part @ B.T for part in A.split(CHUNK))


def max_cosine(a, b) -> Tensor:
    """max over j of cos(a_i, b_j), [d_sae of a]. Not symmetric: all of a may be in a b that holds much else.

    >>> max_cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0.8000])
    """
    return torch.cat([part.amax(1) for part in cosines(a, b)])


def max_cosine_within(dictionary) -> Tensor:
    """max over j ≠ i of cos(d_i, d_j), [d_sae]: how near each latent has a neighbour in its own dictionary, −inf for a lone latent.

    >>> max_cosine_within(torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
    tensor([0.6000, 0.8000, 0.8000])
    """
    found = []
    for i, part in enumerate(cosines(dictionary, dictionary)):
        part.diagonal(i * CHUNK).fill_(-torch.inf)
        found.append(part.amax(1))
    return torch.cat(found)


def matching(a, b) -> tuple[Tensor, Tensor]:
    """The one-to-one pairing of latents with the largest total cosine.

    Returns (partner, cosine), each [d_sae of a]: the partner's index in b, and −1 and nan for a latent without one. Holds all
    cosines, 12 bytes a pair: 3 GiB for 16,384 latents a side.

    >>> matching(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    (tensor([1, 0]), tensor([1.0000, 0.8000]))
    """
    cost = -torch.cat([part.cpu() for part in cosines(a, b)])
    mine, theirs = map(torch.from_numpy, optimize.linear_sum_assignment(cost.numpy()))
    partner, cosine = torch.full((len(cost),), -1), torch.full((len(cost),), torch.nan)
    partner[mine], cosine[mine] = theirs, -cost[mine, theirs]
    return partner, cosine


def bootstrap(values, statistic=np.mean, *, n=2000, level=0.95, seed=0) -> tuple[float, float, float]:
    """(statistic, low, high): the percentile interval over n resamples of the values with replacement.

    values: [n_values], or a pair of such arrays for the difference of their statistics, resampled apart. The interval says how
    exact the number is for these latents (or seeds), not whether another training would give the same. ValueError for no values.

    >>> bootstrap([1.0, 2.0, 3.0, 4.0])
    (2.5, 1.5, 3.5)
    """
    samples = [np.asarray(sample, float) for sample in (values if isinstance(values, tuple) else (values,))]
    # scipy asks for two values or more, and one value given twice has the same resamples
    doubled = [np.repeat(sample, 2) if len(sample) == 1 else sample for sample in samples]

    def value(one, *other):
        return statistic(one) - statistic(*other) if other else statistic(one)

    settings = {"n_resamples": n, "confidence_level": level, "method": "percentile", "rng": seed}
    interval = stats.bootstrap(doubled, value, vectorized=False, batch=100, **settings).confidence_interval
    return float(value(*samples)), float(interval.low), float(interval.high)
