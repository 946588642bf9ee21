"""Interpretability by program: does a list of n-grams say where a latent fires?

The protocol is ours. It sees only what can be said by tokens, so it is a lower bound on what a latent means.

1. Contexts: the tokens of training files on which a latent is strongest.
2. Rule: the n-grams that end there, occur more than once, and after which the latent fires at least every second time. Of the
   kinds in `KINDS` the one with the best leave-one-out F1 is taken: a token is judged by the other occurrences of its n-gram, or
   long n-grams, which occur once, would always win.
3. Score, on test files: how well does "the rule says so" predict "the latent fires"?
"""

import numpy as np
import pandas as pd

KINDS = {"this token": (1, 0), "last two": (2, 0), "last three": (3, 0), "token before": (1, 1)}  # n tokens, skipped


def last_tokens(rows: np.ndarray, n: int, skip: int, d_vocab: int) -> np.ndarray:
    """A number for the n tokens up to `skip` before each token, −1 where the row does not hold them; position 0 is left out."""
    code = np.zeros(rows.shape, np.int64)
    for back in range(skip, skip + n):
        code = code * d_vocab + np.roll(rows.astype(np.int64), back, axis=1)
    code[:, : n + skip - 1] = -1
    return code[:, 1:].ravel()


def n_grams(train_rows: np.ndarray, test_rows: np.ndarray, d_vocab: int, n: int, skip: int = 0):
    """One code for each n-gram, the same in both: (of the training tokens, of the test tokens, training counts of each code).

    Raises ValueError for n-grams too long to number. rows [n_rows, n_ctx] give n_rows · (n_ctx − 1) codes.

    >>> rows = np.array([[0, 1, 2, 1]])
    >>> [part.tolist() for part in n_grams(rows, rows, d_vocab=3, n=1)]  # of tokens 1 2 1
    [[0, 1, 0], [0, 1, 0], [2, 1]]
    """
    if d_vocab**n >= 2**63:
        raise ValueError(f"n={n}: n-grams of a vocabulary of {d_vocab:,} are too many to number, take fewer tokens")
    both = np.concatenate([last_tokens(rows, n, skip, d_vocab) for rows in (train_rows, test_rows)])
    code, n_train = np.unique(both, return_inverse=True)[1], train_rows[:, 1:].size
    counts = np.bincount(code[:n_train], minlength=code.max() + 1)
    if both.min() < 0:
        counts[0] = 0  # where the row does not hold them there is no n-gram, and so no rule
    return code[:n_train], code[n_train:], counts


def fit_rule(values: np.ndarray, codes: dict, n_top: int = 100) -> dict:
    """The rule of a latent that has these values on the training tokens, [n_train], and fires on one at least.

    codes {kind: `n_grams`}. Returns kind; listed, the codes of its n-grams; f1, leave-one-out on training tokens; purity, the
    share of the n_top strongest tokens that are the most common one among them; top, where those are.
    """
    fired = np.flatnonzero(values > 0)
    top = fired[np.argsort(-values[fired], kind="stable")[:n_top]]
    best = {"f1": -1.0}
    for kind, (code, _, counts) in codes.items():
        seen = np.unique(code[top])
        hits, n = np.bincount(code[fired], minlength=len(counts))[seen], counts[seen]
        tp = hits[(n > 1) & (2 * (hits - 1) >= n - 1)].sum()  # a firing token, judged by the others
        fp = (n - hits)[(n > 1) & (2 * hits >= n - 1)].sum()  # a silent one
        f1 = 2 * tp / (tp + fp + len(fired))
        if f1 > best["f1"]:
            best = {"kind": kind, "listed": seen[(n > 1) & (2 * hits >= n)], "f1": f1}
    this_token = codes["this token"][0][top]
    return best | {"purity": np.bincount(this_token).max() / len(top), "top": top}


def predict(rule: dict, codes: dict) -> np.ndarray:
    """On which test tokens the rule says that its latent fires, [n_test] of bool."""
    _, code, counts = codes[rule["kind"]]
    member = np.zeros(len(counts), bool)
    member[rule["listed"]] = True
    return member[code]


def scores(predicted: np.ndarray, fired: np.ndarray) -> dict:
    """F1 = 2 tp / (predicted + fired); balanced accuracy = mean of the share found among firing and among silent tokens.

    Both are nan for a latent that never fires.

    >>> found = scores(np.array([True, True, False, False]), np.array([True, False, False, False]))
    >>> round(float(found["balanced"]), 4)  # (1 + 2/3) / 2
    0.8333
    """
    if not fired.any():
        return {"f1": np.nan, "balanced": np.nan}
    f1 = 2 * (predicted & fired).sum() / (predicted.sum() + fired.sum())
    return {"f1": f1, "balanced": (predicted[fired].mean() + (~predicted[~fired]).mean()) / 2}


def judge(train_values: np.ndarray, test_values: np.ndarray, codes: dict) -> tuple[pd.DataFrame, list[dict]]:
    """Fit a rule for each latent, score it on the test tokens: (a row for each latent, the rules). values [n_tokens, n_latents].

    Columns: f1, balanced, purity, kind; train_f1, leave-one-out; another, the F1 of the rule for the next latent's firing.

    >>> rows = np.array([[0, 1, 2, 1, 2, 1, 2]])
    >>> fires = (rows[:, 1:].T == 1).astype(float)  # a latent that fires on token 1
    >>> found, rules = judge(fires, fires, {"this token": n_grams(rows, rows, d_vocab=3, n=1)})
    >>> float(found["f1"][0]), rules[0]["kind"]
    (1.0, 'this token')
    """
    rules = [fit_rule(values, codes) for values in train_values.T]
    predicted, fired = [predict(rule, codes) for rule in rules], list((test_values > 0).T)
    own = pd.DataFrame([scores(p, f) for p, f in zip(predicted, fired)])
    own["purity"], own["train_f1"] = [rule["purity"] for rule in rules], [rule["f1"] for rule in rules]
    own["another"] = [scores(p, f)["f1"] for p, f in zip(predicted, fired[1:] + fired[:1])]
    return own.assign(kind=[rule["kind"] for rule in rules]), rules


def firing_as_often(train: np.ndarray, test: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """relu(v − θ) of projections [n_tokens, n] on directions, θ such that each fires on its share of the training tokens.

    A control for `judge`: a random direction that fires as often as a latent.

    >>> v = np.arange(10.0)[:, None]
    >>> [int((part > 0).sum()) for part in firing_as_often(v, v + 5, np.array([0.2]))]
    [2, 7]
    """
    theta = np.array([np.quantile(v, 1 - share) for v, share in zip(train.T, shares)])
    return [np.maximum(v[:, : len(shares)] - theta, 0) for v in (train, test)]
