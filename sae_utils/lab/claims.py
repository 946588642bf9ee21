"""The papers' claims (`notebooks/studies/claims.toml`), judged by the reference runs: verdicts, and collecting what they rest on.

    python -m sae_utils.lab.claims                         print the table of the runs that are there, else the first table
    python -m sae_utils.lab.claims collect [SWEEP.toml]    copy them to outputs/reference/, write claims.json, claims.md, the README;
                                                           and what `make run` made, for the README's minutes

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
LAPTOP = ROOT / "sweeps" / "laptop.toml"
README = ROOT / "README.md"
FIRST = OUTPUTS / "reference" / "first"  # the first reference runs and their table, by earlier code
ENOUGH = 3  # seeds; with fewer there is no verdict
TUNED_ON = 0  # the seed on whose validation files learning rates, λ and β were chosen: it is not judged
KEYS = "paper claim metric values mean sd n comparison interval controls verdict run_ids".split()
MARKED = re.compile(r"(<!-- claims: written by `make reference` -->\n)(.*?)(<!-- end of claims -->)", re.DOTALL)
TIMED = re.compile(r"^(\| \[`(\w+)`\].*\| )[^|]*( \|)$", re.MULTILINE)  # a notebook in the README, its minutes last
SAID = {"holds": "hold", "fails": "fail", "undecided": "are undecided"}
FIGURES = {  # those that the README shows, of the first seed
    "02_train_gated": "pareto",
    "03_train_e2e": "pareto",
    "04_train_gsae": "beta",
    "05_train_adaptive": "pareto",
    "06_dark_matter": "fvu_by_width",
    "08_compare": "pareto",
}


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
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))["claim"]
        return [read_claim(table, f"{path}, claim {i}") for i, table in enumerate(tables, start=1)]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error!r}. It has to be TOML with one [[claim]] a claim") from None


def read_claim(table: dict, where: str) -> Claim:
    """One claim, checked field by field."""
    where += f" ({table.get('statement', 'without a statement')!r})"
    for field in table:
        if field not in Claim._fields:
            raise ValueError(f"{where}: unknown field {field!r}{near(field, Claim._fields)}")
    for field in Claim._fields:
        value = table.get(field, Claim._field_defaults.get(field))
        if field == "bound":
            allowed = '[">", value], ["<", value] or ["=", value, margin]'
            good = isinstance(value, list) and (value[:1], len(value)) in [([">"], 2), (["<"], 2), (["="], 3)]
            good = good and all(type(number) in (int, float) and math.isfinite(number) for number in value[1:])
        elif field in ("controls", "also"):
            allowed = "a table of metrics by name"
            good = isinstance(value, dict) and all(isinstance(metric, str) for metric in value.values())
        elif field == "whose":
            allowed, good = '"paper" or "ours"', value in ("paper", "ours")
        else:
            allowed, good = "text", isinstance(value, str) and (value or field == "section")
        if not good:
            said = "missing" if value is None else repr(value)
            raise ValueError(f"{where}: {field} is {said}: it has to be {allowed}")
    return Claim(**table)


def read(metrics: dict, value: str, where: str = "metrics") -> float | None:
    """The number that a claim's metric names, None where the run found none; KeyError with `where` if there is no such name."""
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


def summary(values) -> dict:
    """mean, sd (n − 1), n and the 95% t-interval of the mean, over the seeds that have a value; None where undefined."""
    known = [v for v in values if v is not None]
    n = len(known)
    mean = float(np.mean(known)) if n else None
    sd = float(np.std(known, ddof=1)) if n > 1 else None
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n) if n > 1 else None
    interval = [None, None] if half is None else [mean - half, mean + half]
    return {"mean": mean, "sd": sd, "n": n, "interval": interval}


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

    def beside(metrics, *left_out):
        of_name = {name: over_seeds(metric) for name, metric in metrics.items()}
        return {name: {k: v for k, v in row.items() if k not in left_out} for name, row in of_name.items()}

    relation, value, *margin = claim.bound
    kinds = {" - ": "difference within each seed", " over ": "ratio within each seed"}
    said = next((kind for word, kind in kinds.items() if word in claim.metric), "value of each seed")
    bound = " ± ".join(f"{number:g}" for number in (value, *margin))
    row = over_seeds(claim.metric) | {
        "paper": claim.paper,
        "claim": claim.statement,
        "metric": f"{claim.notebook}: {claim.metric}",
        "comparison": f"{said}; 95% t-interval of the mean over seeds, expected {relation} {bound}; "
        f"seed {TUNED_ON} was tuned on and is left out",
        "controls": beside(claim.controls, "values") | beside(claim.also, "values", "verdict"),
        "run_ids": [f"{run.name}/{run.id}" for run in judged],
    }
    return {key: row[key] for key in KEYS}


# ---------------------------------------------------------------------------------------------------------------------
# Runs and tables
# ---------------------------------------------------------------------------------------------------------------------


def reference_runs(path=SWEEP) -> dict[str, dict[int, runs.Run]]:
    """{notebook: {seed: run}}: the finished runs of a sweep, those in outputs/ and those committed under outputs/reference/runs/.

    Seeds are compared only where they alone differ. Of a notebook with runs of several versions (other code, parameters, sources,
    text or model) the version with most seeds counts, and of equally many the one that the sweep would make now.
    """
    now = [runs.find_run(name, params, needs_saes=False) for name, params in sweep.planned(path)]
    return by_seed([*filter(None, now), *committed()])


def committed(directory=None) -> list[runs.Run]:
    """The finished runs in a directory of reference runs."""
    found = (runs.whole_run(file.parent) for file in sorted((directory or runs.REFERENCE).glob("*/*/manifest.json")))
    return [run for run in found if run and run.manifest["finished"]]


def by_seed(of_all_versions) -> dict[str, dict[int, runs.Run]]:
    """{notebook: {seed: run}} of the version that has most seeds; of equally many, that of the earliest run in the list."""
    versions: dict[str, dict[str, dict]] = {}
    for run in of_all_versions:
        if run.manifest["seed"] is not None:
            of_version = versions.setdefault(run.name, {})
            of_version.setdefault(version(run.manifest), {}).setdefault(run.manifest["seed"], run)
    return {name: max(of_version.values(), key=len) for name, of_version in versions.items()}


def version(manifest) -> str:
    """What all seeds of a comparison have in common."""
    parameters = {k: v for k, v in manifest["parameters"].items() if k not in ("seed", "output_dir")}
    return digest([parameters, *(manifest.get(key) for key in ("code", "sources", "corpus_hash", "model_hash"))])


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


def markdown(titles: list[str], rows) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (titles, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])


def table(rows) -> str:
    """The rows as a Markdown table."""
    cells = []
    for row in rows:
        beside = [f"{name}: {shown(c)}, {c['verdict']}" for name, c in controls_of(row).items()]
        about = row["paper"], row["claim"], shown(row), str(row["n"]), f"**{row['verdict']}**"
        cells.append([*about, "; ".join(beside)])
    return markdown(["paper", "claim", "here: mean [95% interval]", "seeds", "verdict", "control"], cells)


def section(rows, home=None) -> str:
    """What the README says between the marks: nothing without rows."""
    if not rows:
        return ""
    home = home or runs.REFERENCE.parent
    at, first = "outputs/reference", ""
    if home == FIRST:
        at += "/first"
        first = f"This table is the first one. [Earlier code]({at}/README.md) made its runs; `make reference` makes new ones.\n\n"
    of_verdict = Counter(row["verdict"] for row in rows)
    counts = ", ".join(f"{of_verdict[word]} {said}" for word, said in SAID.items())
    hold = [row for row in rows if row["verdict"] == "holds"]
    too = sum(any(control["verdict"] == "holds" for control in controls_of(row).values()) for row in hold)
    return (
        f"## Claims\n\n{first}Of {len(rows)} claims, the papers' but where marked as ours, at this scale {counts}. A verdict is that of the 95% interval of the "
        f"mean over seeds, of each claim by itself. Where the control holds too, as for {too} of the {len(hold)}, the number alone does not show what "
        f"it is said to show. [claims.json]({at}/claims.json) has the values of each seed, other measures and the runs.\n\n"
        f"{table(rows)}\n{pictures(home, at)}"
    )


def pictures(home: Path, at: str) -> str:
    """The figures of `FIGURES` that were collected, two side by side, as HTML: one per paper, of the first seed."""
    there = {name: f for name, f in FIGURES.items() if (home / "figures" / name / f"{f}.png").exists()}
    images = [f'<img src="{at}/figures/{n}/{f}.png" width="49%" alt="{n}: {f}">' for n, f in there.items()]
    return f"\nFrom {', '.join(there)}, each of its first seed:\n\n" + "\n".join(images) + "\n" if there else ""


def made(found) -> str:
    """What the runs took, and on what, as a Markdown table."""
    minutes = {name: [run.manifest["wall_seconds"] / 60 for run in found[name].values()] for name in sorted(found)}
    cells = []
    for name, each in minutes.items():
        machines = {runs.made_on(run.manifest) for run in found[name].values()}
        seeds = ", ".join(map(str, sorted(found[name])))
        cells.append([f"`{name}`", seeds, f"{np.mean(each):.1f}", ", ".join(sorted(machines))])
    hours = sum(map(sum, minutes.values())) / 60
    return markdown(["notebook", "seeds", "minutes a seed", "machine"], cells) + f"\n\n{hours:.1f} hours in all."


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
            of_seed[run.manifest["seed"]] = runs.run_at(kept / run.id)
            first = run.manifest["seed"] == min(of_seed)
            if first and (run.dir / "notebook.ipynb").exists():
                try:
                    write_notebook(run.dir / "notebook.ipynb", home / f"{name}.ipynb")
                except (*runs.DAMAGED, AttributeError, KeyError, TypeError) as error:
                    warnings.warn(f"{run.dir / 'notebook.ipynb'} is not collected: {runs.in_words(error)}")
            if first and name in FIGURES and run.dir != kept / run.id:
                copy_files(run.dir / "figures", home / "figures" / name, [f"{FIGURES[name]}.png"])
        for old in {file.parent for file in kept.glob("*/manifest.json")}:  # what else lies there is not ours
            if old.name not in [run.id for run in of_seed.values()]:
                runs.remove(old)
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
        if source != target and (source / name).is_file():
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
            if argv:
                rows = collect(*argv[1:])
                collect_laptop()
            elif not (rows := evaluate(reference_runs())) and (FIRST / "claims.json").exists():
                print("The first table, which earlier code made:\n")
                rows = read_json(FIRST / "claims.json")
    except (KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {runs.in_words(error)}", file=sys.stderr)
        return 2
    print(table(rows) if rows else f"no run of {SWEEP.name} is there: `make reference` makes them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
