"""Executing a notebook with papermill: one run, its parameters, and the runs that it requires.

The sweep in force, a TOML file named by `$SAE_UTILS_TIER` (`sweep` says how it is read), gives the parameters of the runs that
`require` has to make (of a swept list the first). papermill only warns of a misspelt name and never checks a type, hence the
checks here. Imports no torch, and papermill only to execute.
"""

import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

from filelock import Timeout

from ..files import lock, read_json
from . import runs
from .parameters import check_parameters, code_cells, defaults, label, notebook_path, parameters_of, resolve
from .runs import Run

SHARED = "model dataset dataset_config text_field bos hook_name n_tokens seed device output_dir".split()
NOT_THERE = "is not there yet: executing it"
WARNED = "warning: "  # opens the line of a warning on standard error
LOG_EVERY = 60  # seconds between two lines on a run in a log; a terminal's one line changes every second
TIME_LIMIT = 24 * 3600  # seconds for one run, against a kernel that hangs
KEEP_STALE, PARENT = "SAE_UTILS_KEEP_STALE", "SAE_UTILS_PARENT"


class RunFailed(RuntimeError):
    """A notebook failed; the message holds the error, the cell and line, the parameters and the path of the executed part."""


def run(notebook: str, params=None, *, keep_stale=False, needs_saes=True, time_limit=TIME_LIMIT, tell=None) -> Run:
    """The finished run of a notebook, executed only if it is not there or stale.

    Parameters not given are those of the sweep in force, else the defaults. Of several processes that want the same run one
    executes it and the others wait. The executed notebook stays in the run's directory, also when it failed.
    tell: what opens the lines on standard error that say where the execution is, such as "[2/9] "; None for none.
    Raises KeyError, TypeError or ValueError for bad parameters, RunFailed when a cell fails, the kernel dies or
    `time_limit` seconds are over.
    """
    params = resolve(notebook, params or {})
    path = notebook_path(notebook)
    directory = runs.run_dir(path, params)
    found = runs.find_run(notebook, params, needs_saes)
    if found and not found.stale():
        return found
    executed, run_lock = directory / "notebook.ipynb", lock(directory / "run")
    try:
        held = run_lock.acquire(timeout=0)
    except Timeout:
        print(f"{label(notebook, params)}: another process is executing it, waiting", flush=True)
        held = run_lock.acquire()
    with held:
        if found := usable(notebook, params, keep_stale, needs_saes):
            return found
        if tell is not None:
            print(f"{tell}{label(notebook, params)}: executing it in {directory}", file=sys.stderr, flush=True)
        error = execute(path, executed, params, time_limit, None if tell is None else tell + notebook)
        for text in warned(executed):
            print(f"{WARNED}{text}", file=sys.stderr, flush=True)
        if not error and (found := runs.find_run(notebook, params)):
            return found
    error = error or "it came to its end without run.finish(), or its inputs changed meanwhile"
    about = f"  parameters: {params}\n  executed part: {executed}"
    raise RunFailed(f"{label(notebook, params)} failed: {error}\n{about}")


def usable(name: str, params: dict, keep_stale: bool, needs_saes: bool) -> Run | None:
    """The finished run, unless it is stale and stale ones are not kept; staleness is said in a line."""
    found = runs.find_run(name, params, needs_saes)
    if found and (why := found.stale()):
        keep_stale = keep_stale or bool(os.environ.get(KEEP_STALE))
        print(f"{label(name, params)}: stale ({why}), {'kept' if keep_stale else 'repeating it'}", flush=True)
        return found if keep_stale else None
    return found


class Place:
    """The code cell that is executed, counted as a reader counts: without the one that papermill adds, under its heading."""

    def __init__(self, path):
        self.total, self.number, self.heading, self.cell = len(code_cells(path)), 0, "", None
        self.start = self.since = time.monotonic()

    def __call__(self, cell, cell_index):
        """What nbclient calls before each cell, be it text or code."""
        if cell.cell_type == "markdown":
            text = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            self.heading = [self.heading, *re.findall(r"^#+ +(.+)", text, re.MULTILINE)][-1]
        elif cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", []):
            self.number += 1
            self.cell, self.since = cell, time.monotonic()

    def __str__(self):
        if not self.number:
            return "the start of the kernel"
        return f"code cell {self.number} of {self.total}" + (f" under {self.heading!r}" if self.heading else "")

    def line(self) -> str:
        """Where the execution is, since when, and the run that the cell has to wait for."""
        now = time.monotonic()
        run, cell = (datetime.timedelta(seconds=int(now - since)) for since in (self.start, self.since))
        outputs = self.cell.get("outputs", []) if self.cell else []
        last = "".join(output.get("text", "") for output in outputs).rstrip().rpartition("\n")[2]
        return f"{self}, {cell} of {run}" + (f". {last}" if last.endswith(NOT_THERE) else "")


@contextlib.contextmanager
def telling(about: str, place: Place):
    """Meanwhile say on standard error where the execution is: in one updating line on a terminal, else in a line a minute."""
    live, over = sys.stderr.isatty(), threading.Event()

    def tell():
        while not over.wait(1 if live else LOG_EVERY):
            width = shutil.get_terminal_size().columns - 1
            line = f"{about}: {place.line()}"
            print(f"\r{line[:width]:{width}}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if live:
            print(f"\r{'':{shutil.get_terminal_size().columns - 1}}\r", end="", file=sys.stderr, flush=True)


def execute(path: Path, output: Path, params: dict, time_limit: float, about: str | None = None) -> str:
    """Execute a notebook into `output` with papermill; returns what went wrong and in which cell, or `""`.

    A kernel that does not start is started once more; a cell is never repeated. The kernel works in the caller's directory,
    so that relative paths among the parameters mean the same to both. about: see `telling`; None tells nothing.
    """
    import papermill

    usual = defaults(path.stem)
    changed = {key: value for key, value in params.items() if value != usual[key]}
    files = [str(file).replace("{", "{{").replace("}", "}}") for file in (path, output)]  # papermill fills in {k}
    deadline = time.monotonic() + time_limit
    for attempt in (1, 2):
        runs.remove(output)
        place = Place(path)
        try:
            with contextlib.nullcontext() if about is None else telling(about, place):
                papermill.execute_notebook(
                    *files,
                    changed,
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # else they warn of plain TCP, each one
                    timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
                    on_cell_start=place,
                )
            return ""
        except papermill.PapermillExecutionError as error:
            says = f"{error.ename}: {error.evalue}" if error.evalue else error.ename
            return f"{says}\n  at: {place}{lines_of(error)}"
        except Exception as error:
            if attempt == 2 or reached_a_cell(output):
                if isinstance(error, TimeoutError):
                    return f"it took longer than {time_limit:.0f} s\n  at: {place}"
                return f"{type(error).__name__}: {error}\n  at: {place}"


def lines_of(error) -> str:
    """The failed cell's line, and the line that raised if it is another one, from the traceback that IPython writes."""
    text = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
    numbers = re.findall(rf"Cell In\[{error.exec_count}\], line (\d+)", text)
    lines = error.source.splitlines()
    found = [f", line {n}: {lines[int(n) - 1].strip()}" for n in numbers[:1] if 0 < int(n) <= len(lines)]
    raised = re.findall(r"^-+> (\d+) (.*)", text, re.MULTILINE)[-1:]
    found += [f"\n  in: line {n} of what it called: {line.strip()}" for n, line in raised if [n] != numbers[:1]]
    return "".join(found)


def warned(output: Path) -> list[str]:
    """What an executed notebook warned of, each warning once, so that it does not stay in the notebook alone."""
    outputs = [out for cell in executed_cells(output) for out in cell.get("outputs", [])]
    text = "".join("".join(out["text"]) for out in outputs if out.get("name") == "stderr")
    return list(dict.fromkeys(re.findall(r"UserWarning: (.+)", text)))


def reached_a_cell(output: Path) -> bool:
    return any(cell["metadata"].get("papermill", {}).get("start_time") for cell in executed_cells(output))


def executed_cells(output: Path) -> list[dict]:
    """The cells of an executed notebook, none where there is no such file yet."""
    return read_json(output)["cells"] if output.exists() else []


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
    asked = check_parameters(notebook_path(name), inherited | params)
    params = resolve(name, asked)
    found = usable(name, params, False, needs_saes)
    if found is None:
        print(f"{label(name, params)} {NOT_THERE}", flush=True)
        done = run_apart(name, params)
        for line in done.stderr.splitlines():
            if line.startswith(WARNED):
                warnings.warn(f"{name}: {line.removeprefix(WARNED)}")
        found = runs.find_run(name, params)
        if done.returncode or not found:
            raise RunFailed(f"required by {caller.name if caller else 'you'}: {done.stderr.strip()}")
    if caller:
        caller.record(found, asked)
    return found


def run_apart(name: str, params: dict, **environment: str) -> subprocess.CompletedProcess:
    """Execute a run in a process of its own, which ends when this one does."""
    in_force, command = resolve(name, {}), [sys.executable, "-m", "sae_utils.sweep", "run", name]
    for key, value in params.items():
        if value != in_force[key]:
            command += ["-p", key, value if isinstance(value, str) else json.dumps(value)]
    environment = os.environ | {PARENT: str(os.getpid())} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True)
