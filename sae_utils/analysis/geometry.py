"""Where the directions of dictionaries lie, in one and between two: cosines, a matching, a map, intervals (arXiv 2405.12241).

A dictionary is the rows of W_dec, [d_sae, d_in], or an SAE.
"""

import numpy as np
import torch
from scipy import optimize, stats
from sklearn.decomposition import PCA
from torch import Tensor

CHUNK = 2048  # latents whose cosines with all others are computed at a time


def directions(dictionary) -> Tensor:
    """Rows of unit norm, fp32, without gradient; of an SAE, its W_dec. ValueError for a row of zeros."""
    W = getattr(dictionary, "W_dec", dictionary).detach().float()
    norms = W.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise ValueError(f"{int((norms == 0).sum())} of {len(W)} rows are zero and point nowhere: leave them out")
    return W / norms


def both(a, b) -> tuple[Tensor, Tensor]:
    """The directions of two dictionaries; ValueError if they lie in different spaces."""
    A, B = directions(a), directions(b)
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"d_in {A.shape[1]} and {B.shape[1]}: directions of different spaces have no cosine")
    return A, B


def max_cosine_within(dictionary) -> Tensor:
    """max over j ≠ i of cos(d_i, d_j), [d_sae]: how near each latent has a neighbour in its own dictionary.

    >>> max_cosine_within(torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
    tensor([0.6000, 0.8000, 0.8000])
    """
    D = directions(dictionary)
    if len(D) < 2:
        raise ValueError("a dictionary of one latent has no neighbours in it")
    found = []
    for start in range(0, len(D), CHUNK):
        cosines = D[start : start + CHUNK] @ D.T
        cosines.diagonal(start).fill_(-2)
        found.append(cosines.amax(1))
    return torch.cat(found)


def max_cosine(a, b) -> Tensor:
    """max over j of cos(a_i, b_j), [d_sae of a]. Not symmetric: all of a may be in a b that holds much else."""
    A, B = both(a, b)
    return torch.cat([(part @ B.T).amax(1) for part in A.split(CHUNK)])


def matching(a, b) -> tuple[Tensor, Tensor]:
    """The one-to-one pairing of latents with the largest total cosine.

    Returns (partner, cosine), each [d_sae of a]: the partner's index in b, and −1 and nan for a latent without one. All
    cosines are held in fp64, 8 bytes a pair: 2 GiB for 16,384 latents a side.
    """
    A, B = both(a, b)
    cost = np.empty((len(A), len(B)))
    for start in range(0, len(A), CHUNK):
        cost[start : start + CHUNK] = -(A[start : start + CHUNK] @ B.T).cpu()
    mine, theirs = optimize.linear_sum_assignment(cost)
    partner, cosine = torch.full((len(A),), -1), torch.full((len(A),), torch.nan)
    partner[mine] = torch.from_numpy(theirs)
    cosine[mine] = (A[mine] * B[theirs]).sum(1).cpu()
    return partner, cosine


def bootstrap(
    values, statistic=np.mean, *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(statistic, low, high): the percentile interval over n resamples of the values with replacement.

    values: [n_values], or a pair of such arrays for the difference of their statistics, resampled apart. The interval says how
    exact the number is for these latents (or seeds), not whether another training would give the same.
    Raises ValueError for no values.

    >>> bootstrap([1.0, 2.0, 3.0, 4.0])
    (2.5, 1.5, 3.5)
    """
    samples = values if isinstance(values, tuple) else (values,)
    samples = [np.asarray(s, dtype=float) for s in samples]
    if not all(len(s) for s in samples):
        raise ValueError("values is empty: there is nothing to resample")

    def value(one, *other):
        return statistic(one) - statistic(*other) if other else statistic(one)

    at_least_two = [
        np.repeat(s, 2) if len(s) == 1 else s for s in samples
    ]  # scipy asks for two; resamples stay the same
    low, high = stats.bootstrap(
        at_least_two,
        value,
        n_resamples=n,
        batch=100,
        vectorized=False,
        confidence_level=level,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(value(*samples)), float(low), float(high)


def pca_map(a, b) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both dictionaries in the plane of largest variance of all their directions: ([d_sae of a, 2], [d_sae of b, 2], share
    of variance of the two axes [2]). Signs: each axis has its largest loading positive."""
    A, B = both(a, b)
    pca = PCA(2, svd_solver="covariance_eigh")  # exact at any size
    at = pca.fit_transform(torch.cat([A, B]).double().cpu().numpy())
    return at[: len(A)], at[len(A) :], pca.explained_variance_ratio_
