"""What the five papers claim, each as one number per seed and the bounds that it is expected in; and how one claim is judged.

A number is read from the `metrics.json` of a notebook's runs, its mean over seeds is compared with bounds fixed here, before the runs,
and judged by the 95% t-interval of that mean. The seed that was tuned on is left out. Imports no torch.
"""

import math
from typing import NamedTuple

import numpy as np

from ..values import near
from . import runs

ENOUGH = 3  # seeds; with fewer there is no verdict
KEYS = "paper claim metric values mean sd n comparison interval controls verdict run_ids".split()
TUNED_ON = 0  # the seed on whose validation files learning rates, λ and β were chosen: it is not judged


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


def dark_matter(claim: str, name: str, expected: tuple, control: str) -> Claim:
    """A claim that notebook 06 puts beside its control itself, in a table of its metrics, under `name`."""
    at = f"claims/{name}"
    return Claim("2410.14670", claim, "06_dark_matter", f"{at}/here", expected, {control: f"{at}/control"})


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
    dark_matter("About half of the error is a linear function of x: R² is .35 to .65",
                "about half of e is linear in x", ("=", 0.5, 0.15), "Gaussian data of the same covariance"),
    dark_matter("The error's squared norm is more than 90% linearly predictable",
                "‖e‖² is more than 90% linear in x", (">", 0.9), "best of ‖x‖, token and position"),
    dark_matter("FVU_nonlinear is flat in width: 1 − the ratio of its exponent to FVU's is .75 to 1.25",
                "FVU_nonlinear is flat in width", ("=", 1, 0.25), "Gaussian data of the same covariance"),
    dark_matter("Per-token error norms of the narrowest SAE predict those of the widest: R² is above .5",
                "‖e‖ predicts ‖e‖ across widths", (">", 0.5), "best of ‖x‖, token, position"),
    dark_matter("Nonlinear error costs CE in proportion to its squared length: ratio .75 to 1.25",
                "CE: the nonlinear error costs its share", ("=", 1, 0.25), "a fraction of the whole error"),
    dark_matter("Gradient pursuit lowers FVU_nonlinear only slightly: by 0 to 15%",
                "pursuit lowers FVU_nonlinear slightly", ("=", 0.075, 0.075), "Gaussian data of the same covariance"),
    dark_matter("SAEs of the same size do worse on the nonlinear than on the linear part",
                "SAEs do worse on the nonlinear part", (">", 0), "Gaussians of the same covariances"),
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


def read(metrics: dict, value: str, where: str = "metrics") -> float | None:
    """The number that `value` names (see `Claim`), None where the run found none; KeyError with `where` if there is no such name."""
    for word, combine in {" - ": lambda a, b: a - b, " over ": lambda a, b: a / b if b else None}.items():
        if word in value:
            a, b = (read(metrics, part, where) for part in value.split(word))
            return None if a is None or b is None else combine(a, b)
    found = metrics
    for key in value.split("/"):
        if isinstance(found, list):
            found = {str(i): one for i, one in enumerate(found)}
        names = list(found) if isinstance(found, dict) else []
        if key not in names:
            there = ", ".join(names[:20]) or "no more names"
            raise KeyError(f"{where} has no {value!r}{near(key, names)}: at {key!r} there are {there}")
        found = found[key]
    if found is not None and not isinstance(found, (int, float)):
        raise TypeError(f"{value!r} of {where} is no number, but a {type(found).__name__}")
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
        return [read(run.metrics, value, str(run.dir / "metrics.json")) for run in judged]

    def beside(value):
        return summary(over_seeds(value)) | {"metric": value}

    def says(value):
        found = over_seeds(value)
        enough = len(found) >= ENOUGH and None not in found
        return verdict(summary(found)["interval"], claim.expected) if enough else "undecided"

    values = over_seeds(claim.value)
    relation, bound, *margin = claim.expected
    kinds = {" - ": "difference within each seed", " over ": "ratio within each seed"}
    said = next((kind for word, kind in kinds.items() if word in claim.value), "value of each seed")
    said += f"; 95% t-interval of the mean over seeds, expected {relation} {bound:g}" + "".join(
        f" ± {m:g}" for m in margin
    )
    controls = {name: beside(value) | {"verdict": says(value)} for name, value in claim.controls.items()}
    row = summary(values) | {
        "paper": claim.paper,
        "claim": claim.claim,
        "metric": f"{claim.notebook}: {claim.value}",
        "values": values,
        "comparison": f"{said}; seed {TUNED_ON} was tuned on and is left out",
        "controls": controls | {name: beside(value) for name, value in claim.also.items()},
        "verdict": says(claim.value),
        "run_ids": [f"{run.name}/{run.id}" for run in judged],
    }
    return {key: row[key] for key in KEYS}
