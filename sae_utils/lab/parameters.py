"""Notebooks and their parameters: read without running, checked by name, type and range before a kernel starts.

Imports no torch, so that the sweep runner can use it.
"""

import ast
import difflib
import functools
import itertools
import os
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..activations.model_files import find_model
from ..code import code_hash
from ..files import ROOT, read_json, read_table
from ..values import near, real, whole

TIER = "SAE_UTILS_TIER"  # the environment variable that names the sweep in force
TYPES = re.compile(r"(bool|int|float|str)|list\[(bool|int|float|str)\]")


class Parameter(NamedTuple):
    default: Any
    type: str  # "bool", "int", "float", "str", "list[int]", ...: as declared, else that of the default


# ---------------------------------------------------------------------------------------------------------------------
# Notebooks and their parameters
# ---------------------------------------------------------------------------------------------------------------------
def notebooks_dir() -> Path:
    """Where notebooks are: `$SAE_UTILS_NOTEBOOKS` (tests), or `notebooks/` of the repository."""
    return Path(os.environ.get("SAE_UTILS_NOTEBOOKS") or ROOT / "notebooks").expanduser().resolve()


def notebooks() -> dict[str, Path]:
    """{name: file} of the chapters and, behind them, of the studies; ValueError if two have one name."""
    found = {}
    for pattern in ("*.ipynb", "studies/*.ipynb"):
        for file in sorted(notebooks_dir().glob(pattern)):
            if file.stem in found:
                raise ValueError(f"{file.stem} is a chapter and a study of {notebooks_dir()}: rename one of them")
            found[file.stem] = file
    return found


def notebook_path(name: str) -> Path:
    """The file of a notebook given by its name, such as `"01_train_topk"`; FileNotFoundError lists those there are."""
    found = notebooks()
    if name not in found:  # a path such as "../other" is none of them
        there = ", ".join(found) or "no notebook"
        raise FileNotFoundError(f"no notebook {name!r} in {notebooks_dir()}{near(name, found)}: it has {there}")
    return found[name]


def code_cells(path) -> list[tuple[list[str], str]]:
    """(tags, source) of every code cell; ValueError for a file that is no notebook."""
    try:
        cells = [cell for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
        return [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in cells]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no Jupyter notebook of format 4 ({error!r}): convert or remove it") from None


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
        kinds = {type_of(item) for item in value}
        return f"list[{'float' if kinds == {'int', 'float'} else ' | '.join(sorted(kinds))}]"
    return type(value).__name__


def checked(name, value, declared):
    """The value as papermill may pass it: numbers of NumPy become Python's, an int becomes a float where one is declared.

    Raises TypeError if it has another type, ValueError for NaN and infinity.
    """
    kind, _, element = declared.rstrip("]").partition("[")
    if isinstance(value, np.generic):
        value = value.item()
    if kind == "float" and type(value) in (int, float):
        value = real(name, value)
    if type(value).__name__ != kind:
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}, but {name} is declared {declared}")
    return [checked(f"{name}[{i}]", item, element) for i, item in enumerate(value)] if element else value


def in_range(name, value):
    """The value, each item of a list, as the rule of this name in `RULES` allows it; ValueError if it does not."""
    rule = RULES.get(name)
    if rule and value == []:
        raise ValueError(f"{name}=[]: it needs at least one value")
    if rule and isinstance(value, list):
        return [rule(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return rule(name, value) if rule else value


def like(name, value, pattern: str, such_as: str) -> str:
    if not re.fullmatch(pattern, value):
        raise ValueError(f"{name}={value!r}: it has to be such as {such_as}")
    return value


RULES = dict.fromkeys(
    """n_tokens n_eval_tokens n_rule_tokens n_latents n_contexts n_prompt n_new n_layer n_head d_sae d_wide d_vocab d_model
    k ks widths batch_rows""".split(),
    whole,
) | {  # what a parameter of this name can be in any notebook, each item where it is a list
    "seed": functools.partial(whole, least=0, most=2**32 - 1),
    "n_ctx": functools.partial(whole, least=2),
    "batch_size": functools.partial(whole, least=2),
    "latent": functools.partial(whole, least=-1),
    "lr": functools.partial(real, above=0),
    "coefficients": functools.partial(real, above=0),
    "beta": functools.partial(real, least=0),
    "tune_share": functools.partial(real, above=0, most=0.99),
    "text_field": functools.partial(like, pattern=".+", such_as="'text', the name of a column"),
    "device": functools.partial(like, pattern=r"auto|cpu|mps|cuda(:\d+)?", such_as="'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"),
    "hook_name": functools.partial(
        like, pattern=r"(?!blocks\.\D)([\w-]+\.)*hook_\w+", such_as="'blocks.3.hook_resid_pre' or 'blocks.0.attn.hook_z'"
    ),
}  # fmt: skip


def check_together(name: str, p: dict) -> dict:
    """All parameters of a run of notebook `name`, as they are, if they fit together and fit the language model.

    Of the model only its config.json is read, where it is local. Raises ValueError naming parameter, value and what is allowed.
    """

    def need(parameter, allowed, because):
        if parameter in p and not allowed(p[parameter]):
            raise ValueError(f"{name}: {parameter}={p[parameter]!r}: {because}")

    widths = {key: np.min(p[key]) for key in ("d_sae", "d_wide", "widths") if key in p}
    if widths:
        narrowest = min(widths, key=widths.get)
        for key in ("k", "ks"):
            most = f"active latents per token are at most {narrowest}={p[narrowest]}"
            need(key, lambda k: np.max(k) <= widths[narrowest], most)
    for key, least in {"coefficients": 2, "widths": 3}.items():
        need(key, lambda v: len(set(v)) == len(v) >= least, f"it needs at least {least} values, all different")
    n_layers, n_ctx = (None, None) if p.get("retrain") else shape_of(p.get("model", ""))
    if n_layers and (found := re.match(r"blocks\.(\d+)\.", p.get("hook_name", ""))):
        need("hook_name", lambda _: int(found[1]) < n_layers, f"{p['model']} has layers 0 to {n_layers - 1}")
    if n_ctx:
        for key in ("n_tokens", "n_eval_tokens", "n_rule_tokens"):
            need(key, lambda n: n >= n_ctx, f"less than one row of the model's context of {n_ctx} tokens")
        longest = n_ctx - p.get("n_new", 0)
        room = f"beside n_new={p.get('n_new')} the model's context has room for {longest} tokens"
        need("n_prompt", lambda n: n <= longest, room)
        if "n_tokens" in p:
            there = p["n_tokens"] // n_ctx * (n_ctx - 1)
            need("batch_size", lambda n: n <= there, f"n_tokens={p['n_tokens']:,} give {there:,} activations")
    return p


def shape_of(model: str) -> tuple[int | None, int | None]:
    """(layers, context) of a local model, each None where its config.json does not say it; of a hub name nothing."""
    directory = find_model(model) if model else None
    config = read_table(directory / "config.json") if directory else {}
    names = ("n_layer", "num_hidden_layers", "num_layers"), ("n_positions", "max_position_embeddings")
    n_layers, n_ctx = (next((config[key] for key in keys if config.get(key)), None) for keys in names)
    return n_layers, n_ctx


def declared_in(path, names) -> dict[str, Parameter]:
    """A notebook's parameters; KeyError if one of the names is not among them."""
    found = parameters_of(path)
    for name in names:
        if name not in found:
            raise KeyError(f"{Path(path).stem} has no parameter {name!r}{near(name, found)}: it has {', '.join(found)}")
    return found


def check_parameters(path, params) -> dict:
    """Some of a notebook's parameters, checked: KeyError for a name it does not declare, else as `checked` and `in_range`."""
    known = declared_in(path, params)
    return {name: in_range(name, checked(name, value, known[name].type)) for name, value in params.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Sweep files
# ---------------------------------------------------------------------------------------------------------------------
def read_sweep(path) -> dict[str, dict]:
    """The tables of a sweep file, checked: notebooks that exist, shared names that some notebook declares."""
    try:
        tables = tomllib.loads(Path(path).read_text())
    except OSError as error:
        why = "no such sweep file" if isinstance(error, FileNotFoundError) else error.strerror
        raise FileNotFoundError(f"{path}: {why}{instead_of(path)}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}{instead_of(path)}") from None
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {table!r} stands outside of a table; write it under [shared] or [NOTEBOOK]")
        if table != "shared":
            notebook_path(table)
    shared = tables.get("shared", {})
    names = set(tables) - {"shared"} or notebooks()
    declared = {name for notebook in names if shared for name in parameters_of(notebook_path(notebook))}
    for name in shared:
        if name not in declared:
            raise KeyError(f"{path}, [shared]: no notebook declares {name!r}{near(name, declared)}")
    return tables


def instead_of(path) -> str:
    """The command that was meant, as far as the name of what is no sweep file shows it."""
    commands = {name: f"run {name}" for name in notebooks()}
    if not Path(path).exists():
        commands |= {file.stem: os.path.relpath(file) for file in (ROOT / "sweeps").glob("*.toml")}
    found = difflib.get_close_matches(Path(path).stem, commands, 1)
    return f". Did you mean `python -m sae_utils.sweep {commands[found[0]]}`?" if found else ""


def combinations(tables, name: str) -> list[dict]:
    """The parameters that a sweep sets for one notebook: one dict for each run, swept lists as their product."""
    own = tables.get(name, {})
    declared = declared_in(notebook_path(name), own)
    values = {key: value for key, value in tables.get("shared", {}).items() if key in declared} | own
    axes = []
    for key, value in values.items():
        swept = type(value) is list and not declared[key].type.startswith("list")
        axes.append(value if swept else [value])
        if not axes[-1]:
            raise ValueError(f"{name}: {key} = [] leaves nothing to run")
        if any(item in axes[-1][:i] for i, item in enumerate(axes[-1])):
            raise ValueError(f"{name}: {key} = {value} holds a value twice: each is one run")
    return [check_parameters(notebook_path(name), dict(zip(values, point))) for point in itertools.product(*axes)]


def planned(path) -> list[tuple[str, dict]]:
    """(notebook, all parameters) of every run of a sweep, in order."""
    tables = read_sweep(path)
    points = [(name, point) for name in tables if name != "shared" for point in combinations(tables, name)]
    return [(name, check_together(name, defaults(name) | point)) for name, point in points]


def resolve(name: str, params: dict) -> dict:
    """All parameters of a run: those given, else those of the sweep in force, else the notebook's defaults."""
    tier = os.environ.get(TIER)
    in_force = combinations(read_sweep(tier), name)[0] if tier else {}
    return check_together(name, defaults(name) | in_force | check_parameters(notebook_path(name), params))


def defaults(name: str) -> dict:
    return {key: parameter.default for key, parameter in parameters_of(notebook_path(name)).items()}


def label(name: str, params: dict) -> str:
    """A run in a line: the notebook and the parameters that differ from its defaults."""
    usual = defaults(name) if name in notebooks() else {}
    changed = [f"{k}={v}" for k, v in params.items() if k != "output_dir" and (k not in usual or v != usual[k])]
    return " ".join([name, *changed])
