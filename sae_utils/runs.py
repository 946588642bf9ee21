"""One run of a notebook: its parameters, its identity, its directory and its manifest.

A run lives in `<output_dir>/<notebook>/<run_id>/`: `manifest.json` says how it was made and whether it `finished`,
`metrics.json` what came out, `saes/`, `figures/` and `checkpoints/` hold the rest. `run_id` names what determines the
result: the notebook's code, its parameters, the text and the language model. The `sae_utils` sources are not in it: the manifest
has a hash of every module that the run loaded, and a run made by other sources is found, and known to be *stale*.

Imports no torch, so that the sweep runner can use it.
"""

import ast
import importlib.metadata
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import Timeout

from .data import corpus_hash
from .files import OUTPUTS, ROOT, code_hash, digest, lock, model_hash, read_json, replacing, source_hashes, write_json
from .values import near

REFERENCE = OUTPUTS / "reference" / "runs"
TYPES = re.compile(r"(bool|int|float|str|list|dict)|list\[(bool|int|float|str)\]")
PACKAGES = ["torch", "transformer-lens", "transformers", "numpy", "sae-utils"]
FIGURE_DPI = 130  # a 7-inch figure fills the width of a README
KERNEL_WAIT = 10  # seconds; the kernel of a killed sweep outlives it by one or two
_current = None


class Parameter(NamedTuple):
    default: Any
    type: str  # "bool", "int", "float", "str", "list[int]", ...: as declared, else that of the default


# ---------------------------------------------------------------------------------------------------------------------
# Notebooks and their parameters
# ---------------------------------------------------------------------------------------------------------------------


def notebooks_dir() -> Path:
    """Where notebooks are: `$SAE_UTILS_NOTEBOOKS` (tests), or `notebooks/` of the repository."""
    return Path(os.environ.get("SAE_UTILS_NOTEBOOKS") or ROOT / "notebooks").resolve()


def notebook_path(name: str) -> Path:
    """The file of a notebook given by its name (`"01_train_topk"`); FileNotFoundError lists those there are."""
    path = notebooks_dir() / f"{name}.ipynb"
    if not path.is_file():
        names = sorted(file.stem for file in notebooks_dir().glob("*.ipynb"))
        raise FileNotFoundError(f"no notebook {name!r} in {path.parent}{near(name, names)}: it has {', '.join(names)}")
    return path


def code_cells(path) -> list[tuple[list[str], str]]:
    """(tags, source) of every code cell."""
    cells = [cell for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
    return [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in cells]


def notebook_hash(path) -> str:
    """`code_hash` of a notebook's code cells but for its parameters, which are in a run's identity by themselves."""
    return code_hash(*(source for tags, source in code_cells(path) if "parameters" not in tags))


def parameters_of(path) -> dict[str, Parameter]:
    """Name, default and type of each parameter, read from the code cell tagged `parameters` without running it.

    The cell holds plain assignments of literals, annotated (`k: int = 32`) or not; ValueError for anything else.
    """
    found = {}
    cell = next((source for tags, source in code_cells(path) if "parameters" in tags), "")
    for line in ast.parse(cell).body:
        try:
            (target,) = [line.target] if isinstance(line, ast.AnnAssign) else line.targets
            name, default = target.id, ast.literal_eval(line.value)
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"{path}, parameters cell: {ast.unparse(line)!r} is not `name = literal`") from None
        declared = ast.unparse(line.annotation) if isinstance(line, ast.AnnAssign) else type_of(default)
        if not TYPES.fullmatch(declared):
            raise ValueError(f"{path}, parameters cell: {name} is {declared}, which papermill cannot pass")
        found[name] = Parameter(checked(name, default, declared), declared)
    return found


def type_of(value) -> str:
    if isinstance(value, list) and value:
        kinds = {type(item) for item in value}
        kind = float if kinds == {int, float} else next(iter(kinds)) if len(kinds) == 1 else None
        return f"list[{kind.__name__}]" if kind in (bool, int, float, str) else "list"
    return type(value).__name__


def checked(name, value, declared):
    """The value as papermill may pass it, an int made a float where one is declared; TypeError if it has another type."""
    kind, _, element = declared.rstrip("]").partition("[")
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value).__name__ != kind:
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}, but {name} is declared {declared}")
    return [checked(f"{name}[{i}]", item, element) for i, item in enumerate(value)] if element else value


def declared(path, names) -> dict[str, Parameter]:
    """A notebook's parameters; KeyError if one of the names is not among them."""
    found = parameters_of(path)
    for name in names:
        if name not in found:
            raise KeyError(f"{Path(path).stem} has no parameter {name!r}{near(name, found)}: it has {', '.join(found)}")
    return found


def check_parameters(path, params) -> dict:
    """Some of a notebook's parameters, checked: KeyError for a name it does not declare, TypeError for a wrong type."""
    known = declared(path, params)
    return {name: checked(name, value, known[name].type) for name, value in params.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Identity
# ---------------------------------------------------------------------------------------------------------------------


def input_hashes(params) -> dict:
    """Hashes of the text and of the language model that the parameters name, None where they name none."""
    return {
        "corpus": corpus_hash(params["dataset"]) if "dataset" in params else None,
        "model": model_hash(params["model"]) if "model" in params else None,
    }


def run_id(path, params) -> str:
    """12 hex digits naming what determines the result: notebook code, parameters but for `output_dir`, text and model."""
    identity = {name: value for name, value in params.items() if name != "output_dir"}
    return digest([notebook_hash(path), identity, input_hashes(params)], 12)


def run_dir(path, params) -> Path:
    """`<output_dir>/<notebook>/<run_id>`; no output_dir means `$SAE_UTILS_OUTPUT` (tests), or `outputs/`."""
    base = params.get("output_dir") or os.environ.get("SAE_UTILS_OUTPUT") or OUTPUTS
    return Path(base).expanduser().resolve() / Path(path).stem / run_id(path, params)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """A run's directory and manifest. `start_run` makes the one in progress, `find_run` and `require` finished ones."""

    def __init__(self, directory, manifest):
        self.dir, self.manifest = Path(directory), manifest
        self.name, self.id = manifest["notebook"], manifest["run_id"]
        self.parameters = manifest["parameters"]
        self.saes = self.dir / "saes"

    @property
    def metrics(self) -> dict:
        return read_json(self.dir / "metrics.json")

    def sae(self, name):
        """One of the SAEs that the run saved, by its name."""
        from .store import load_sae

        return load_sae(self.saes / name)

    def stale(self) -> str:
        """Why the run no longer is what its code would give, or `""`."""
        if changed := changed_sources(self.manifest["sources"]):
            return f"made by other sae_utils sources ({changed})"
        for required, made_by in self.manifest["requires"].items():
            path = notebooks_dir() / f"{required.split('/')[0]}.ipynb"
            if changed := changed_sources(made_by["sources"]):
                return f"required {required}, which other sae_utils sources made ({changed})"
            if not path.is_file() or made_by["code"] != notebook_hash(path):
                return f"required {required}, whose notebook has changed since"
        return ""

    def figure(self, figure, name) -> None:
        """Save a matplotlib figure as `figures/<name>.png`."""
        with replacing(self.dir / "figures" / f"{name}.png") as new:
            figure.savefig(new, format="png", dpi=FIGURE_DPI, bbox_inches="tight")

    def checkpoint(self, name) -> Path:
        """Where training keeps its checkpoint of this name; gone once the run finishes."""
        return self.dir / "checkpoints" / name

    def record(self, required) -> None:
        """Remember that this run used another one, and whatever that one used."""
        made_by = {key: required.manifest[key] for key in ("sources", "code")}
        requires = self.manifest["requires"] | required.manifest["requires"]
        self.manifest["requires"] = requires | {f"{required.name}/{required.id}": made_by}
        write_json(self.dir / "manifest.json", self.manifest)

    def finish(self, metrics: dict) -> None:
        """Write `metrics.json` (no times: equal seeds give equal bytes) and mark the run as finished."""
        if "torch" in sys.modules and not self.seeded_torch:
            raise RuntimeError("torch was imported after start_run, so the seed never reached it: import it before")
        write_json(self.dir / "metrics.json", plain(metrics))
        modules = {
            name.removeprefix("sae_utils.").replace(".", "/") for name in sys.modules if name.startswith("sae_utils.")
        }
        loaded = {f"{module}{end}" for module in modules for end in (".py", "/__init__.py")}
        sources = {name: value for name, value in self.manifest["sources"].items() if name in loaded}
        seconds = round(time.monotonic() - self.started, 2)
        self.manifest |= {"finished": True, "sources": sources, "wall_seconds": seconds}
        write_json(self.dir / "manifest.json", self.manifest)
        shutil.rmtree(self.dir / "checkpoints", ignore_errors=True)
        self.lock.release()


def changed_sources(made_by: dict) -> str:
    """Those of the source files that are no longer as they were, `"sae.py, lm.py"`, or `""`."""
    now = source_hashes()
    return ", ".join(name for name, value in made_by.items() if now.get(name) != value)


def start_run(name: str, namespace: dict) -> Run:
    """Begin the run of notebook `name` with the parameters as they now stand in `namespace` (pass `globals()`).

    Values injected by papermill and values changed by hand count alike. They are checked (TypeError), the random generators
    of Python, NumPy and torch are seeded, and the run's directory is made. The unfinished run of the same sources
    keeps its checkpoints, to be resumed; any other content there was is dropped.
    Raises RuntimeError if another kernel is in the middle of this very run.
    """
    global _current
    path = notebook_path(name)
    missing = [parameter for parameter in parameters_of(path) if parameter not in namespace]
    if missing:
        raise NameError(f"{name}: {', '.join(missing)} not set. Run the parameters cell first.")
    params = check_parameters(path, {parameter: namespace[parameter] for parameter in parameters_of(path)})
    seed = params.get("seed", 0)
    random.seed(seed)
    np.random.seed(seed)
    device = "cpu"
    if torch := sys.modules.get("torch"):  # a notebook without it is not made to load it
        from .lm import resolve_device

        torch.manual_seed(seed)
        device = resolve_device(params.get("device", "auto"))

    directory = run_dir(path, params)
    if _current:
        _current.lock.release()
    # Held until the run finishes or this process ends. The sweep's own lock is not enough: a kernel outlives a killed sweep.
    kernel_lock = lock(directory / "kernel")
    try:
        kernel_lock.acquire(timeout=KERNEL_WAIT)
    except Timeout:
        raise RuntimeError(
            f"another kernel is in the middle of this run ({directory}): let it finish, or restart it; "
            f"other parameters, such as another seed, make another run"
        ) from None
    manifest = {
        "notebook": name,
        "run_id": directory.name,
        "parameters": params,
        "seed": params.get("seed"),
        "finished": False,
        "requires": {},
        "code": notebook_hash(path),
        "sources": source_hashes(),  # `finish` leaves those that were loaded
        **{f"{kind}_hash": value for kind, value in input_hashes(params).items()},
        "device": device,
        **environment(),
    }
    old = directory / "manifest.json"
    before = read_json(old) if old.exists() else None
    if before is None or before["finished"] or before["sources"] != manifest["sources"]:
        for part in ("checkpoints", "saes", "figures"):
            shutil.rmtree(directory / part, ignore_errors=True)
    write_json(directory / "manifest.json", manifest)
    (directory / "metrics.json").unlink(missing_ok=True)

    _current = Run(directory, manifest)
    _current.lock, _current.seeded_torch, _current.started = kernel_lock, bool(torch), time.monotonic()
    return _current


def current_run() -> Run | None:
    """The run that this process last started."""
    return _current


def find_run(name: str, params: dict, needs_saes: bool = True) -> Run | None:
    """The finished run of a notebook with all these parameters, stale or not (a fresh one first), or None.

    Where its SAEs are not needed, the manifests and metrics committed under `outputs/reference/runs/` count too.
    """
    directory = run_dir(notebook_path(name), params)
    places = [directory] if needs_saes else [directory, REFERENCE / name / directory.name]
    manifests = [(place, read_json(place / "manifest.json")) for place in places if (place / "manifest.json").exists()]
    found = [Run(place, manifest) for place, manifest in manifests if manifest["finished"]]
    return min(found, key=lambda run: bool(run.stale()), default=None)


def environment() -> dict:
    """Commit, versions and machine. Versions come from the packages' metadata: nothing is imported for them."""

    def git(*command):
        try:
            return subprocess.check_output(["git", "-C", ROOT, *command], text=True, stderr=subprocess.DEVNULL).strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    torch = sys.modules.get("torch")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "platform": platform.platform(),
        "threads": torch.get_num_threads() if torch else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }


def plain(value, name="metrics"):
    """What JSON can hold: scalars and arrays of NumPy and torch as Python numbers and lists, NaN and infinity as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{name} is of type {type(value).__name__}: metrics are numbers, strings, lists and dicts of them")
