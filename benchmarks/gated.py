"""ReLU with L1, Gated and untied Gated SAEs, each at its own best rate and β₁: `python benchmarks/gated.py [--table]`.

python-lm, layer 3, seed 0; ReLU has 1,536 latents and the others 1,024, as in study 02. ReLU and Gated are trained at three learning
rates and two β₁, with resampling; untied Gated at β₁ = 0, with it and without; each time at five λ, on the same batches. A curve is CE increase on
validation files over log L0. The table reads it at L0 8, 16 and 32, and takes for each method the rate and β₁ that are best at
L0 8, on the first budget. On the second, only these are trained. Finished curves are in OUTPUT/gated.jsonl and are not repeated.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from methods import D_SAE, HOOK, SEED, Results, Setting

from sae_utils import GatedSAE, ReluSAE, evaluate, train
from sae_utils.training.losses import gated_loss, l1_loss

METHODS = {  # class, latents, settings, objective
    "ReLU": (ReluSAE, D_SAE * 3 // 2, {}, l1_loss),
    "Gated": (GatedSAE, D_SAE, {}, gated_loss),
    "Gated, untied": (GatedSAE, D_SAE, {"tied": False}, gated_loss),
}
LAMBDAS = (0.02, 0.06, 0.16, 0.4, 1.0)
RATES, L0 = (0.004, 0.008, 0.016), (8, 16, 32)
FORMS = {  # β₁, and at which shares of the run dead latents begin anew
    "β₁ 0": (0.0, (0.25, 0.5)),
    "β₁ .9": (0.9, (0.25, 0.5)),
    "β₁ 0, no resampling": (0.0, ()),
}
TRIED = {"ReLU": ("β₁ 0", "β₁ .9"), "Gated": ("β₁ 0", "β₁ .9"), "Gated, untied": ("β₁ 0", "β₁ 0, no resampling")}


def curve(setting: Setting, method: str, form: str, lr: float) -> list[dict]:
    """What `evaluate` says of an SAE at each λ."""
    (cls, width, more, objective), (beta, resample), jobs = METHODS[method], FORMS[form], {}
    for coefficient in LAMBDAS:
        torch.manual_seed(SEED)
        jobs[f"{coefficient}"] = cls(128, width, **more), partial(objective, coefficient=coefficient)
    settings = dict(n_steps=setting.n_steps, lr=lr, betas=(beta, 0.999), seed=SEED, resample=resample)
    train(jobs, setting.store.batches(1024, SEED), progress=False, **settings)
    found = evaluate({name: sae for name, (sae, _) in jobs.items()}, setting.lm, setting.rows, HOOK)
    kept = ("l0", "fvu", "ce_increase", "ce_recovered_zero", "gamma_centred", "dead_fraction")
    return [{"λ": float(name)} | {key: row[key] for key in kept} for name, row in found.items()]


def read_off(points: list[dict], column: str = "ce_increase") -> dict[int, float]:
    """A column at L0 8, 16, 32, linear in log L0 between the points; nan beyond them."""
    points = sorted((p for p in points if p["l0"] > 0), key=lambda p: p["l0"])
    x, y = np.log([p["l0"] for p in points]), [p[column] for p in points]
    return {l0: float(np.interp(np.log(l0), x, y, left=np.nan, right=np.nan)) for l0 in L0}


def table(done: list[dict]) -> pd.DataFrame:
    """The best rate of each method and form at L0 8, on each budget."""
    found = []
    for row in done:
        at = {
            f"{column} {l0}": v
            for column in ("ce_increase", "gamma_centred", "dead_fraction")
            for l0, v in read_off(row["points"], column).items()
        }
        found.append({key: row[key] for key in ("tokens", "method", "form", "lr")} | at)
    found = pd.DataFrame(found)
    return found.loc[found.groupby(["tokens", "method", "form"], sort=False)["ce_increase 8"].idxmin()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/methods"))
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--table", action="store_true", help="print what there is, and train nothing")
    options = parser.parse_args()
    done = Results(options.output / "gated.jsonl")
    for n_tokens in () if options.table else (600_000, 2_400_000):
        wanted = [
            (method, form, lr) for method in METHODS if options.only in method for form in TRIED[method] for lr in RATES
        ]
        if n_tokens > 600_000:
            best = table([row for row in done if row["tokens"] == 600_000 and options.only in row["method"]])
            wanted = best[["method", "form", "lr"]].itertuples(index=False)
        setting = None
        for method, form, lr in wanted:
            if any(
                (row["tokens"], row["method"], row["form"], row["lr"]) == (n_tokens, method, form, lr) for row in done
            ):
                continue
            setting = setting or Setting(n_tokens)
            about = {"tokens": n_tokens, "method": method, "form": form, "lr": lr}
            done.append(about | {"points": curve(setting, method, form, lr)})
            print(about, read_off(done[-1]["points"]), flush=True)
    print(table(done).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
