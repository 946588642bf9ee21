"""Executing a notebook with papermill: one run, its parameters, and the runs that it requires.

The sweep in force, a TOML file named by `$SAE_UTILS_TIER` (`sweep` says how it is read), gives the parameters of the runs that
`require` has to make (of a swept list the first). papermill only warns of a misspelt name and never checks a type, hence the
checks here. Imports no torch, and papermill only to execute.
"""

import itertools
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from filelock import Timeout

from . import runs
from .files import lock, read_json
from .runs import Run, check_parameters, notebook_path, parameters_of
from .values import near

SHARED = ["model", "dataset", "hook_name", "n_tokens", "seed", "device", "output_dir"]
TIME_LIMIT = 24 * 3600  # seconds for one run, against a kernel that hangs
TIER, KEEP_STALE, PARENT = "SAE_UTILS_TIER", "SAE_UTILS_KEEP_STALE", "SAE_UTILS_PARENT"


class RunFailed(RuntimeError):
    """A notebook failed; the message holds its parameters, the cell's error and the path of the executed part."""


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def read_sweep(path) -> dict[str, dict]:
    """The tables of a sweep file, checked: notebooks that exist, shared names that some notebook declares."""
    try:
        tables = tomllib.loads(Path(path).read_text())
    except OSError:
        raise FileNotFoundError(f"{path}: no such sweep file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    declared = {name for file in runs.notebooks_dir().glob("*.ipynb") for name in parameters_of(file)}
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {table!r} stands outside of a table; write it under [shared] or [NOTEBOOK]")
        if table != "shared":
            notebook_path(table)
    for name in tables.get("shared", {}):
        if name not in declared:
            raise KeyError(f"{path}, [shared]: no notebook declares {name!r}{near(name, declared)}")
    return tables


def combinations(tables, name: str) -> list[dict]:
    """The parameters that a sweep sets for one notebook: one dict for each run, swept lists as their product."""
    own = tables.get(name, {})
    declared = runs.declared(notebook_path(name), own)
    values = {key: value for key, value in tables.get("shared", {}).items() if key in declared} | own
    swept = {key for key, value in values.items() if type(value) is list and not declared[key].type.startswith("list")}
    for key in swept:
        if not values[key]:
            raise ValueError(f"{name}: {key} = [] leaves nothing to run")
    axes = [value if key in swept else [value] for key, value in values.items()]
    return [check_parameters(notebook_path(name), dict(zip(values, point))) for point in itertools.product(*axes)]


def resolve(name: str, params: dict) -> dict:
    """All parameters of a run: those given, else those of the sweep in force, else the notebook's defaults."""
    path = notebook_path(name)
    tier = os.environ.get(TIER)
    in_force = combinations(read_sweep(tier), name)[0] if tier else {}
    defaults = {key: parameter.default for key, parameter in parameters_of(path).items()}
    return defaults | in_force | check_parameters(path, params)


def label(name: str, params: dict) -> str:
    """A run in a line: the notebook and the parameters that differ from its defaults."""
    defaults = parameters_of(notebook_path(name))
    changed = [f"{k}={v}" for k, v in params.items() if v != defaults[k].default and k != "output_dir"]
    return " ".join([name, *changed])


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def run(notebook: str, params=None, *, keep_stale=False, needs_saes=True, time_limit=TIME_LIMIT) -> Run:
    """The finished run of a notebook, executed only if it is not there or stale.

    Parameters not given are those of the sweep in force, else the defaults. Of several processes that want the same run one
    executes it and the others wait. The executed notebook stays in the run's directory, also when it failed.
    Raises KeyError or TypeError for bad parameters, RunFailed when a cell fails, the kernel dies or `time_limit`
    seconds are over.
    """
    params = resolve(notebook, params or {})
    path = notebook_path(notebook)
    directory = runs.run_dir(path, params)
    found = runs.find_run(notebook, params, needs_saes)
    if found and not found.stale():
        return found
    run_lock = lock(directory / "run")
    try:
        run_lock.acquire(timeout=0)
    except Timeout:
        print(f"{label(notebook, params)}: another process is executing it, waiting", flush=True)
        run_lock.acquire()
    try:
        if found := usable(notebook, params, keep_stale, needs_saes):
            return found
        error = execute(path, directory / "notebook.ipynb", params, time_limit)
        if not error:
            found = runs.find_run(notebook, params)
            error = "" if found else "it came to its end without run.finish(), or its inputs changed meanwhile"
    finally:
        run_lock.release()
    if error:
        raise RunFailed(
            f"{label(notebook, params)} failed: {error}\n"
            f"  parameters: {params}\n  executed part: {directory / 'notebook.ipynb'}"
        )
    return found


def usable(name: str, params: dict, keep_stale: bool, needs_saes: bool) -> Run | None:
    """The finished run, unless it is stale and stale ones are not kept; staleness is said in a line."""
    found = runs.find_run(name, params, needs_saes)
    if found and (why := found.stale()):
        keep_stale = keep_stale or bool(os.environ.get(KEEP_STALE))
        print(f"{label(name, params)}: stale ({why}), {'kept' if keep_stale else 'repeating it'}", flush=True)
        return found if keep_stale else None
    return found


def execute(path: Path, output: Path, params: dict, time_limit: float) -> str:
    """Execute a notebook into `output` with papermill; returns what went wrong, or `""`.

    A kernel that does not start is started once more; a cell is never repeated. The kernel works in the caller's directory,
    so that relative paths among the parameters mean the same to both.
    """
    import papermill

    defaults = parameters_of(path)
    changed = {key: value for key, value in params.items() if value != defaults[key].default}
    deadline = time.monotonic() + time_limit
    for attempt in (1, 2):
        output.unlink(missing_ok=True)
        try:
            papermill.execute_notebook(
                path,
                output,
                changed,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # else they warn of plain TCP, each one
                timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
            )
            return ""
        except papermill.PapermillExecutionError as error:
            return f"{error.ename}: {error.evalue}"
        except Exception as error:
            if attempt == 2 or reached_a_cell(output):
                if isinstance(error, TimeoutError):
                    return f"it took longer than {time_limit:.0f} s"
                return f"{type(error).__name__}: {error}"


def reached_a_cell(output: Path) -> bool:
    cells = read_json(output)["cells"] if output.exists() else []
    return any(cell["metadata"].get("papermill", {}).get("start_time") for cell in cells)


def require(name: str, /, needs_saes: bool = True, **params) -> Run:
    """The finished run of another notebook, executed in a process of its own first if it is not there.

    Parameters not named are the caller's where shared (`SHARED`), else those of the sweep in force, else the
    notebook's defaults. The caller's manifest records the run. With `needs_saes=False` one that is
    committed as reference, which has metrics and a manifest but no SAEs, will do.
    """
    caller = runs.current_run()
    declared = parameters_of(notebook_path(name))
    of_caller = caller.parameters if caller else {}
    inherited = {key: of_caller[key] for key in SHARED if key in of_caller and key in declared}
    params = resolve(name, inherited | params)
    found = usable(name, params, False, needs_saes)
    if found is None:
        in_force = resolve(name, {})
        command = ["run", name]
        for key, value in params.items():
            if value != in_force[key]:
                command += ["-p", key, value if isinstance(value, str) else json.dumps(value)]
        print(f"{label(name, params)} is not there yet: executing it", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "sae_utils.sweep", *command],
            env=os.environ | {PARENT: str(os.getpid())},
            capture_output=True,
            text=True,
        )
        found = runs.find_run(name, params)
        if done.returncode or not found:
            raise RunFailed(f"required by {caller.name if caller else 'you'}: {done.stderr.strip()}")
    if caller:
        caller.record(found)
    return found
