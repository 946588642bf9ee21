"""Where the directions of dictionaries lie, in one and between two: cosines, a matching, a map, intervals (arXiv 2405.12241).

A dictionary is the rows of W_dec, [d_sae, d_in], or an SAE. Products are taken in chunks of latents: 24,576 of them fit any memory.
"""

import numpy as np
import torch
from torch import Tensor

CHUNK = 2048  # latents whose cosines with all others exist at a time


def directions(dictionary) -> Tensor:
    """Rows of unit norm, fp32, without gradient; of an SAE, its W_dec. ValueError for a row of zeros."""
    W = getattr(dictionary, "W_dec", dictionary).detach().float()
    norms = W.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise ValueError(f"{int((norms == 0).sum())} of {len(W)} rows are zero and point nowhere: leave them out")
    return W / norms


def max_cosine_within(dictionary) -> Tensor:
    """max over j ≠ i of cos(d_i, d_j), [d_sae]: how near each latent has a neighbour in its own dictionary."""
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
    A, B = directions(a), directions(b)
    same_width(A, B)
    return torch.cat([(part @ B.T).amax(1) for part in A.split(CHUNK)])


def same_width(A: Tensor, B: Tensor) -> None:
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"d_in {A.shape[1]} and {B.shape[1]}: directions of different spaces have no cosine")


def matching(a, b, most: int = 4096) -> tuple[Tensor, Tensor]:
    """One-to-one partners: (partner [d_sae of a] as index into b, or −1 without one; cosine, nan without one).

    Up to `most` latents a side the matching of largest total cosine (Hungarian method, time about n³). Beyond that a greedy one
    (ours): the pair of largest cosine first, then that of the largest among the rest, and so on, which is the same where
    partners are clear and can lose total cosine where they are not.
    """
    A, B = directions(a), directions(b)
    same_width(A, B)
    if max(len(A), len(B)) <= most:
        cost = -(A @ B.T).double().cpu().numpy()
        partner = torch.full((len(A),), -1)
        if len(A) <= len(B):
            partner = torch.from_numpy(assignment(cost))
        else:
            theirs = torch.from_numpy(assignment(cost.T))
            partner[theirs] = torch.arange(len(B))
    else:
        partner = greedy(A, B)
    cosine = torch.full((len(A),), torch.nan)
    paired = partner >= 0
    cosine[paired] = (A[paired] * B[partner[paired]]).sum(1).cpu()
    return partner, cosine


def assignment(cost: np.ndarray) -> np.ndarray:
    """For each row of cost [n, m], n ≤ m, a column of its own, such that the total cost is least: [n].

    Hungarian method: row by row, along the path of least cost under prices u, v at which every pair made so far is its row's best.
    """
    n, m = cost.shape
    u, v = np.zeros(n), np.zeros(m)
    row_of = np.full(m, -1)
    for new_row in range(n):
        reached, came_from = np.full(m, np.inf), np.full(m, -1)  # cheapest way to each column, and the column before it
        tree, row, column = np.zeros(m, bool), new_row, -1
        while row >= 0:
            slack = cost[row] - u[row] - v
            nearer = ~tree & (slack < reached)
            reached[nearer], came_from[nearer] = slack[nearer], column
            column = int(np.where(tree, np.inf, reached).argmin())
            step = reached[column]
            u[new_row] += step
            u[row_of[tree]] += step
            v[tree] -= step
            reached[~tree] -= step
            tree[column] = True
            row = row_of[column]
        while column >= 0:  # every row on the path moves to the next column
            before = came_from[column]
            row_of[column] = new_row if before < 0 else row_of[before]
            column = before
    columns = np.empty(n, int)
    taken = row_of >= 0
    columns[row_of[taken]] = np.flatnonzero(taken)
    return columns


def greedy(A: Tensor, B: Tensor) -> Tensor:
    """The pair of largest cosine first: in rounds, whoever is each other's nearest among the free is matched."""
    partner = torch.full((len(A),), -1, device=A.device)
    mine, theirs = torch.arange(len(A), device=A.device), torch.arange(len(B), device=A.device)
    while len(mine) and len(theirs):
        FA, FB = A[mine], B[theirs]
        to_b = torch.cat([(part @ FB.T).argmax(1) for part in FA.split(CHUNK)])
        to_a = torch.cat([(part @ FA.T).argmax(1) for part in FB.split(CHUNK)])
        mutual = to_a[to_b] == torch.arange(len(mine), device=A.device)
        if not mutual.any():  # exact ties in a ring
            mutual[0] = True
        partner[mine[mutual]] = theirs[to_b[mutual]]
        free = torch.ones(len(theirs), dtype=torch.bool, device=A.device)
        free[to_b[mutual]] = False
        mine, theirs = mine[~mutual], theirs[free]
    return partner.cpu()


def bootstrap(
    values, statistic=np.mean, *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(statistic, low, high): the percentile interval over n resamples of the values with replacement.

    values: [n_values], or a pair of such arrays for the difference of their statistics, resampled apart. The interval says how
    exact the number is for these latents (or seeds), not whether another training would give the same.
    Raises ValueError for no values.
    """
    samples = values if isinstance(values, tuple) else (values,)
    samples = [np.asarray(s, dtype=float) for s in samples]
    if not all(len(s) for s in samples):
        raise ValueError("values is empty: there is nothing to resample")
    generator = np.random.default_rng(seed)

    def value(parts):
        return statistic(parts[0]) - statistic(parts[1]) if len(parts) == 2 else statistic(parts[0])

    resampled = [value([s[generator.integers(0, len(s), len(s))] for s in samples]) for _ in range(n)]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(value(samples)), float(low), float(high)


def pca_map(a, b) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both dictionaries in the plane of largest variance of all their directions: ([d_sae of a, 2], [d_sae of b, 2], share
    of variance of the two axes [2]). Signs: each axis has its largest loading positive."""
    A, B = directions(a), directions(b)
    same_width(A, B)
    D = torch.cat([A, B]).double()
    D = D - D.mean(0)
    variance, axes = torch.linalg.eigh(D.T @ D)
    axes = axes.flip(1)[:, :2]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    share = (variance.flip(0)[:2] / variance.sum()).cpu().numpy()
    at = (D @ axes).cpu().numpy()
    return at[: len(A)], at[len(A) :], share
