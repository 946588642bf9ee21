"""What makes a training this one and no other: hashes of data, weights, settings and code that are equal in every process.

Code counts by what it does: its bytecode without docstrings, comments and layout. So code without source (a notebook's cell,
`python -c`) counts as well, and under another minor version of Python it is other code. What a function takes from outside
(closure, defaults, globals) counts by value. Installed packages count by name, and `sae_utils` by the hashes of its sources
that a checkpoint keeps.
"""

import builtins
import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import re
import sys
import types
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor, nn

from ..code import code_hash
from ..files import digest

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, types.EllipsisType, PurePath, enum.Enum)
PLAIN += (torch.dtype, torch.device)
AROUND = (functools.partial, functools.cached_property, functools._lru_cache_wrapper)  # what stands around functions
AROUND += (property, staticmethod, classmethod, types.MethodType)
HOLD = ("func", "args", "keywords", "__func__", "__self__", "__wrapped__", "fget", "fset", "fdel")  # what it may hold
OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "_abc_impl"}
OF_CLASSES |= {"__firstlineno__", "__static_attributes__"}
OF_MODULES = {"training", "dead_after", "_parameters", "_buffers", "_modules"}  # what a checkpoint holds, or weights


def training_parts(jobs: dict, first: dict, settings: dict) -> dict[str, str]:
    """{part: hash} of a training: settings, first batch, and of each SAE its class, settings, weights and objective.

    Raises ValueError, naming it, if a value that an objective or a class uses cannot be told from others of its type.
    """
    parts = dict(settings) | {"the names of the SAEs": list(jobs), "the first batch": first}
    parts |= {f"the initial weights{of(name)}": sae.state_dict() for name, (sae, _) in jobs.items()}
    return {key: digest(stable(value, key)) for key, value in parts.items()} | fixed_parts(jobs)


def fixed_parts(jobs: dict) -> dict[str, str]:
    """The parts that training must not change: of each SAE its class, its settings and its objective."""
    values, known = {}, {}  # known: what training changes and a checkpoint holds, which counts by its name alone
    for name, (sae, _) in jobs.items():
        held = [*sae.named_modules(), *sae.state_dict(keep_vars=True).items()]
        known |= {id(one): f"{name}/{key}" for key, one in held}
    for name, (sae, objective) in jobs.items():
        func, bound = objective, {}
        while isinstance(func, functools.partial):
            bound = dict(enumerate(func.args)) | func.keywords | bound
            func = func.func
        values |= {f"{key} of the objective{of(name)}": value for key, value in bound.items()}
        values |= {f"the code of the objective{of(name)}": func, f"the class{of(name)}": type(sae)}
        values[f"the settings{of(name)}"] = settings_of(sae)
    return {key: digest(stable(value, key, dict(known))) for key, value in values.items()}


def check_fixed(jobs: dict, parts: dict) -> None:
    """ValueError if training has changed what it must not, so that a checkpoint would resume with the value of the start."""
    changed = [part for part, value in fixed_parts(jobs).items() if value != parts[part]]
    if changed:
        raise ValueError(
            f"checkpoint: {', '.join(changed)} changes while it trains, and a resumed training would begin with the old value. Put "
            f"what changes into a persistent buffer of the SAE (register_buffer), or train without checkpoint"
        )


def of(name: str) -> str:
    return f" of {name!r}" if name else ""


def settings_of(module: nn.Module) -> dict:
    """What a module and those in it hold beside weights: classes, attributes, hooks, what is frozen, buffers not saved.

    Of modules of other packages, a language model's say, the numbers and texts among their attributes.
    """
    found, saved = {}, module.state_dict()
    for place, part in module.named_modules():
        dot = f"{place}." if place else ""
        found[f"{dot}class"] = type(part) if place else None
        own = type(part).__module__.startswith("sae_utils.") or not installed(type(part).__module__)
        for key, value in vars(part).items():
            if "ward_" in key and "_hooks" in key:  # forward and backward, numbered through the process
                found[dot + key] = list(value.values())
            elif key not in OF_MODULES and "state_dict" not in key and (own or isinstance(value, PLAIN)):
                found[dot + key] = value
    found |= {f"{key} is trained": p.requires_grad for key, p in module.named_parameters()}
    return found | {key: value for key, value in module.named_buffers() if key not in saved}


def stable(value, where: str, seen: dict | None = None):
    """Nested lists of texts that are equal for equal values, in every process. `where` names the value in an error."""
    seen = {} if seen is None else seen
    inner = functools.partial(stable, seen=seen)
    kind = type(value)
    if isinstance(value, PLAIN):
        return [kind.__name__, repr(value)]
    if id(value) in seen:
        return ["again", seen[id(value)]]
    if isinstance(value, (type, types.FunctionType, nn.Module)):
        seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]
    if hasattr(value, "__array__") and not isinstance(value, type):  # a table too, whose text leaves digits out
        array = np.asarray(value)
        if array.dtype.hasobject:
            return [kind.__name__, inner(array.tolist(), where)]
        return ["array", str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    if isinstance(value, (set, frozenset, dict, list, tuple)):
        own = [kind, getattr(value, "__dict__", {})] if kind.__module__ != "builtins" else []
        own = [inner(v, where) for v in own]
        if isinstance(value, dict):
            return [kind.__name__, *([inner(k, where), inner(v, f"{k!r} in {where}")] for k, v in value.items()), *own]
        items = [inner(v, where) for v in value]
        return [kind.__name__, *(sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items), *own]
    if isinstance(value, AROUND):
        return [kind.__name__, *(inner(getattr(value, name, None), where) for name in HOLD)]
    if isinstance(value, types.ModuleType):
        if not getattr(value, "__file__", None) or installed(value.__name__):
            return ["module", value.__name__]
        return ["module", value.__name__, code_hash(inspect.getsource(value)), inner(plain(value), where)]
    if isinstance(value, types.FunctionType):
        return function(value, where, inner)
    if kind is types.BuiltinFunctionType and isinstance(value.__self__, (types.ModuleType, type, type(None))):
        return ["builtin", value.__module__, value.__qualname__]
    if isinstance(value, type):
        known = value.__module__ != "builtins" or hasattr(builtins, value.__qualname__)  # or made by exec
        if installed(value.__module__) and known:
            return ["class", value.__module__, value.__qualname__]
        own = {k: v for k, v in sorted(vars(value).items()) if k not in OF_CLASSES}
        if dataclasses.is_dataclass(value):  # its generated methods say nothing more than its fields
            own = {k: v for k, v in own.items() if not k.startswith("__") or k in ("__call__", "__annotations__")}
        return ["class", value.__qualname__, inner(value.__bases__, where), inner(own, f"class {value.__qualname__}")]
    if isinstance(value, nn.Module):
        return [inner(v, where) for v in (kind, settings_of(value), dict(value.state_dict()))]
    if dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace):
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()  # with __slots__ no attributes
        own = {f.name: getattr(value, f.name) for f in fields} | getattr(value, "__dict__", {})
        return [inner(kind, where), inner(own, where)]
    text = repr(value) if kind.__repr__ is not object.__repr__ else " at 0x"
    if re.search(r" at 0x[0-9a-f]*|\.\.\.", text):  # an address, or a text that leaves something out
        raise ValueError(
            f"checkpoint: {where} is of type {kind.__name__}, and its value cannot be told from another's, so a resumed training "
            f"might not be this one. Bind numbers, texts, tensors or arrays with functools.partial, give {kind.__name__} a "
            f"__repr__ that says all of its settings, or train without checkpoint"
        )
    return [inner(kind, where), text, {} if installed(kind.__module__) else inner(plain(value), where)]


def plain(value) -> dict:
    """The numbers and texts among the attributes of an object or a module, as they are now."""
    own = getattr(value, "__dict__", {})
    return {key: v for key, v in sorted(own.items()) if key[:2] != "__" and v is not None and isinstance(v, PLAIN)}


def function(f, where: str, inner) -> list:
    cells = zip(f.__code__.co_freevars, f.__closure__ or ())
    outside = {f"{n!r} in {f.__qualname__}": c.cell_contents for n, c in cells if c != types.CellType()}
    if installed(f.__module__):
        ours = f.__module__.split(".")[0] == "sae_utils"
        return ["function", f.__module__, f.__qualname__] + [inner(v, key) for key, v in outside.items() if ours]
    steps = list(bytecode(f.__code__))
    names = sorted({v for op, v in steps if op in ("LOAD_GLOBAL", "LOAD_NAME") and v in f.__globals__})
    outside |= {f"{name!r} in {f.__qualname__}": f.__globals__[name] for name in names}
    outside |= {f"a default of {f.__qualname__}": f.__defaults__, f"defaults of {f.__qualname__}": f.__kwdefaults__}
    outside[f"an attribute of {f.__qualname__}"] = f.__dict__
    return ["function", inner(steps, "a constant"), *(inner(v, key) for key, v in outside.items())]


def bytecode(code: types.CodeType):
    """What code and the code within it do, step by step, each with the value that it is about; a docstring is in no step."""
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    yield "code", (names, len(code.co_code), code.co_exceptiontable)
    for step in dis.get_instructions(code):
        if isinstance(step.argval, types.CodeType):
            yield from bytecode(step.argval)
        else:
            yield step.opname, step.argval


@functools.cache
def installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to `sae_utils`, and so counts by its name."""
    top = (module or "").split(".")[0]
    parts = PurePath(getattr(sys.modules.get(top), "__file__", None) or "").parts
    known = top in sys.stdlib_module_names or top == "sae_utils" or "site-packages" in parts or "dist-packages" in parts
    return known and top != "__main__"
