"""Executing a notebook with papermill: one run, its parameters, and the runs that it requires.

The sweep in force, a TOML file named by `$SAE_UTILS_TIER` (`sweep` says how it is read), gives the parameters of the runs that
`require` has to make (of a swept list the first). papermill only warns of a misspelt name and never checks a type, hence the
checks of `parameters`. Imports no torch, and papermill only to execute.
"""

import os
import re
import sys
import warnings
from pathlib import Path

from filelock import Timeout

from ..files import lock, read_json
from . import runs
from .parameters import check_parameters, defaults, label, notebook_path, parameters_of, resolve
from .runs import Run

SHARED = "model dataset dataset_config text_field bos hook_name n_tokens seed device output_dir".split()
TIME_LIMIT = 24 * 3600  # seconds for one cell, against a kernel that hangs
KEEP_STALE = "SAE_UTILS_KEEP_STALE"


class RunFailed(RuntimeError):
    """A notebook failed; the message holds the error, the cell and line, the parameters and the path of the executed part."""


def run(notebook: str, params=None, *, needs_saes=True, time_limit=TIME_LIMIT, tell: str | None = None) -> Run:
    """The finished run of a notebook, executed only if it is not there or stale.

    Parameters not given are those of the sweep in force, else the defaults. Of several processes that want the same run one
    executes it and the others wait. The executed notebook stays in the run's directory, also when it failed. What it warned of is
    warned of here too. tell: what opens the line and, on a terminal, the progress bar on standard error, such as "[2/9] "; None for none.
    Raises KeyError, TypeError or ValueError for bad parameters, RunFailed when a cell fails or takes more than `time_limit`
    seconds, or the kernel dies.
    """
    params = resolve(notebook, params or {})
    path, about = notebook_path(notebook), label(notebook, params)
    found = runs.find_run(notebook, params, needs_saes)
    if found and not found.stale():
        return found
    directory = runs.run_dir(path, params)
    executed, run_lock = directory / "notebook.ipynb", lock(directory / "run")
    try:
        held = run_lock.acquire(timeout=0)
    except Timeout:
        print(f"{about}: another process is executing it, waiting", flush=True)
        held = run_lock.acquire()
    with held:
        found = runs.find_run(notebook, params, needs_saes)
        why = found.stale() if found else ""
        if why and os.environ.get(KEEP_STALE):
            print(f"{about}: stale ({why}), kept", flush=True)
            return found
        if found and not why:
            return found
        now = f"{about}: stale ({why}), repeating it" if why else f"{about} is not there yet: executing it"
        if tell is None:
            print(now, flush=True)
        else:
            print(f"{tell}{now} in {directory}", file=sys.stderr, flush=True)
        error = execute(path, executed, params, time_limit, None if tell is None else f"{tell}{about}")
        for text in warned(executed):
            warnings.warn(f"{notebook}: {text}")
        if not error and (found := runs.find_run(notebook, params)):
            return found
    error = error or "it came to its end without run.finish(), or its inputs changed meanwhile"
    raise RunFailed(f"{about} failed: {error}\n  parameters: {params}\n  executed part: {executed}")


def execute(path: Path, output: Path, params: dict, time_limit: float, bar: str | None) -> str:
    """Execute a notebook into `output` with papermill; returns what went wrong, with the traceback of a failed cell, or `""`.

    A kernel that does not start is started once more; a cell is never repeated. The kernel works in the caller's directory,
    so that relative paths among the parameters mean the same to both.
    """
    import papermill

    usual = defaults(path.stem)
    changed = {key: value for key, value in params.items() if value != usual[key]}
    files = [str(file).replace("{", "{{").replace("}", "}}") for file in (path, output)]  # papermill fills in {k}
    for attempt in (1, 2):
        runs.remove(output)
        try:
            papermill.execute_notebook(
                *files,
                changed,
                kernel_name="python3",
                language="python",
                progress_bar=bar is not None and {"desc": bar, "leave": False, "disable": None},
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # else they warn of plain TCP, each one
                execution_timeout=time_limit,
            )
            return ""
        except papermill.PapermillExecutionError as error:
            says, _, _ = error.evalue.partition("\n")
            return f"{error.ename}: {says}{error}"
        except Exception as error:
            started = [c for c in executed_cells(output) if c["metadata"].get("papermill", {}).get("start_time")]
            if started or attempt == 2:
                at = "".join(started[-1]["source"]) if started else "the start of the kernel"
                return f"{type(error).__name__}: {error}\n  at: {at}"


def executed_cells(output: Path) -> list[dict]:
    """The cells of an executed notebook, none where there is no such file yet."""
    return read_json(output)["cells"] if output.exists() else []


def warned(output: Path) -> list[str]:
    """What an executed notebook warned of, each warning once, so that it does not stay in the notebook alone."""
    outputs = [out for cell in executed_cells(output) for out in cell.get("outputs", [])]
    text = "".join("".join(out["text"]) for out in outputs if out.get("name") == "stderr")
    return list(dict.fromkeys(re.findall(r"UserWarning: (.+)", text)))


def require(name: str, /, needs_saes: bool = True, **params) -> Run:
    """The finished run of another notebook, executed in a kernel of its own first if it is not there.

    Parameters not named are the caller's where shared (`SHARED`), else those of the sweep in force, else the
    notebook's defaults. The caller's manifest records the run. With `needs_saes=False` one that is
    committed as reference, which has metrics and a manifest but no SAEs, will do.

    >>> start_run("01_train_topk", defaults("01_train_topk")).finish({"fvu": 0.1})
    >>> require("01_train_topk", needs_saes=False).metrics  # what is finished is not run again
    {'fvu': 0.1}
    """
    caller = runs.current_run()
    declared = parameters_of(notebook_path(name))
    of_caller = caller.parameters if caller else {}
    inherited = {key: of_caller[key] for key in SHARED if key in of_caller and key in declared}
    asked = check_parameters(notebook_path(name), inherited | params)
    found = run(name, asked, needs_saes=needs_saes)
    if caller:
        caller.record(found, asked)
    return found
