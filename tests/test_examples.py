"""The examples in docstrings: they run, and what a reader imports has one."""

import ast
import doctest
import importlib
import inspect
import math
import os
import pkgutil
import tempfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import sae_utils
from sae_utils.files import ROOT
from sae_utils.lab import runs
from sae_utils.lab.parameters import code_cells, defaults

MODULES = [module.name for module in pkgutil.walk_packages(sae_utils.__path__, "sae_utils.")]
MODULES = [name for name in MODULES if find_spec("triton") or not name.endswith(".kernels")]
LOOK_ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def at_hand():
    """What examples use without a line for it: public names, a notebook's defaults, the built-in model, and a few modules."""
    names = {name: getattr(sae_utils, name) for name in sae_utils.__all__}
    lm = sae_utils.load_language_model("python-lm", device="cpu")
    modules = {"torch": torch, "np": np, "math": math, "os": os, "tempfile": tempfile}
    return names | {"lm": lm, "defaults": defaults} | modules


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name, at_hand, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_UTILS_OUTPUT", str(tmp_path))
    monkeypatch.delenv("SAE_UTILS_TIER", raising=False)
    monkeypatch.setattr(runs, "_current", None)  # the run that an example begins is no caller of the next
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module, globs=at_hand | vars(module), optionflags=LOOK_ALIKE)
    assert result.failed == 0


def imported():
    """(module, name) of what chapters and studies import from `sae_utils` to measure or to train."""
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        for _, source in code_cells(path):
            for node in ast.walk(ast.parse(source.replace("\n%", "\n# %"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_utils"):
                    yield from ((node.module, alias.name) for alias in node.names)


def test_what_a_reader_imports_has_an_example():
    rooms = ("sae_utils.saes", "sae_utils.training.losses", "sae_utils.analysis", "sae_utils.activations.hooks")
    asked = {("sae_utils", name) for name in sae_utils.__all__} | {
        one for one in imported() if one[0].startswith(rooms)
    }
    for name in MODULES:  # `from sae_utils.analysis import controls` names a module, an attribute once it is imported
        importlib.import_module(name)
    found = {name: getattr(importlib.import_module(module), name) for module, name in asked}
    callables = {name: one for name, one in found.items() if inspect.isfunction(one) or inspect.isclass(one)}
    assert len(callables) > 30
    assert not [name for name, one in sorted(callables.items()) if ">>>" not in (one.__doc__ or "")]
