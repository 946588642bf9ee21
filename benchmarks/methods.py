"""Arms of one method side by side on python-lm: `python benchmarks/methods.py GROUP [--table] [--only ARM]`.

Every arm is trained at each of its three learning rates on the first of the group's budgets, at seed 0, and judged on
validation files; on a larger budget it is trained at the rate that was best there. A finished training is a line of
`OUTPUT/GROUP.jsonl`, and is not repeated: so a run that was interrupted goes on. The table shows each arm at its best rate, by CE
increase, or by FVU at equal L0 in the group choice; a rate at the edge of those tried is marked with *.

e2e: end-to-end objectives, with AuxK as it was, rescaled and without; fine-tuning; ReLU with L1.
choice: TopK, Mutual Choice and Feature Choice over batch sizes. `batch_fvu` is by the training rule on shuffled batches of the
size that the arm was trained on; `equal_fvu` by thresholds, all multiplied by the one factor at which L0 is k on these tokens;
`law_error` is `zipf_error`.
baselines: TopK beside forms whose directions hardly learn.
gsae: selection by gradients made in each step, in training only, beside three controls that know nothing of the token, training
on the KL itself, and an encoder distilled from the selection; `ce_with_g` and `kl_with_g` are with the gradient of
KL(orig ‖ new) at x̂ at inference too, which needs no label.
"""

import argparse
import copy
import json
import statistics
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from sae_utils import (
    ActivationStore,
    FeatureChoiceSAE,
    GradientSAE,
    MutualChoiceSAE,
    ReluSAE,
    TopKSAE,
    evaluate,
    frozen,
    held_out,
    load_language_model,
    random_like,
    tokens,
    train,
)
from sae_utils.activations.hooks import run_prefix, run_spliced, token_loss
from sae_utils.analysis.metrics import kl_divergence
from sae_utils.saes.choice import zipf_error
from sae_utils.training.end_to_end import Suffix, e2e_loss, selected_by_gradient
from sae_utils.training.losses import batch_fvu, l1_loss, nested_loss, reconstruction_loss

HOOK, D_SAE, K, BATCH, SEED = "blocks.3.hook_resid_pre", 1024, 8, 1024, 0
LOCAL_LR = 0.005  # of the SAEs that end-to-end arms begin with


class Results(list):
    """The rows of a file of JSON lines, to which `append` adds a line: what finished is not repeated."""

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        super().__init__(map(json.loads, file.read_text().splitlines() if file.exists() else ()))

    def append(self, row: dict) -> None:
        super().append(row)
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")


class Setting:
    """The model, the activations of a budget of tokens, and the validation rows."""

    def __init__(self, n_tokens: int):
        self.lm, self.starts = load_language_model("python-lm"), {}
        n_ctx = self.lm.cfg.n_ctx
        rows = tokens("python-source", self.lm.tokenizer, n_ctx, n_tokens, spread=16)
        self.rows = held_out("python-source", self.lm.tokenizer, n_ctx, 65_536, "validation")
        self.store, self.suffix = ActivationStore(self.lm, rows, HOOK), Suffix(self.lm, HOOK)
        self.n_rows, self.n_steps = BATCH // n_ctx, len(rows) // (BATCH // n_ctx)

    def train(self, sae, objective, share, lr, whole_rows=False, batch=BATCH, **settings):
        """Train on a share of the budget; `whole_rows` in an order of their own."""
        n_steps = round(share * self.n_steps * BATCH / batch)
        batches = self.store.batches(self.n_rows if whole_rows else batch, SEED, whole_rows=whole_rows)
        settings = {"n_steps": n_steps, "lr": lr, "seed": SEED, "progress": False} | settings
        return train(sae, batches, objective, **settings)


def new(cls=TopKSAE, **settings):
    torch.manual_seed(SEED)
    return cls(128, D_SAE, **settings)


def local(s, lr, make, objective=None, then=None, **settings):
    """Trained on activations alone; `then` makes another SAE of it."""
    sae = make()
    s.train(sae, objective, 1, lr, **settings)
    return then(sae, s.store.activations(50_000)) if then else sae


def end_to_end(s, lr, make, objective, start=0.0, **settings):
    """Trained on whole rows through the rest of the model, after a local training on the first share of the budget."""
    sae = started(s, start, make) if start else make()
    s.train(sae, partial(objective, suffix=s.suffix), 1 - start, lr, whole_rows=True, **settings)
    return sae


def started(s, share, make):
    """A copy of the SAE trained on activations alone on the first share of the budget, which is done once."""
    if share not in s.starts:
        s.starts[share] = make()
        s.train(s.starts[share], None, share, LOCAL_LR)
    return copy.deepcopy(s.starts[share])


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


def gradient_arms() -> dict:
    def without(sae, batch, suffix):
        return reconstruction_loss(sae, batch | {"x": batch["x"][:, 1:]})

    arms = {"TopK, without gradient": (partial(new, k=K), without)}
    for beta in (0.03, 0.1, 0.3):
        signed = partial(new, GradientSAE, k=K, beta=beta, signed=True)
        arms[f"z (z − d·g), KL at x̂, β {beta:g}"] = signed, selected_by_gradient
        arms[f"z (z − d·g), KL at x̂, own position, β {beta:g}"] = signed, partial(selected_by_gradient, own=True)
        for control in ("other tokens", "noise", "mean") if beta == 0.1 else ():
            arms[f"z (z − d·g), KL at x̂, {control}, β {beta:g}"] = (
                signed,
                partial(selected_by_gradient, control=control),
            )
    arms["z |d·g|, CE at x, β 1"] = (
        partial(new, GradientSAE, k=K, beta=1.0),
        partial(selected_by_gradient, of="ce", at="x"),
    )
    arms["end to end"] = partial(new, k=K), e2e_loss
    arms["balanced KL and FVU"] = partial(new, k=K), partial(e2e_loss, balanced=True)
    rates = (0.0025, 0.005, 0.01)
    made = {name: (partial(end_to_end, make=make, objective=loss), rates) for name, (make, loss) in arms.items()}
    made["TopK, then an encoder distilled from selection by KL at x̂"] = distilled_from_selection, (0.0005, 0.001, 0.002)
    return made


def distilled_from_selection(s: Setting, lr: float):
    """A TopK SAE on the first 80%; then its encoder learns the latents that it would select knowing the gradient."""
    sae, teacher = started(s, 0.8, partial(new, k=K)), new(GradientSAE, k=K, beta=0.1, signed=True)
    teacher.load_state_dict(sae.state_dict() | {"gradient_scale": teacher.gradient_scale})
    sae = frozen(sae, "decoder")
    s.train(sae, partial(distilled, teacher=teacher.eval(), suffix=s.suffix), 0.2, lr, whole_rows=True)
    return sae


def distilled(sae, batch, teacher, suffix):
    """Σ (f − t)² / Σ t² over the latents that the SAE or the teacher selects; t are the teacher's, who knows the gradient."""
    x = suffix.clean(batch).x[:, 1:]
    with torch.no_grad():
        target = teacher(x, suffix.gradient(batch, teacher(x).x_hat)).latents
    out = sae(x)
    f = sae.pre_activations(x).relu().view_as(target)
    asked = (target > 0) | (out.latents.detach() > 0)
    loss = ((f - target).square() * asked).sum() / target.square().sum()
    return {"loss": loss, "fvu": batch_fvu(x, out.x_hat.detach()), "l0": (out.values > 0).sum() / x[..., 0].numel()}


def choice_arms() -> dict:
    arms, makers = {}, {"TopK": partial(new, k=K), "Mutual Choice": partial(new, MutualChoiceSAE, k=K)}
    makers |= {
        f"Feature Choice, {q}": partial(new, FeatureChoiceSAE, k=K, quotas=q) for q in ("zipf", "demand", "frozen")
    }
    for batch, rates in {1024: (0.0025, 0.005, 0.01), 4096: (0.005, 0.01, 0.02), 16384: (0.01, 0.02, 0.04)}.items():
        for name, make in makers.items():
            arms[f"{name}, batches of {batch}"] = partial(local, make=make, batch=batch), rates
    return arms


def baseline_arms() -> dict:
    rates, topk, mutual = (0.0025, 0.005, 0.01), partial(new, k=K), partial(new, MutualChoiceSAE, k=K)
    arms = {
        "TopK": partial(local, make=topk),
        "TopK, frozen decoder": partial(local, make=lambda: frozen(topk(), "decoder")),
        "TopK, frozen encoder": partial(local, make=lambda: frozen(topk(), "encoder")),
        "TopK, soft-frozen": partial(local, make=lambda: frozen(topk(), "decoder", 0.8)),
        "TopK, stopped after 64 steps": partial(local, make=topk, stop_after=64),
        "random directions": partial(local, make=topk, then=random_like),
        "Mutual Choice": partial(local, make=mutual),
        "Mutual Choice, nested": partial(local, make=mutual, objective=partial(nested_loss, prefixes=(64, 256, D_SAE))),
    }
    return {name: (function, rates) for name, function in arms.items()}


GROUPS = {  # group: (arms, budgets of tokens)
    "e2e": (end_to_end_arms, (600_000, 2_400_000)),
    "choice": (choice_arms, (2_000_000,)),
    "baselines": (baseline_arms, (600_000, 2_400_000)),
    "gsae": (gradient_arms, (600_000, 2_400_000)),
}


def measured(setting: Setting, function, lr: float) -> dict:
    start = time.perf_counter()
    sae = function(setting, lr)
    seconds = time.perf_counter() - start
    found = evaluate(sae, setting.lm, setting.rows, HOOK)
    found = {key: found[key] for key in ("l0", "fvu", "ce_increase", "kl", "gamma", "dead_fraction")}
    if isinstance(sae, MutualChoiceSAE):
        found |= by_batch_and_threshold(sae, setting, function.keywords.get("batch", BATCH))
    if isinstance(sae, GradientSAE):
        found |= with_gradient(sae, setting)
    return found | {"seconds": seconds}


@torch.no_grad()
def with_gradient(sae, setting: Setting) -> dict:
    """CE increase and KL where the selection has the gradient of KL(orig ‖ new) at the plain x̂."""
    ce, kl, n = 0.0, 0.0, 0
    for rows in validation(setting):
        x = run_prefix(setting.lm, rows, [HOOK])[HOOK]
        g = setting.suffix.gradient({"x": x, "tokens": rows}, sae(x[:, 1:]).x_hat)
        new = run_spliced(setting.lm, rows, HOOK, torch.cat([x[:, :1], sae(x[:, 1:], g).x_hat], 1))
        clean = setting.lm(rows)
        ce += (token_loss(new, rows) - token_loss(clean, rows))[:, 1:].sum().item()
        kl += kl_divergence(clean[:, 1:-1], new[:, 1:-1]).sum().item()
        n += rows[:, 2:].numel()
    return {"ce_with_g": ce / n, "kl_with_g": kl / n}


@torch.no_grad()
def by_batch_and_threshold(sae, setting: Setting, batch: int) -> dict:
    """FVU by the training rule, and by thresholds at the realised L0 k, over shuffled validation activations."""
    x = torch.cat([run_prefix(setting.lm, part, [HOOK])[HOOK][:, 1:].flatten(0, 1) for part in validation(setting)])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))]
    x = x[: len(x) // batch * batch]
    equal = copy.deepcopy(sae).eval()
    outs = [equal.output(part, *equal.choose(part)[:2]) for part in x.split(batch)]
    low, high = 0.0, 16.0  # factors on the thresholds
    for _ in range(30):
        factor = (low + high) / 2
        equal.threshold.copy_(sae.threshold * factor)
        l0 = sum((equal(part).entries > 0).sum().item() for part in x.split(4096)) / len(x)
        low, high = (factor, high) if l0 > K else (low, factor)
    found = {"batch_fvu": batch_fvu(x, torch.cat([out.x_hat for out in outs])).item()}
    found |= {"batch_l0": sum((out.entries > 0).sum().item() for out in outs) / len(x)}
    found |= {"equal_fvu": batch_fvu(x, torch.cat([equal(part).x_hat for part in x.split(4096)])).item()}
    found |= {"equal_l0": l0, "factor": factor}
    if hasattr(sae, "law") and sae.law.any():
        found["law_error"] = zipf_error(sae.demand, *sae.law.tolist())
    return found


def cost(arms: dict, n_steps: int) -> None:
    """Medians of three paired rounds: seconds of n_steps training steps over those of a local TopK SAE just before."""
    setting = Setting(200_000)
    setting.n_steps = n_steps
    topk = partial(local, make=partial(new, k=K))
    for name, (function, rates) in arms.items():
        ratios = []
        for _ in range(4):  # the first is for warming up
            seconds = []
            for one in (topk, function):
                setting.starts, start = {}, time.perf_counter()
                one(setting, rates[0])
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[1] / seconds[0])
        print(f"{name:70s} {statistics.median(ratios[1:]):6.2f}", flush=True)


def validation(setting: Setting) -> tuple[torch.Tensor, ...]:
    return torch.from_numpy(setting.rows.astype("int64")).split(16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--output", type=Path, default=Path("outputs/methods"))
    parser.add_argument("--only", default="", help="arms whose name holds this")
    parser.add_argument("--table", action="store_true", help="print what there is, and train nothing")
    parser.add_argument("--cost", action="store_true", help="print what steps cost, in those of a local TopK SAE")
    options = parser.parse_args()
    done = Results(options.output / f"{options.group}.jsonl")
    make_arms, budgets = GROUPS[options.group]

    def judged(row: dict) -> float:
        return row.get("equal_fvu", row["fvu"]) if options.group == "choice" else row["ce_increase"]

    arms = {name: arm for name, arm in make_arms().items() if options.only in name}
    if options.cost:
        return cost(arms, 100 if options.group in ("choice", "baselines") else 30)
    for n_tokens in () if options.table else budgets:
        setting = None
        for name, (function, rates) in arms.items():
            own = [row for row in done if row["arm"] == name]
            if n_tokens > budgets[0]:  # the rate that was best on the first budget
                first = [row for row in own if row["tokens"] == budgets[0]]
                rates = [min(first, key=judged)["lr"]]
            for lr in rates:
                if any((row["tokens"], row["lr"]) == (n_tokens, lr) for row in own):
                    continue
                setting = setting or Setting(n_tokens)
                done.append({"arm": name, "tokens": n_tokens, "lr": lr} | measured(setting, function, lr))
                print(done[-1], flush=True)
    table = pd.DataFrame(done)
    table["judged"] = [judged(row) for row in done]
    best = table.loc[table.groupby(["arm", "tokens"], sort=False)["judged"].idxmin()].drop(columns="judged")
    tried = {name: rates for name, (_, rates) in make_arms().items()}
    edge = [row.lr in (min(tried[row.arm]), max(tried[row.arm])) for row in best.itertuples()]
    best["lr"] = [f"{lr:g}{'*' if at else ''}" for lr, at in zip(best["lr"], edge)]
    print(best.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
