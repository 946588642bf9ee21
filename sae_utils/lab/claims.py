"""What the reference runs say to the papers' claims: a table of verdicts, and collecting what it rests on.

    python -m sae_utils.lab.claims                         print the table of the runs that are there
    python -m sae_utils.lab.claims collect [SWEEP.toml]    copy them to outputs/reference/, write claims.json, claims.md, the README;
                                                       and what `make run` made, for the README's minutes

The claims themselves are in `papers`. Imports no torch.
"""

import base64
import io
import json
import re
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from ..files import ROOT, digest, read_json, replacing, write_json
from . import runs, sweep
from .papers import CLAIMS, judge

SWEEP = ROOT / "sweeps" / "reference.toml"
LAPTOP = ROOT / "sweeps" / "laptop.toml"
README = ROOT / "README.md"
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
# Runs and tables
# ---------------------------------------------------------------------------------------------------------------------


def reference_runs(path=SWEEP) -> dict[str, dict[int, runs.Run]]:
    """{notebook: {seed: run}}: the finished runs of a sweep, those in outputs/ and those committed under outputs/reference/runs/.

    Seeds are compared only where they alone differ. Of a notebook with runs of several versions (other code, parameters, sources,
    text or model) the version with most seeds counts, and of equally many the one that the sweep would make now.
    """
    now = [runs.find_run(name, params, needs_saes=False) for name, params in sweep.planned(path)]
    return by_seed([*filter(None, now), *committed()])


def committed() -> list[runs.Run]:
    found = (runs.whole_run(file.parent) for file in sorted(runs.REFERENCE.glob("*/*/manifest.json")))
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
    for claim in CLAIMS if claims is None else claims:
        try:
            rows += [judge(claim, found[claim.notebook])] if claim.notebook in found else []
        except (*runs.DAMAGED, KeyError, TypeError) as error:
            warnings.warn(f"{claim.claim!r} cannot be judged: {runs.in_words(error)}")
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
    hold = [row for row in rows if row["verdict"] == "holds"]
    too = sum(any(control["verdict"] == "holds" for control in controls_of(row).values()) for row in hold)
    return (
        f"## Claims\n\nOf {len(rows)} claims, the papers' but where marked as ours, at this scale {counts}. A verdict is that of the 95% interval of the "
        f"mean over seeds, of each claim by itself. Where the control holds too, as for {too} of the {len(hold)}, the number alone does not show what "
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
        machines = {runs.made_on(run.manifest) for run in of_seed.values()}
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
            rows = collect(*argv[1:]) if argv else evaluate(reference_runs())
            if argv:
                collect_laptop()
    except (KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {runs.in_words(error)}", file=sys.stderr)
        return 2
    print(table(rows) if rows else f"no run of {SWEEP.name} is there: `make reference` makes them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
