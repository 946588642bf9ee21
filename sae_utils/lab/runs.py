"""One run of a notebook: its parameters, its identity, its directory and its manifest.

A run lives in `<output_dir>/<notebook>/<run_id>/`: `manifest.json` says how it was made and whether it `finished`,
`metrics.json` what came out, `saes/`, `figures/` and `checkpoints/` hold the rest. `run_id` names what determines the
result: the notebook's code, its parameters, the text and the language model. The Python sources are not in it: the manifest
has a hash of every module that the run loaded, and a run made by other sources is found, and known to be *stale*.

Imports no torch, so that the sweep runner can use it.
"""

import contextlib
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from filelock import Timeout

from ..activations.model_files import model_hash
from ..activations.text import corpus_hash
from ..code import code_hash, source_hashes
from ..files import OUTPUTS, PACKAGE, ROOT, digest, lock, read_table, replacing, write_json
from .parameters import (
    check_parameters,
    check_together,
    notebook_hash,
    notebook_path,
    notebooks,
    parameters_of,
    resolve,
)

REFERENCE = OUTPUTS / "reference" / "runs"
PACKAGES = ["torch", "transformer-lens", "transformers", "numpy"]
FIGURE_DPI = 130  # a 7-inch figure fills the width of a README
KERNEL_WAIT = 10  # seconds; the kernel of a killed sweep outlives it by one or two
DAMAGED = (OSError, OverflowError, ValueError)  # what reading a damaged file raises
MANIFEST = {  # what every manifest holds, and what is needed of each run in its `requires`
    "notebook": str, "run_id": str, "parameters": dict, "finished": bool, "requires": dict, "code": str, "sources": dict
}  # fmt: skip
_current = None


# ---------------------------------------------------------------------------------------------------------------------
# Identity
# ---------------------------------------------------------------------------------------------------------------------
def input_hashes(params) -> dict:
    """Hashes of the text and of the language model that the parameters name, None where they name none."""
    config = [params["dataset_config"]] if params.get("dataset_config") else []
    return {
        "corpus": corpus_hash(params["dataset"], *config) if "dataset" in params else None,
        "model": model_hash(params["model"]) if "model" in params else None,
    }


def run_id(path, params) -> str:
    """12 hex digits naming what determines the result: notebook code, parameters but for `output_dir`, text and model."""
    identity = {name: value for name, value in params.items() if name != "output_dir"}
    return digest([notebook_hash(path), identity, input_hashes(params)], 12)


def run_dir(path, params) -> Path:
    """`<output_dir>/<notebook>/<run_id>`, see `output_dir`."""
    return output_dir(params.get("output_dir", "")) / Path(path).stem / run_id(path, params)


def output_dir(given: str = "") -> Path:
    """Where runs go: the directory given, else `$SAE_UTILS_OUTPUT` (tests), else `outputs/`. `~` is the home directory."""
    return Path(given or os.environ.get("SAE_UTILS_OUTPUT") or OUTPUTS).expanduser().resolve()


def current_hash(file: str) -> str:
    """The hash of a source file as it is: of sae_utils, by its name there, or another one, by its path; `""` if it is gone."""
    if file in source_hashes() or not os.path.isfile(file):
        return source_hashes().get(file, "")
    return code_hash(Path(file).read_text(encoding="utf-8", errors="replace"))


def loaded_code() -> dict[str, str]:
    """{file: hash} of the modules that this process loaded and that are not installed: those of sae_utils, and the user's own."""
    found, not_own = [], [Path(place).resolve() for place in (sys.prefix, sys.base_prefix, PACKAGE)]
    for name, module in [*sys.modules.items()]:
        file = Path(getattr(module, "__file__", None) or "").resolve()
        if name.startswith("sae_utils."):
            found.append(file.relative_to(PACKAGE).as_posix())
        elif file.suffix == ".py" and file.is_file() and not re.search("(site|dist)-packages", str(file)):
            found += [] if any(file.is_relative_to(place) for place in not_own) else [str(file)]
    return {file: current_hash(file) for file in found}


def outdated(name: str, made_by: dict) -> str:
    """What of the code that made a run of notebook `name` means something else now, or `""`.

    made_by: its `sources`, its `code` and, where it was required, the parameters that were `asked` for and those it had: what is
    not asked for comes from the sweep in force, or is a default.
    """
    if changed := [file for file, made in made_by["sources"].items() if current_hash(file) != made]:
        return f"made by other sources: {', '.join(changed)}"
    if name not in notebooks() or notebook_hash(notebook_path(name)) != made_by["code"]:
        return "its notebook has changed since"
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # one of them is no parameter any more
        if "asked" not in made_by or resolve(name, made_by["asked"]) == made_by["parameters"]:
            return ""
    return "the sweep or the notebook's defaults now give other parameters"


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
        return read_table(self.dir / "metrics.json")

    def sae(self, name):
        """One of the SAEs that the run saved, by its name."""
        from ..saes.files import load_sae

        try:
            return load_sae(inside(self.saes, name))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{error}. Delete {self.dir}, and the run is made again") from None

    def stale(self) -> str:
        """Why the run no longer is what its code would give, or `""`."""
        if why := outdated(self.name, self.manifest):
            return why
        for required, made_by in self.manifest["requires"].items():
            if why := outdated(required.partition("/")[0], made_by):
                return f"required {required}: {why}"
        return ""

    def state(self) -> str:
        """`"unfinished"`, `"stale (why)"` or `"finished"`."""
        why = self.manifest["finished"] and self.stale()
        return f"stale ({why})" if why else "finished" if self.manifest["finished"] else "unfinished"

    def figure(self, figure, name) -> None:
        """Save a matplotlib figure as `figures/<name>.png`."""
        with replacing(inside(self.dir / "figures", f"{name}.png")) as new:
            figure.savefig(new, format="png", dpi=FIGURE_DPI, bbox_inches="tight")

    def checkpoint(self, name) -> Path:
        """Where training keeps its checkpoint of this name; gone once the run finishes."""
        return inside(self.dir / "checkpoints", name)

    def record(self, required, asked: dict) -> None:
        """Remember that this run used another one, which parameters it `asked` for, and whatever that one used."""
        made_by = {key: required.manifest[key] for key in ("sources", "code", "parameters")} | {"asked": asked}
        self.manifest["requires"] |= required.manifest["requires"] | {f"{required.name}/{required.id}": made_by}
        write_json(self.dir / "manifest.json", self.manifest)

    def finish(self, metrics: dict) -> None:
        """Write `metrics.json` (no times: equal seeds give equal bytes) and mark the run as finished."""
        if "torch" in sys.modules and not self.seeded_torch:
            raise RuntimeError("torch was imported after start_run, so the seed never reached it: import it before")
        write_json(self.dir / "metrics.json", plain(metrics))
        self.manifest |= {
            "finished": True,
            "sources": loaded_code(),
            "wall_seconds": round(time.monotonic() - self.started, 2),
            "peak_memory": peak_memory(),
        }
        write_json(self.dir / "manifest.json", self.manifest)
        shutil.rmtree(self.dir / "checkpoints", ignore_errors=True)
        self.lock.release()


def inside(directory: Path, name: str) -> Path:
    """A file or directory of this name right in a directory; ValueError for a name that would lead out of it."""
    if not isinstance(name, str) or "\0" in name or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} cannot name what is saved in {directory}: it has to be one name without / in it")
    return directory / name


def start_run(name: str, namespace: dict) -> Run:
    """Begin the run of notebook `name` with the parameters as they now stand in `namespace` (pass `globals()`).

    Values injected by papermill and values changed by hand count alike. They are checked (TypeError), the random generators
    of Python, NumPy and torch are seeded, and the run's directory is made. The unfinished run of the same sources
    keeps its checkpoints, to be resumed; any other content there was is dropped.
    Raises RuntimeError if another kernel is in the middle of this very run.

    >>> run = start_run("01_train_topk", defaults("01_train_topk"))
    >>> run.finish({"fvu": 0.1})
    """
    global _current
    path = notebook_path(name)
    declared = parameters_of(path)
    if missing := [parameter for parameter in declared if parameter not in namespace]:
        raise NameError(f"{name}: {', '.join(missing)} not set. Run the parameters cell first.")
    params = check_together(name, check_parameters(path, {parameter: namespace[parameter] for parameter in declared}))
    seed = params.get("seed", 0)
    random.seed(seed)
    np.random.seed(seed)
    device = "cpu"
    if torch := sys.modules.get("torch"):  # a notebook without it is not made to load it
        from ..device import resolve_device

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
    before = whole_run(directory)
    if before is None or before.manifest["finished"] or before.manifest["sources"] != manifest["sources"]:
        for part in ("checkpoints", "saes", "figures"):
            remove(directory / part)
    write_json(directory / "manifest.json", manifest)
    remove(directory / "metrics.json")

    _current = Run(directory, manifest)
    _current.lock, _current.seeded_torch, _current.started = kernel_lock, bool(torch), time.monotonic()
    return _current


def current_run() -> Run | None:
    """The run that this process last started."""
    return _current


def remove(path: Path) -> None:
    """Delete whatever is there: a file, a directory with all in it, a link but not what it leads to, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_at(directory) -> Run:
    """The run that a directory holds, finished or not.

    OSError or ValueError, with the path, if its manifest or metrics are missing, damaged, incomplete or another run's.
    """
    path = Path(directory) / "manifest.json"
    manifest = read_table(path)
    kinds = MANIFEST | ({"wall_seconds": (int, float)} if manifest.get("finished") else {})
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    for made_by in [] if wrong else manifest["requires"].values():
        if not isinstance(made_by, dict) or not isinstance(made_by.get("sources"), dict) or "code" not in made_by:
            wrong = ["requires"]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} missing or damaged. Delete it, and the run will be made again.")
    if (manifest["notebook"], manifest["run_id"]) != (path.parent.parent.name, path.parent.name):
        raise ValueError(f"{path} is of {manifest['notebook']!r}, run {manifest['run_id']!r}: it does not belong here")
    if manifest["finished"]:
        read_table(path.with_name("metrics.json"))
    return Run(directory, manifest)


def whole_run(directory) -> Run | None:
    """`run_at`, or None if there is no run; one that is damaged counts as missing, with a warning."""
    if not os.path.lexists(Path(directory) / "manifest.json"):
        return None
    try:
        return run_at(directory)
    except DAMAGED as error:
        warnings.warn(f"{in_words(error)} (This run counts as missing.)")
        return None


def find_run(name: str, params: dict, needs_saes: bool = True) -> Run | None:
    """The finished run of a notebook with all these parameters, stale or not (a fresh one first), or None.

    Where its SAEs are not needed, the manifests and metrics committed under `outputs/reference/runs/` count too.
    """
    directory = run_dir(notebook_path(name), params)
    places = [directory] if needs_saes else [directory, REFERENCE / name / directory.name]
    found = [run for run in map(whole_run, places) if run and run.manifest["finished"]]
    return min(found, key=lambda run: bool(run.stale()), default=None)


@contextlib.contextmanager
def plain_warnings():
    """Warnings as lines of a command's output, each once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("once", category=UserWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr, flush=True)
        yield


def in_words(error: Exception) -> str:
    """What an error says to a person: its message, which a KeyError would show in quotes."""
    return str(error.args[0]) if isinstance(error, KeyError) else str(error)


def environment() -> dict:
    """Commit, versions and machine. Versions come from the packages' metadata: nothing is imported for them."""
    from importlib.metadata import version  # `--list`, which needs none, is quicker without

    def git(*command):
        try:
            return subprocess.check_output(["git", "-C", ROOT, *command], text=True, stderr=subprocess.DEVNULL).strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    torch = sys.modules.get("torch")
    versions = {package: version(package) for package in PACKAGES}
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "threads": torch.get_num_threads() if torch else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }


def peak_memory() -> int | None:
    """Bytes of this process's largest resident set; None where the system does not count them (Windows)."""
    with contextlib.suppress(OSError):  # Linux: `getrusage` counts what the process that started this one held, too
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plain(value):
    """Scalars and arrays of NumPy and torch as Python numbers and lists, NaN and infinity as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
