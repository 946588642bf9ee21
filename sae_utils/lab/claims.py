"""The papers' claims (`notebooks/studies/claims.toml`), judged by the reference runs: verdicts, and collecting what they rest on.

    python -m sae_utils.lab.claims                         print the table of the runs that are there, else the first table
    python -m sae_utils.lab.claims collect [SWEEP.toml]    copy them to outputs/reference/, write claims.json and the README's table

The mean of a number over seeds is judged by its 95% t-interval. The seed that was tuned on is left out. Imports no torch.
"""

import base64
import io
import json
import math
import re
import shutil
import sys
import tomllib
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from ..files import OUTPUTS, ROOT, digest, read_json, replacing, write_json
from ..values import near
from . import runs, sweep

CLAIMS = ROOT / "notebooks" / "studies" / "claims.toml"
SWEEP = ROOT / "sweeps" / "reference.toml"
README = ROOT / "README.md"
FIRST = OUTPUTS / "reference" / "first"  # the first reference runs and their table, by earlier code
ENOUGH = 3  # seeds; with fewer there is no verdict
TUNED_ON = 0  # the seed on whose validation files learning rates, λ and β were chosen: it is not judged
MARKED = re.compile(r"(<!-- claims: written by `make reference` -->\n)(.*?)(<!-- end of claims -->)", re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------------
class Claim(NamedTuple):
    """A table of claims.toml, whose head says what each field means."""

    paper: str
    section: str
    statement: str
    notebook: str
    metric: str
    operating_point: str
    bound: list
    whose: str
    controls: dict = {}
    also: dict = {}


def read_claims(path=CLAIMS) -> list[Claim]:
    """The claims of a file; ValueError with file, claim and field for one that is malformed."""
    claims, where = [], path
    try:
        for i, table in enumerate(tomllib.loads(Path(path).read_text(encoding="utf-8"))["claim"], start=1):
            where = f"{path}, claim {i} ({table.get('statement', 'without a statement')!r})"
            claims.append(claim := Claim(**table))
            relation, *numbers = claim.bound
            if {">": 1, "<": 1, "=": 2}.get(relation) != len(numbers) or {*map(type, numbers)} - {int, float}:
                raise ValueError(f'bound is {claim.bound}, not [">", value], ["<", value] or ["=", value, margin]')
            if claim.whose not in ("paper", "ours"):
                raise ValueError(f'whose is {claim.whose!r}, not "paper" or "ours"')
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}. It has to be TOML with one [[claim]] a claim") from None
    return claims


def read(metrics: dict, value: str, where: str = "metrics") -> float | None:
    """The number that a claim's metric names, None where the run found none; KeyError with `where` if there is no such name."""
    for word, combine in {" - ": lambda a, b: a - b, " over ": lambda a, b: a / b if b else None}.items():
        if word in value:
            a, b = (read(metrics, part, where) for part in value.split(word))
            return None if a is None or b is None else combine(a, b)
    found = metrics
    for key in value.split("/"):
        names = found if isinstance(found, dict) else {}
        if key not in names:
            there = ", ".join([*names][:20]) or "no more names"
            raise KeyError(f"{where} has no {value!r}{near(key, names)}: at {key!r} there are {there}")
        found = names[key]
    if found is not None and not isinstance(found, (int, float)):
        raise TypeError(f"{value!r} of {where} is no number, but a {type(found).__name__}")
    return found


def summary(values) -> dict:
    """mean, sd (n − 1), n and the 95% t-interval of the mean, over the seeds that have a value; None where undefined."""
    known = [v for v in values if v is not None]
    n = len(known)
    mean = float(np.mean(known)) if n else None
    sd = float(np.std(known, ddof=1)) if n > 1 else None
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n) if n > 1 else None
    return {"mean": mean, "sd": sd, "n": n, "interval": [None, None] if half is None else [mean - half, mean + half]}


def verdict(interval, bound) -> str:
    """`"holds"` if the whole interval is where it is expected, `"fails"` if none of it is, else `"undecided"`."""
    low, high = interval
    relation, value, *margin = bound
    if low is None:
        return "undecided"
    least = {">": value, "<": -math.inf, "=": value - sum(margin)}[relation]
    most = {">": math.inf, "<": value, "=": value + sum(margin)}[relation]
    if least < low and high < most:
        return "holds"
    return "fails" if high <= least or low >= most else "undecided"


def judge(claim: Claim, of_seed: dict[int, runs.Run]) -> dict:
    """The row of claims.json for one claim, from the runs of its notebook by seed."""
    judged = [of_seed[seed] for seed in sorted(of_seed) if seed != TUNED_ON]

    def over_seeds(metric):
        values = [read(run.metrics, metric, str(run.dir / "metrics.json")) for run in judged]
        found = summary(values)
        enough = len(values) >= ENOUGH and None not in values
        says = verdict(found["interval"], claim.bound) if enough else "undecided"
        return found | {"metric": metric, "values": values, "verdict": says}

    controls = {name: over_seeds(metric) for name, metric in (claim.controls | claim.also).items()}
    for name, control in controls.items():
        del control["values"]
        if name in claim.also:
            del control["verdict"]
    relation, *numbers = claim.bound
    kinds = {" - ": "difference within each seed", " over ": "ratio within each seed"}
    said = next((kind for word, kind in kinds.items() if word in claim.metric), "value of each seed")
    return over_seeds(claim.metric) | {
        "paper": claim.paper,
        "claim": claim.statement,
        "metric": f"{claim.notebook}: {claim.metric}",
        "comparison": f"{said}; 95% t-interval of the mean over seeds, expected {relation} "
        f"{' ± '.join(f'{number:g}' for number in numbers)}; seed {TUNED_ON} was tuned on and is left out",
        "controls": controls,
        "run_ids": [f"{run.name}/{run.id}" for run in judged],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Runs and tables
# ---------------------------------------------------------------------------------------------------------------------
def reference_runs(path=SWEEP) -> dict[str, dict[int, runs.Run]]:
    """{notebook: {seed: run}}: the finished runs of a sweep, those in outputs/ and those committed under outputs/reference/runs/."""
    now = [runs.find_run(name, params, needs_saes=False) for name, params in sweep.planned(path)]
    return by_seed([*filter(None, now), *committed(runs.REFERENCE)])


def committed(directory: Path) -> list[runs.Run]:
    """The finished runs in a directory of reference runs."""
    found = (runs.whole_run(file.parent) for file in sorted(directory.glob("*/*/manifest.json")))
    return [run for run in found if run and run.manifest["finished"]]


def by_seed(of_all_versions) -> dict[str, dict[int, runs.Run]]:
    """{notebook: {seed: run}}, since seeds are compared only where they alone differ.

    Of a notebook with runs of several versions (other code, parameters, sources, text or model) the version with most seeds counts;
    of equally many, that of the earliest run in the list.
    """
    versions: dict[str, dict[str, dict]] = {}
    for run in of_all_versions:
        if "seed" in run.parameters:
            of_version = versions.setdefault(run.name, {}).setdefault(version(run), {})
            of_version.setdefault(run.parameters["seed"], run)
    return {name: max(of_version.values(), key=len) for name, of_version in versions.items()}


def version(run: runs.Run) -> str:
    """What all seeds of a comparison have in common."""
    parameters = {k: v for k, v in run.parameters.items() if k not in ("seed", "output_dir")}
    return digest([parameters, *(run.manifest.get(key) for key in ("code", "sources", "corpus_hash", "model_hash"))])


def evaluate(found: dict[str, dict[int, runs.Run]], claims=None) -> list[dict]:
    """The rows of claims.json: all claims whose notebook has a run that counts.

    A claim without any has no row, and neither has one whose numbers a run does not have, of which a warning tells.
    """
    rows = []
    for claim in read_claims() if claims is None else claims:
        try:
            rows += [judge(claim, found[claim.notebook])] if claim.notebook in found else []
        except (*runs.DAMAGED, KeyError, TypeError) as error:
            warnings.warn(f"{claim.statement!r} cannot be judged: {runs.in_words(error)}")
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
        cells = row["paper"], row["claim"], shown(row), str(row["n"]), f"**{row['verdict']}**", "; ".join(beside)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def section(rows, home=None) -> str:
    """What the README says between the marks: nothing without rows."""
    if not rows:
        return ""
    at = "outputs/reference/first" if home == FIRST else "outputs/reference"
    first = f"This table is the first one. [Earlier code]({at}/README.md) made its runs; `make reference` makes new ones.\n\n"
    of_verdict = Counter(row["verdict"] for row in rows)
    hold = [row for row in rows if row["verdict"] == "holds"]
    too = sum(any(control["verdict"] == "holds" for control in controls_of(row).values()) for row in hold)
    return (
        f"## Claims\n\n{first if home == FIRST else ''}Of {len(rows)} claims, the papers' but where marked as ours, at this scale "
        f"{of_verdict['holds']} hold, {of_verdict['fails']} fail, {of_verdict['undecided']} are undecided. A verdict is that of the 95% "
        f"interval of the mean over seeds, of each claim by itself. Where the control holds too, as for {too} of the {len(hold)}, the "
        f"number alone does not show what it is said to show. [claims.json]({at}/claims.json) has the values of each seed, other "
        f"measures and the runs.\n\n{table(rows)}\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Collecting
# ---------------------------------------------------------------------------------------------------------------------
def collect(path=SWEEP, readme=README) -> list[dict]:
    """Copy what finished of a sweep to outputs/reference/, and write claims.json and the README's table.

    Manifests and metrics of every seed, and the executed notebook of the first. Can be called at any time; a notebook's runs of
    another version are replaced.
    """
    found, home = reference_runs(path), runs.REFERENCE.parent
    for name, of_seed in found.items():
        kept = runs.REFERENCE / name
        executed = of_seed[min(of_seed)].dir / "notebook.ipynb"
        if executed.exists():
            write_notebook(executed, home / f"{name}.ipynb")
        for seed, run in of_seed.items():
            for file in ("metrics.json", "manifest.json"):
                if run.dir != kept / run.id:
                    with replacing(kept / run.id / file) as new:
                        shutil.copyfile(run.dir / file, new)
            of_seed[seed] = runs.run_at(kept / run.id)
        for old in {file.parent for file in kept.glob("*/manifest.json")}:  # what else lies there is not ours
            if old.name not in [run.id for run in of_seed.values()]:
                runs.remove(old)
    rows = evaluate(found)
    if rows:
        write_json(home / "claims.json", rows)
        with replacing(readme) as new:
            new.write_text(MARKED.sub(lambda m: m[1] + section(rows) + m[3], Path(readme).read_text()))
    return rows


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
    with replacing(target) as new:
        new.write_text(text + "\n")


def with_palette(png: str) -> str:
    """A PNG in base64 with a palette of 256 colours, rare ones too: a third of its size, and hardly to be told apart."""
    from PIL import Image

    image, smaller = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(256, Image.Quantize.MAXCOVERAGE).save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] != "collect" or len(argv) > 2:
        print("usage: python -m sae_utils.lab.claims [collect [SWEEP.toml]]", file=sys.stderr)
        return 2
    try:
        with runs.plain_warnings():
            rows = collect(*argv[1:]) if argv else evaluate(reference_runs())
            if not rows and not argv and (FIRST / "claims.json").exists():
                print("The first table, which earlier code made:\n")
                rows = read_json(FIRST / "claims.json")
    except (KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {runs.in_words(error)}", file=sys.stderr)
        return 2
    print(table(rows) if rows else f"no run of {SWEEP.name} is there: `make reference` makes them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
