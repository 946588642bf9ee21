"""What scores know of a swap of latents: Spearman correlations with the true change of KL, and 95% intervals over rows.

    python benchmarks/swaps.py [--rows 16] [--each 160] [--tokens 16]

A TopK SAE (d_sae 1,024, k 8, 600,000 tokens, seed 0) on layer 3 of python-lm, validation files. `kl` is the change summed over the
row, `kl_own` at the token alone; small, middle and large are thirds by the size of the latent that goes.

The second table is what choosing by a score gains: of all k² swaps at a token that which has the best score is made, if its score
says that it helps. Of KL at these tokens it takes off the share shown; the truth itself is the most that one swap can take. The first
order is bad for long steps. So two more scores add w · ‖Δ‖² or w · the change of ‖x − x̂‖² to it, with the w that gains most in half of the
rows, and are shown for the other half, as all scores are.
"""

import argparse

import numpy as np
import pandas as pd
import torch

from sae_utils import ActivationStore, TopKSAE, held_out, load_language_model, tokens, train
from sae_utils.activations.hooks import run_prefix
from sae_utils.analysis.swaps import swaps
from sae_utils.training.end_to_end import Suffix

HOOK = "blocks.3.hook_resid_pre"


NO_SCORES = ["row", "position", "size", "before", "step", "kl", "kl_own"]
WEIGHTS = np.logspace(-6, 2, 33)


def gain(found: pd.DataFrame, score: pd.Series, of: str) -> float:
    """The share of the KL at tokens that the best swap of each by a score takes off, where the score says that it helps."""
    tokens = found.groupby(["row", "token"])
    best = score.groupby([found["row"], found["token"]]).idxmin()
    return -found.loc[best, of][score[best] < 0].sum() / tokens["before"].first().sum()


def gains(found: pd.DataFrame) -> pd.DataFrame:
    """`gain` by each score, at the token alone and over its row."""
    scores = {"truth": found["kl"], "truth, own position": found["kl_own"]}
    scores |= {name: found[name] for name in found.columns.drop([*NO_SCORES, "token"])}
    return pd.DataFrame(
        {of: {name: gain(found, score, of) for name, score in scores.items()} for of in ("kl_own", "kl")}
    )


def penalised(parts: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The odd ones of the parts, with scores whose weight is chosen on the even ones."""
    first, second = (pd.concat(half, ignore_index=True) for half in (parts[::2], parts[1::2]))
    for score, of in (("kl at x̂", "kl"), ("kl own at x̂", "kl_own")):
        for by in ("step", "error"):
            weight = max(WEIGHTS, key=lambda w: gain(first, first[score] + w * first[by], of))  # noqa: B023
            print(f"{score} + {weight:.2g} · {by}")
            second[f"{score} + w · {by}"] = second[score] + weight * second[by]
    return [part for _, part in second.groupby("row")]


def correlations(found: pd.DataFrame) -> pd.DataFrame:
    """Spearman correlation of each score with kl and kl_own, and with kl in each third."""
    third = pd.qcut(found["size"], 3, labels=["small", "middle", "large"])
    parts = {"kl": found, "kl_own": found} | {f"kl, {name}": found[third == name] for name in third.cat.categories}
    scores = found.columns.drop(NO_SCORES)
    return pd.DataFrame(
        {name: part[scores].corrwith(part[name.partition(",")[0]], method="spearman") for name, part in parts.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--each", type=int, default=160, help="swaps in each row")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each row at which all swaps are tried")
    options = parser.parse_args()
    lm = load_language_model("python-lm")
    n_ctx, suffix = lm.cfg.n_ctx, Suffix(lm, HOOK)
    store = ActivationStore(lm, tokens("python-source", lm.tokenizer, n_ctx, 600_000, spread=16), HOOK)
    torch.manual_seed(0)
    sae = TopKSAE(store.d_in, 1024, k=8)
    train(sae, store.batches(1024, 0), n_steps=len(store) // 1024, lr=0.005)
    rows = held_out("python-source", lm.tokenizer, n_ctx, options.rows * n_ctx, "validation")[: options.rows]
    found, tried = [], []
    for i, row in enumerate(torch.from_numpy(rows.astype("int64"))):
        batch = {"tokens": row[None], "x": run_prefix(lm, row[None], [HOOK])[HOOK]}
        found.append(swaps(sae, suffix, batch, options.each, seed=i).assign(row=i))
        every = swaps(sae, suffix, batch, options.tokens, seed=i, every=True)
        tried.append(every.assign(row=i, token=np.arange(len(every)) // sae.k**2))
    generator = np.random.default_rng(0)
    for measure, parts, what in (
        (correlations, found, "swaps drawn"),
        (gains, penalised(tried), "swaps, all at some tokens"),
    ):
        samples = [generator.integers(len(parts), size=len(parts)) for _ in range(200)]
        table = measure(pd.concat(parts, ignore_index=True))
        draws = [
            measure(pd.concat([parts[i].assign(row=n) for n, i in enumerate(s)], ignore_index=True)) for s in samples
        ]
        low, high = np.quantile([draw.to_numpy() for draw in draws], [0.025, 0.975], axis=0)
        for j, column in enumerate(table):
            table[column] = [f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in zip(table[column], low[:, j], high[:, j])]
        print(f"{sum(map(len, parts)):,} {what}, {len(parts)} rows\n{table.to_string()}")


if __name__ == "__main__":
    main()
