"""What scores know of a swap of latents: Spearman correlations with the true change of KL, and 95% intervals over rows.

    python benchmarks/swaps.py [--rows 16] [--each 160] [--tokens 16]

A TopK SAE (d_sae 1,024, k 8, 600,000 tokens, seed 0) on layer 3 of python-lm, validation files. `kl` is the change summed over the
row, `kl_own` at the token alone; small, middle and large are thirds by the size of the latent that goes.

The second table is what choosing by a score gains: of all k² swaps at a token that which has the best score is made, if its score
says that it helps. Of KL at these tokens it takes off the share shown; the truth itself is the most that one swap can take. The first
order is bad for long steps. So two more scores add w · ‖Δ‖² or w · the change of ‖x − x̂‖² to it, with the w that gains most in half of the
rows, and are shown for the other half, as all scores are.

The third table: the same TopK SAE, all of whose k latents are selected by a score, with no training. KL and FVU on 64 rows.
"""

import argparse

import numpy as np
import pandas as pd
import torch

from sae_utils import ActivationStore, GradientSAE, TopKSAE, held_out, load_language_model, tokens, train
from sae_utils.activations.hooks import run_prefix
from sae_utils.analysis.swaps import swaps
from sae_utils.training.end_to_end import Suffix
from sae_utils.training.losses import batch_fvu

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


def selected(sae: TopKSAE, lm, suffix: Suffix, rows: torch.Tensor) -> pd.DataFrame:
    """KL(orig ‖ new) and FVU where `GradientSAE`'s score selects, for each β and gradient."""
    sums = {}
    for part in rows.split(16):
        x = run_prefix(lm, part, [HOOK])[HOOK]
        batch, x_hat = {"x": x, "tokens": part}, sae(x[:, 1:]).x_hat.detach()
        own = sum(suffix.gradient(batch, x_hat, "kl", own=True, seed=i) for i in range(16)) / 16
        kl = suffix.gradient(batch, x_hat)
        others = torch.randperm(kl[..., 0].numel(), generator=torch.Generator().manual_seed(0))
        gradients = {"KL at x̂": kl, "KL at x̂, own position": own, "other tokens": kl.flatten(0, 1)[others].view_as(kl)}
        arms = {("z (z − d·g)", name): (True, g) for name, g in gradients.items()}
        arms |= {("z (1 + |d·g|)", "CE at x"): (False, suffix.gradient(batch, None, "ce"))}
        for (score, name), (signed, g) in arms.items():
            for beta in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
                by = GradientSAE(sae.d_in, sae.d_sae, k=sae.k, beta=beta, signed=signed).eval()
                by.load_state_dict(sae.state_dict() | {"gradient_scale": by.gradient_scale})
                with torch.no_grad():
                    new = by(x[:, 1:], g).x_hat
                    last, _ = suffix.run(part, torch.cat([x[:, :1], new], 1), [])
                    found = suffix.kl(suffix.clean(batch), last).item(), batch_fvu(x[:, 1:], new).item()
                sums[score, name, beta] = np.add(sums.get((score, name, beta), 0), found)
    rows = [[*key, *(value / len(rows.split(16)))] for key, value in sums.items()]
    found = pd.DataFrame(rows, columns=["score", "gradient", "β", "KL", "FVU"])
    return found.pivot_table(index=["score", "gradient"], columns="β", values=["KL", "FVU"])


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
    more = held_out("python-source", lm.tokenizer, n_ctx, 64 * n_ctx, "validation")
    print(selected(sae, lm, suffix, torch.from_numpy(more.astype("int64"))).round(4).to_string())
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
