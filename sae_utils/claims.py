"""What the five papers claim, and what the reference runs say to it: values per seed, an interval, a verdict.

    python -m sae_utils.claims                         print the table of the runs that are there
    python -m sae_utils.claims collect [SWEEP.toml]    copy them to outputs/reference/, write claims.json, claims.md, the README;
                                                       and what `make run` made, for the README's minutes

Every claim reads one number per seed from the `metrics.json` of a notebook's runs, compares its mean over seeds with a bound fixed
here, before the runs, and is judged by the 95% t-interval of that mean. The seed that was tuned on is left out.
Imports no torch.
"""

import base64
import io
import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import runs, sweep
from .files import ROOT, digest, read_json, replacing, write_json

SWEEP = ROOT / "sweeps" / "reference.toml"
LAPTOP = ROOT / "sweeps" / "laptop.toml"
README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- claims: written by `make reference` -->\n)(.*?)(<!-- end of claims -->)", re.DOTALL)
TIMED = re.compile(r"^(\| \[`(\w+)`\].*\| )[^|]*( \|)$", re.MULTILINE)  # a notebook in the README, its minutes last
ENOUGH = 3  # seeds; with fewer there is no verdict
KEYS = "paper claim metric values mean sd n comparison interval controls verdict run_ids".split()
TUNED_ON = 0  # the seed on whose validation files learning rates, λ and β were chosen: it is not judged
SAID = {"holds": "hold", "fails": "fail", "undecided": "are undecided"}
FIGURES = {  # those that the README shows, of the first seed
    "02_train_gated": "pareto",
    "03_train_e2e": "pareto",
    "04_train_gsae": "beta",
    "05_train_adaptive": "pareto",
    "06_dark_matter": "fvu_by_width",
    "08_compare": "pareto",
}


class Claim(NamedTuple):
    """A number and what it is said to be.

    value: where the number is in metrics.json, `"a/b"` for ["a"]["b"]; `"a/b - c"` and `"a/b over c"` combine two of one run.
    expected: (">", bound), ("<", bound), or ("=", bound, margin): the mean lies within bound ± margin.
    controls: {name: value}: the same quantity where what the claim speaks of is not there; judged by the same bounds. also: {name:
    value}: the same otherwise measured, reported beside it and not judged.
    """

    paper: str
    claim: str
    notebook: str
    value: str
    expected: tuple
    controls: dict = {}
    also: dict = {}


# fmt: off
CLAIMS = [
    # 2404.16014, Gated SAEs, at L0 8, the shared budget; the ReLU baseline has 1.5 times the latents
    Claim("2404.16014", "Gated reconstructions are unbiased: γ is 1 ± .02", "02_train_gated",
          "gamma_gated_l0_8", ("=", 1, 0.02), also={"about the mean": "gamma_centred_gated_l0_8"}),
    Claim("2404.16014", "L1 shrinks: γ of ReLU (about the mean) is below 1", "02_train_gated",
          "gamma_centred_relu_l0_8", ("<", 1), also={"as in the paper": "gamma_relu_l0_8"}),
    Claim("2404.16014", "Gated recovers more of the loss than ReLU at equal L0", "02_train_gated",
          "ce_recovered_mean_gated_l0_8 - ce_recovered_mean_relu_l0_8", (">", 0),
          also={"against zero ablation": "ce_recovered_zero_gated_l0_8 - ce_recovered_zero_relu_l0_8",
                "FVU": "fvu_gated_l0_8 - fvu_relu_l0_8",
                "ReLU rescaled": "ce_recovered_mean_gated_l0_8 - ce_recovered_mean_rescaled_l0_8"}),
    Claim("2404.16014", "Gated needs about half of ReLU's latents for the same loss: ReLU's L0 is 1.5 to 2.5 times Gated's", "02_train_gated",
          "l0_ratio_l0_8", ("=", 2, 0.5)),
    Claim("2404.16014", "Rescaling and shifting a trained ReLU SAE closes less than half of its gap to Gated", "02_train_gated",
          "gap_closed_l0_8", ("<", 0.5)),
    Claim("2404.16014", "Not stopping the decoder in the auxiliary term hurts", "02_train_gated",
          "ce_recovered_mean_decoder_not_stopped_less_gated", ("<", 0), also={"FVU": "fvu_decoder_not_stopped_less_gated"}),
    Claim("2404.16014", "Leaving out r_mag hurts", "02_train_gated",
          "ce_recovered_mean_no_r_mag_less_gated", ("<", 0), also={"FVU": "fvu_no_r_mag_less_gated"}),
    Claim("2404.16014", "Untying the encoders hurts", "02_train_gated",
          "ce_recovered_mean_encoders_not_tied_less_gated", ("<", 0), also={"FVU": "fvu_encoders_not_tied_less_gated"}),
    # 2405.12241, end to end, at k = 8, with TopK in place of ReLU. "e2e" starts as the local SAE, "from scratch" at random as in
    # the paper: the first has the better chance in runs of this length, the second says what the loss alone leads to
    Claim("2405.12241", "At equal L0 e2e has less than 45% of local's CE increase", "03_train_e2e",
          "e2e_to_local", ("<", 0.45), also={"from scratch": "e2e_from_scratch_to_local"}),
    Claim("2405.12241", "At equal L0 e2e+ds has less than 45% of local's CE increase", "03_train_e2e",
          "e2e_ds_to_local", ("<", 0.45), also={"from scratch": "e2e_ds_from_scratch_to_local"}),
    Claim("2405.12241", "For the CE of e2e, local needs more than twice the L0", "03_train_e2e",
          "l0_local_needs_e2e over k", (">", 2), also={"e2e+ds": "l0_local_needs_e2e_ds over k"}),
    Claim("2405.12241", "Fewer latents of e2e (from scratch) are alive than of local", "03_train_e2e",
          "alive_e2e_from_scratch - alive_local", ("<", 0),
          also={"e2e+ds": "alive_e2e_ds_from_scratch - alive_local", "started as local": "alive_e2e - alive_local"}),
    Claim("2405.12241", "Reconstructions of e2e (from scratch) are shorter than those of local", "03_train_e2e",
          "norm_ratio_e2e_from_scratch - norm_ratio_local", ("<", 0),
          also={"e2e+ds": "norm_ratio_e2e_ds_from_scratch - norm_ratio_local", "started as local": "norm_ratio_e2e - norm_ratio_local"}),
    Claim("2405.12241", "Latents of local are more crowded (mean of the largest cosine within) than those of e2e (from scratch)", "03_train_e2e",
          "crowding_local - crowding_e2e_from_scratch", (">", 0),
          also={"e2e+ds": "crowding_local - crowding_e2e_ds_from_scratch", "started as local": "crowding_local - crowding_e2e"}),
    Claim("2405.12241", "Two seeds of local agree more (mean of the largest cosine between) than two of e2e (from scratch)", "03_train_e2e",
          "across_seeds_local - across_seeds_e2e_from_scratch", (">", 0),
          also={"local − e2e+ds": "across_seeds_local - across_seeds_e2e_ds_from_scratch"}),
    Claim("2503.17272", "Fine-tuning on the KL for the last tenth of the tokens takes 20 to 50% off local's CE increase", "03_train_e2e",
          "gap_closed_by_tuning", ("=", 0.35, 0.15)),
    # 2411.10397, g-SAE, gradient in training only (the fair arm)
    Claim("2411.10397", "g-SAE has a lower CE increase than TopK at equal k", "04_train_gsae",
          "ce_increase_gsae - ce_increase_topk", ("<", 0),
          {"shuffled gradients − TopK": "ce_increase_shuffled - ce_increase_topk"}),
    Claim("2411.10397", "That gain is the gradient's: g-SAE has a lower CE increase than with gradients of other tokens", "04_train_gsae",
          "ce_increase_gsae - ce_increase_shuffled", ("<", 0), also={"KL": "kl_gsae - kl_shuffled"}),
    Claim("2411.10397", "g-SAE has a lower KL than TopK at equal k", "04_train_gsae",
          "kl_gsae - kl_topk", ("<", 0), {"shuffled gradients − TopK": "kl_shuffled - kl_topk"}),
    Claim("2411.10397", "g-SAE has a lower FVU than TopK at equal k (ours: of FVU nothing is known)", "04_train_gsae",
          "fvu_gsae - fvu_topk", ("<", 0), {"shuffled gradients − TopK": "fvu_shuffled - fvu_topk"}),
    Claim("2411.10397", "g-SAE has fewer dead latents than TopK", "04_train_gsae",
          "dead_gsae - dead_topk", ("<", 0), {"shuffled gradients − TopK": "dead_shuffled - dead_topk"}, {"on the test rows alone": "dead_fraction_gsae - dead_fraction_topk"}),
    Claim("2411.10397", "A push along latents of g-SAE changes predictions more (KL) than one of equal norm along TopK's", "04_train_gsae",
          "effect_kl_gsae - effect_kl_topk", (">", 0), {"random directions − TopK": "effect_kl_random - effect_kl_topk"}),
    Claim("2411.10397", "Latents of g-SAE steer better than TopK's in arbitrary contexts: they raise the tokens they write more, at matched fluency", "07_steering",
          "useful_arbitrary/g-SAE - useful_arbitrary/TopK", (">", 0),
          {"random directions, by their own tokens, − TopK": "useful_arbitrary/random - useful_arbitrary/TopK"},
          {"tokens that follow where a latent fires": "useful_follows/g-SAE - useful_follows/TopK",
           "own contexts": "useful_own/g-SAE - useful_own/TopK"}),
    Claim("2411.10397", "Latents of g-SAE are as interpretable as TopK's: F1 of a rule within .02", "08_compare",
          "f1/g-SAE - f1/TopK", ("=", 0, 0.02), also={"random directions that fire as often": "f1_random/g-SAE - f1_random/TopK", "a rule judging another latent, all methods": "f1_another"}),
    # 2410.14670, dark matter, with TopK SAEs of k = 8 and five widths
    Claim("2410.14670", "About half of the error is a linear function of x: R² is .35 to .65", "06_dark_matter",
          "claims/about half of e is linear in x/here", ("=", 0.5, 0.15),
          {"Gaussian data of the same covariance": "claims/about half of e is linear in x/control"}),
    Claim("2410.14670", "The error's squared norm is more than 90% linearly predictable", "06_dark_matter",
          "claims/‖e‖² is more than 90% linear in x/here", (">", 0.9),
          {"best of ‖x‖, token and position": "claims/‖e‖² is more than 90% linear in x/control"}),
    Claim("2410.14670", "FVU_nonlinear is flat in width: 1 − the ratio of its exponent to FVU's is .75 to 1.25", "06_dark_matter",
          "claims/FVU_nonlinear is flat in width/here", ("=", 1, 0.25),
          {"Gaussian data of the same covariance": "claims/FVU_nonlinear is flat in width/control"}),
    Claim("2410.14670", "Per-token error norms of the narrowest SAE predict those of the widest: R² is above .5", "06_dark_matter",
          "claims/‖e‖ predicts ‖e‖ across widths/here", (">", 0.5),
          {"best of ‖x‖, token, position": "claims/‖e‖ predicts ‖e‖ across widths/control"}),
    Claim("2410.14670", "Nonlinear error costs CE in proportion to its squared length: ratio .75 to 1.25", "06_dark_matter",
          "claims/CE: the nonlinear error costs its share/here", ("=", 1, 0.25),
          {"a fraction of the whole error": "claims/CE: the nonlinear error costs its share/control"}),
    Claim("2410.14670", "Gradient pursuit lowers FVU_nonlinear only slightly: by 0 to 15%", "06_dark_matter",
          "claims/pursuit lowers FVU_nonlinear slightly/here", ("=", 0.075, 0.075),
          {"Gaussian data of the same covariance": "claims/pursuit lowers FVU_nonlinear slightly/control"}),
    Claim("2410.14670", "SAEs of the same size do worse on the nonlinear than on the linear part", "06_dark_matter",
          "claims/SAEs do worse on the nonlinear part/here", (">", 0),
          {"Gaussians of the same covariances": "claims/SAEs do worse on the nonlinear part/control"}),
    Claim("2410.14670", "SAEs of earlier layers explain more of the nonlinear part than pursuit removes", "06_dark_matter",
          "claims/earlier SAEs remove more than pursuit/here - claims/pursuit lowers FVU_nonlinear slightly/here", (">", 0),
          {"random functions of x": "claims/earlier SAEs remove more than pursuit/control - claims/pursuit lowers FVU_nonlinear slightly/here"}),
    # 2411.02124, Mutual and Feature Choice, read off at TopK's line where their realised L0 is
    Claim("2411.02124", "Mutual Choice has a lower FVU than TopK at equal realised L0", "05_train_adaptive",
          "fvu_mutual_less_topk", ("<", 0), also={"CE increase": "ce_increase_mutual_less_topk"}),
    Claim("2411.02124", "Feature Choice has a lower FVU than TopK at equal realised L0", "05_train_adaptive",
          "fvu_feature_less_topk", ("<", 0), also={"CE increase": "ce_increase_feature_less_topk"}),
    Claim("2411.02124", "Mutual Choice recovers more of the loss than TopK: a lower CE increase at equal realised L0", "05_train_adaptive",
          "ce_increase_mutual_less_topk", ("<", 0), also={"KL": "kl_mutual_less_topk"}),
    Claim("2411.02124", "Feature Choice recovers more of the loss than TopK: a lower CE increase at equal realised L0", "05_train_adaptive",
          "ce_increase_feature_less_topk", ("<", 0), also={"KL": "kl_feature_less_topk"}),
    Claim("2411.02124", "Feature Choice has no dead latents, also under thresholds: less than .1%", "05_train_adaptive",
          "dead_thresholds_feature", ("<", 0.001),
          {"TopK": "dead_thresholds_topk", "Mutual Choice": "dead_thresholds_mutual"}, {"by the training rule": "dead_batches_feature"}),
    Claim("2411.02124", "Tokens whose successor the model finds hard to predict get more latents (ours; rank correlation, Mutual Choice)", "05_train_adaptive",
          "next_loss_correlation_mutual", (">", 0), also={"loss of the token itself": "loss_correlation_mutual"}),
    Claim("2411.02124", "aux_zipf_loss leaves fewer latents dead than no auxiliary loss", "05_train_adaptive",
          "dead_aux_zipf_wide - dead_none_wide", ("<", 0), also={"AuxK − none": "dead_auxk_wide - dead_none_wide"}),
]
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# One claim
# ---------------------------------------------------------------------------------------------------------------------


def read(metrics: dict, value: str) -> float | None:
    """The number that `value` names (see `Claim`), None where the run found none; KeyError if there is no such name."""
    for word, combine in {" - ": lambda a, b: a - b, " over ": lambda a, b: a / b if b else None}.items():
        if word in value:
            a, b = (read(metrics, part) for part in value.split(word))
            return None if a is None or b is None else combine(a, b)
    found = metrics
    for key in value.split("/"):
        if isinstance(found, list):
            found = {str(i): one for i, one in enumerate(found)}
        names = list(found) if isinstance(found, dict) else []
        if key not in names:
            there = ", ".join(names[:20]) or "no more names"
            raise KeyError(f"metrics have no {value!r}{runs.near(key, names)}: at {key!r} there are {there}")
        found = found[key]
    if found is not None and not isinstance(found, (int, float)):
        raise TypeError(f"{value!r} of the metrics is no number, but a {type(found).__name__}")
    return found


def t_quantile(df: int, level: float = 0.95) -> float:
    """Half-width of the central interval of Student's t that holds `level`: with t = √df tan θ its density is ∝ cos^(df−1) θ."""
    theta = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(theta) ** (df - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(math.sqrt(df) * np.tan(np.interp(level, mass / mass[-1], theta)))


def summary(values) -> dict:
    """mean, sd (n − 1), n and the 95% t-interval of the mean, over the seeds that have a value; None where undefined."""
    known = [v for v in values if v is not None]
    n = len(known)
    mean = float(np.mean(known)) if n else None
    sd = float(np.std(known, ddof=1)) if n > 1 else None
    half = t_quantile(n - 1) * sd / math.sqrt(n) if n > 1 else None
    interval = [None, None] if half is None else [mean - half, mean + half]
    return {"mean": mean, "sd": sd, "n": n, "interval": interval}


def verdict(interval, expected) -> str:
    """`"holds"` if the whole interval is where it is expected, `"fails"` if none of it is, else `"undecided"`."""
    low, high = interval
    relation, bound, *margin = expected
    if low is None:
        return "undecided"
    least = {">": bound, "<": -math.inf, "=": bound - sum(margin)}[relation]
    most = {">": math.inf, "<": bound, "=": bound + sum(margin)}[relation]
    if least < low and high < most:
        return "holds"
    return "fails" if high <= least or low >= most else "undecided"


def judge(claim: Claim, of_seed: dict[int, runs.Run]) -> dict:
    """The row of claims.json for one claim, from the runs of its notebook by seed."""
    judged = [of_seed[seed] for seed in sorted(of_seed) if seed != TUNED_ON]

    def over_seeds(value):
        return [read(run.metrics, value) for run in judged]

    values = over_seeds(claim.value)
    found = summary(values)
    enough = found["n"] >= ENOUGH and None not in values
    relation, bound, *margin = claim.expected
    kinds = {" - ": "difference within each seed", " over ": "ratio within each seed"}
    said = next((kind for word, kind in kinds.items() if word in claim.value), "value of each seed")
    said += f"; 95% t-interval of the mean over seeds, expected {relation} {bound:g}" + "".join(
        f" ± {m:g}" for m in margin
    )
    controls = {name: summary(over_seeds(value)) | {"metric": value} for name, value in claim.controls.items()}
    for control in controls.values():
        control["verdict"] = verdict(control["interval"], claim.expected)
    also = {name: summary(over_seeds(value)) | {"metric": value} for name, value in claim.also.items()}
    row = found | {
        "paper": claim.paper,
        "claim": claim.claim,
        "metric": f"{claim.notebook}: {claim.value}",
        "values": values,
        "comparison": f"{said}; seed {TUNED_ON} was tuned on and is left out",
        "controls": controls | also,
        "verdict": verdict(found["interval"], claim.expected) if enough else "undecided",
        "run_ids": [f"{run.name}/{run.id}" for run in judged],
    }
    return {key: row[key] for key in KEYS}


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def reference_runs(path=SWEEP) -> dict[str, dict[int, runs.Run]]:
    """{notebook: {seed: run}}: the finished runs of a sweep, those in outputs/ and those committed under outputs/reference/runs/.

    Seeds are compared only where they alone differ. Of a notebook with runs of several versions (other code, parameters, sources,
    text or model) the version with most seeds counts, and of equally many the one that the sweep would make now.
    """
    now = [runs.find_run(name, params, needs_saes=False) for name, params in sweep.planned(path)]
    return by_seed([*filter(None, now), *committed()])


def committed() -> list[runs.Run]:
    return [run_at(file.parent) for file in sorted(runs.REFERENCE.glob("*/*/manifest.json"))]


def by_seed(of_all_versions) -> dict[str, dict[int, runs.Run]]:
    """{notebook: {seed: run}} of the version that has most seeds; of equally many, that of the earliest run in the list."""
    versions: dict[str, dict[str, dict]] = {}
    for run in of_all_versions:
        versions.setdefault(run.name, {}).setdefault(version(run.manifest), {}).setdefault(run.manifest["seed"], run)
    return {name: max(of_version.values(), key=len) for name, of_version in versions.items()}


def run_at(directory) -> runs.Run:
    return runs.Run(directory, read_json(directory / "manifest.json"))


def version(manifest) -> str:
    """What all seeds of a comparison have in common."""
    parameters = {k: v for k, v in manifest["parameters"].items() if k not in ("seed", "output_dir")}
    return digest([parameters, *(manifest[key] for key in ("code", "sources", "corpus_hash", "model_hash"))])


def evaluate(found: dict[str, dict[int, runs.Run]], claims=None) -> list[dict]:
    """The rows of claims.json: all claims whose notebook has a run that counts. A claim without any has no row."""
    claims = CLAIMS if claims is None else claims
    rows = [judge(claim, found[claim.notebook]) for claim in claims if claim.notebook in found]
    return [row for row in rows if row["run_ids"]]


def controls_of(row) -> dict:
    """Those of a row's controls that are judged as its claim is."""
    return {name: control for name, control in row["controls"].items() if "verdict" in control}


def shown(found: dict) -> str:
    """Mean and interval of a `summary`."""
    low, high = found["interval"]
    mean = "not found in every seed" if found["mean"] is None else f"{found['mean']:.3g}"
    return mean if low is None else f"{mean} [{low:.3g}, {high:.3g}]"


def table(rows) -> str:
    """The rows as a Markdown table."""
    lines = ["| paper | claim | here: mean [95% interval] | seeds | verdict | control |", "|---|---|---|---|---|---|"]
    for row in rows:
        beside = [f"{name}: {shown(c)}, {c['verdict']}" for name, c in controls_of(row).items()]
        cells = [row["paper"], row["claim"], shown(row), str(row["n"]), f"**{row['verdict']}**", "; ".join(beside)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def section(rows) -> str:
    """What the README says between the marks: nothing without rows."""
    if not rows:
        return ""
    of_verdict = Counter(row["verdict"] for row in rows)
    counts = ", ".join(f"{of_verdict[word]} {said}" for word, said in SAID.items())
    hold = [[control["verdict"] for control in controls_of(row).values()] for row in rows if row["verdict"] == "holds"]
    too = sum("holds" in control for control in hold)
    return (
        f"## Claims\n\nOf {len(rows)} claims, the papers' but where marked as ours, at this scale {counts}. A verdict is that of the 95% interval of the "
        f"mean over seeds, of each claim by itself. Where the control holds too, as for {too} of the {of_verdict['holds']}, the number alone does not show what "
        "it is said to show. [claims.json](outputs/reference/claims.json) has the values of each seed, other measures and the runs.\n\n"
        f"{table(rows)}\n{pictures()}"
    )


def pictures() -> str:
    """The figures of `FIGURES` that were collected, two side by side, as HTML: one per paper, of the first seed."""
    there = {name: f for name, f in FIGURES.items() if (runs.REFERENCE.parent / "figures" / name / f"{f}.png").exists()}
    images = [
        f'<img src="outputs/reference/figures/{name}/{figure}.png" width="49%" alt="{name}: {figure}">'
        for name, figure in there.items()
    ]
    return f"\nFrom {', '.join(there)}, each of its first seed:\n\n" + "\n".join(images) + "\n" if there else ""


def made(found) -> str:
    """What the runs took, and on what, as a Markdown table."""
    lines = ["| notebook | seeds | minutes a seed | machine |", "|---|---|---|---|"]
    hours = 0.0
    for name, of_seed in sorted(found.items()):
        minutes = [run.manifest["wall_seconds"] / 60 for run in of_seed.values()]
        hours += sum(minutes) / 60
        machines = {run.manifest["gpu"] or f"CPU, threads: {run.manifest['threads']}" for run in of_seed.values()}
        cells = [
            f"`{name}`",
            ", ".join(map(str, sorted(of_seed))),
            f"{np.mean(minutes):.1f}",
            ", ".join(sorted(machines)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{hours:.1f} hours in all."])


def details(rows, found) -> str:
    """claims.md: the table, then for each claim its metric, comparison, values and controls; and what the runs took."""
    parts = ["# Claims of the papers, and what the reference runs say", table(rows)]
    for row in rows:
        values = ", ".join("none" if v is None else f"{v:.4g}" for v in row["values"])
        lines = [
            f"**{row['paper']}: {row['claim']}** {row['verdict']}.",
            f"`{row['metric']}`: {values}. {row['comparison']}.",
        ]
        for name, control in row["controls"].items():
            if control["mean"] is not None:
                kind = f"Control, which {control['verdict']}" if "verdict" in control else "Also"
                lines.append(f"{kind}: {name} (`{control['metric']}`): {shown(control)}, {control['n']} seeds.")
        parts.append("\n".join(lines) + f"\nRuns: {', '.join(row['run_ids'])}.")
    return "\n\n".join([*parts, "# The runs", made(found)]) + "\n"


def shown_in(readme: str) -> str | None:
    """The text between the marks of the README, None without marks."""
    found = MARKED.search(readme)
    return found and found[2]


# ---------------------------------------------------------------------------------------------------------------------
# Collecting
# ---------------------------------------------------------------------------------------------------------------------


def collect(path=SWEEP, readme=README) -> list[dict]:
    """Copy what finished of a sweep to outputs/reference/, and write claims.json, claims.md and the README's table.

    Manifests and metrics of every seed, the executed notebook and the README's figures of the first. Can be called at any time; a
    notebook's runs of another version are replaced.
    """
    found, home = reference_runs(path), runs.REFERENCE.parent
    for name, of_seed in found.items():
        kept = runs.REFERENCE / name
        for run in of_seed.values():
            copy_files(run.dir, kept / run.id, ["manifest.json", "metrics.json"])
            of_seed[run.manifest["seed"]] = run_at(kept / run.id)
            first = run.manifest["seed"] == min(of_seed)
            if first and (run.dir / "notebook.ipynb").exists():
                write_notebook(run.dir / "notebook.ipynb", home / f"{name}.ipynb")
            if first and name in FIGURES and run.dir != kept / run.id:
                copy_files(run.dir / "figures", home / "figures" / name, [f"{FIGURES[name]}.png"])
        for old in kept.iterdir():
            if old.name not in [run.id for run in of_seed.values()]:
                shutil.rmtree(old)
    rows = evaluate(found)
    if rows:
        write_json(home / "claims.json", rows)
        rows = read_json(home / "claims.json")  # in its order
        write_text(home / "claims.md", details(rows, found))
        write_text(readme, MARKED.sub(lambda m: m[1] + section(rows) + m[3], Path(readme).read_text()))
    return rows


def collect_laptop(path=LAPTOP, readme=README) -> None:
    """Copy manifests and metrics of `make run` to outputs/reference/laptop/, and its minutes to the README, if all of it is there."""
    plan = [(name, runs.find_run(name, params)) for name, params in sweep.planned(path)]
    if any(run is None or run.stale() for _, run in plan):
        return
    for name, run in plan:
        copy_files(run.dir, runs.REFERENCE.parent / "laptop" / name, ["manifest.json", "metrics.json"])
    write_text(readme, TIMED.sub(lambda m: m[1] + minutes(m[2]) + m[3], Path(readme).read_text()))


def minutes(name: str) -> str:
    """What a notebook took in the committed `make run`."""
    return f"{read_json(runs.REFERENCE.parent / 'laptop' / name / 'manifest.json')['wall_seconds'] / 60:.1f}"


def copy_files(source: Path, target: Path, names) -> None:
    for name in names:
        if source != target and (source / name).exists():
            with replacing(target / name) as new:
                shutil.copyfile(source / name, new)


def write_text(path, text: str) -> None:
    with replacing(path) as new:
        new.write_text(text)


def write_notebook(source: Path, target: Path) -> None:
    """An executed notebook without papermill's times and paths, without this machine's, and with small figures."""
    notebook = read_json(source)
    for cell in notebook["cells"]:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                data["image/png"] = with_palette(data["image/png"])
    for part in (notebook, *notebook["cells"]):
        for key in ("papermill", "execution"):
            part["metadata"].pop(key, None)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True).replace(f"{ROOT}/", "")
    write_text(target, text + "\n")


def with_palette(png: str) -> str:
    """A PNG in base64 with a palette of 256 colours: a third of its size, and hardly to be told apart."""
    from PIL import Image

    smaller = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256).save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] != "collect" or len(argv) > 2:
        print("usage: python -m sae_utils.claims [collect [SWEEP.toml]]", file=sys.stderr)
        return 2
    try:
        rows = collect(*argv[1:]) if argv else evaluate(reference_runs())
        if argv:
            collect_laptop()
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    print(table(rows) if rows else f"no run of {SWEEP.name} is there: `make reference` makes them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
