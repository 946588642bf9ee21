"""Arms of one method side by side on python-lm: `python benchmarks/methods.py GROUP [--list] [--only ARM]`.

Every arm is trained at each of its learning rates on the chapters' budget, at seed 0, and judged on validation files; at four
times the budget it is trained at the rate that was best there. A finished training is a line of `OUTPUT/GROUP.jsonl`, and is not
repeated: so a run that was interrupted goes on. The table shows each arm at its best rate, by CE increase; a rate at the
edge of those tried is marked with *.
"""

import argparse
import copy
import json
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from sae_utils import ActivationStore, ReluSAE, TopKSAE, evaluate, held_out, load_language_model, tokens, train
from sae_utils.training.end_to_end import Suffix, e2e_loss
from sae_utils.training.losses import l1_loss, reconstruction_loss

HOOK, D_SAE, K, BATCH, BUDGET, SEED = "blocks.3.hook_resid_pre", 1024, 8, 1024, 600_000, 0
LOCAL_LR = 0.005  # of the SAEs that end-to-end arms begin with


class Setting:
    """The model, the activations of a budget of tokens, and the validation rows."""

    def __init__(self, n_tokens: int):
        self.lm, self.n_tokens, self.starts = load_language_model("python-lm"), n_tokens, {}
        n_ctx = self.lm.cfg.n_ctx
        rows = tokens("python-source", self.lm.tokenizer, n_ctx, n_tokens, spread=16)
        self.rows = held_out("python-source", self.lm.tokenizer, n_ctx, 32_768, "validation")
        self.store, self.suffix = ActivationStore(self.lm, rows, HOOK), Suffix(self.lm, HOOK)
        self.n_rows, self.n_steps = BATCH // n_ctx, len(rows) // (BATCH // n_ctx)

    def train(self, sae, objective, share, lr, whole_rows=False, **settings):
        """Train on a share of the budget; `whole_rows` in an order of their own."""
        n_steps = round(share * self.n_steps)
        batches = self.store.batches(self.n_rows if whole_rows else BATCH, SEED, whole_rows=whole_rows)
        settings = {"n_steps": n_steps, "lr": lr, "seed": SEED, "progress": False} | settings
        return train(sae, batches, objective, **settings)


def new(cls=TopKSAE, **settings):
    torch.manual_seed(SEED)
    return cls(128, D_SAE, **settings)


def local(s, lr, make, objective=None, **settings):
    """Trained on activations alone."""
    sae = make()
    s.train(sae, objective, 1, lr, **settings)
    return sae


def end_to_end(s, lr, make, objective, start=0.0, **settings):
    """Trained on whole rows through the rest of the model, after a local training on the first share of the budget."""
    if start and start not in s.starts:
        s.starts[start] = make()
        s.train(s.starts[start], None, start, LOCAL_LR)
    sae = copy.deepcopy(s.starts[start]) if start else make()
    s.train(sae, partial(objective, suffix=s.suffix), 1 - start, lr, whole_rows=True, **settings)
    return sae


def old_auxk(sae, batch, distance=None):
    """AuxK at α = 1/32 beside a KL, its unit not adapted: as it was."""
    terms = reconstruction_loss(sae, batch, distance=distance)
    return terms | {"loss": terms["fvu"] + terms["auxk"] / 32}


def end_to_end_arms() -> dict:
    """{arm: (function of a setting and a learning rate, the three learning rates tried)}."""
    topk, relu, paper_relu = (
        partial(new, *a, **b) for a, b in (([], {"k": K}), ([ReluSAE], {}), ([ReluSAE], {"free_norm": True}))
    )
    cosine = {"decay": 1.0, "cosine": True, "final_lr": 0.1}
    arms = {"TopK, local": (partial(local, make=topk), (0.0025, 0.005, 0.01))}
    no_auxk = partial(e2e_loss, local=partial(reconstruction_loss, alpha=0))
    auxk = {"AuxK as it was": partial(e2e_loss, local=old_auxk), "AuxK rescaled": e2e_loss, "no AuxK": no_auxk}
    for name, objective in auxk.items():
        arm = partial(end_to_end, make=topk, objective=objective)
        arms[f"TopK, last 20% end to end, {name}"] = partial(arm, start=0.8), (0.00035, 0.0007, 0.0014)
        arms[f"TopK, end to end, {name}"] = arm, (0.0025, 0.005, 0.01)
    for name, weights in {"KL + FVU": {"mse": 1.0}, "balanced": {"balanced": True}}.items():
        arm = partial(end_to_end, make=topk, objective=partial(no_auxk, **weights), start=0.9)
        arms[f"TopK, last 10% on {name}"] = arm, (0.00025, 0.0005, 0.001)
    for value in (0.2, 0.5):
        l1 = partial(l1_loss, coefficient=value)
        arms[f"ReLU, local, λ {value}"] = partial(local, make=relu, objective=l1), (0.0025, 0.005, 0.01)
    for value in (0.1, 0.3):
        arm = partial(end_to_end, objective=partial(e2e_loss, local=partial(l1_loss, coefficient=value)))
        arms[f"ReLU, end to end, λ {value}"] = partial(arm, make=relu), (0.0025, 0.005, 0.01)
        arms[f"ReLU, end to end, as in the paper, λ {value}"] = (
            partial(arm, make=paper_relu, **cosine),
            (0.0025, 0.005, 0.01),
        )
    return arms


GROUPS = {"e2e": end_to_end_arms}


def measured(setting: Setting, function, lr: float) -> dict:
    start = time.perf_counter()
    sae = function(setting, lr)
    seconds = time.perf_counter() - start
    found = evaluate(sae, setting.lm, setting.rows, HOOK)
    return {key: found[key] for key in ("l0", "fvu", "ce_increase", "kl", "gamma", "dead_fraction")} | {
        "seconds": seconds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--output", type=Path, default=Path("outputs/methods"))
    parser.add_argument("--only", default="", help="arms whose name holds this")
    parser.add_argument("--table", action="store_true", help="print what there is, and train nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{options.group}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    arms = {name: arm for name, arm in GROUPS[options.group]().items() if options.only in name}
    for n_tokens in () if options.table else (BUDGET, 4 * BUDGET):
        setting = None
        for name, (function, rates) in arms.items():
            own = [row for row in done if row["arm"] == name]
            if n_tokens > BUDGET:  # the rate that was best on the small budget
                rates = [min((row for row in own if row["tokens"] == BUDGET), key=lambda row: row["ce_increase"])["lr"]]
            for lr in rates:
                if any((row["tokens"], row["lr"]) == (n_tokens, lr) for row in own):
                    continue
                setting = setting or Setting(n_tokens)
                done.append({"arm": name, "tokens": n_tokens, "lr": lr} | measured(setting, function, lr))
                with file.open("a") as out:
                    out.write(json.dumps(done[-1]) + "\n")
                print(done[-1], flush=True)
    table = pd.DataFrame(done)
    best = table.loc[table.groupby(["arm", "tokens"], sort=False)["ce_increase"].idxmin()]
    edge = [
        row.lr in (min(rates), max(rates))
        for row in best.itertuples()
        if (rates := GROUPS[options.group]()[row.arm][1])
    ]
    best["lr"] = [f"{lr:g}{'*' if at else ''}" for lr, at in zip(best["lr"], edge)]
    print(best.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
