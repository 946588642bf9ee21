"""Installation: the ranges of pyproject.toml, and the cell by which a notebook fetches the repository where it is missing."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib

import pytest
from packaging.requirements import Requirement

from sae_utils.files import ROOT
from sae_utils.lab import parameters

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RANGES = list(map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]))
PINS = {
    p.name: p for p in map(Requirement, re.findall(r"^[\w.-]+==\S+", (ROOT / "requirements.txt").read_text(), re.M))
}


def guard() -> str:
    (source,) = {next(s for _, s in parameters.code_cells(path) if "find_spec" in s) for path in NOTEBOOKS}
    return source  # all notebooks have the same


@pytest.mark.parametrize("needed", RANGES, ids=lambda needed: needed.name)
def test_what_is_pinned_and_installed_lies_in_the_range_and_no_range_is_a_pin(needed):
    (pinned,) = PINS[needed.name].specifier
    assert pinned.version in needed.specifier and importlib.metadata.version(needed.name) in needed.specifier
    assert not any(part.operator in ("==", "===") for part in needed.specifier)


@pytest.fixture
def bare(tmp_path):
    """A Python that sees every package of this environment but `sae_utils`, and a git repository to fetch it from."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("pyproject.toml", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, repository)
    shutil.copytree(
        ROOT / "sae_utils", repository / "sae_utils", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    author = ["-c", "user.name=test", "-c", "user.email=test"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    with open(os.path.join(site, "packages.pth"), "w") as file:  # a path alone: .pth files in it are not read
        file.write(sysconfig.get_paths()["purelib"])
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | offline
    (tmp_path / "work").mkdir()

    def run(code, address=repository, cwd=tmp_path / "work"):
        at = env | {"SAE_UTILS_REPOSITORY": str(address)}
        return subprocess.run([python, "-c", code], cwd=cwd, env=at, capture_output=True, text=True)

    return run


def test_a_notebook_fetches_the_repository_and_later_processes_find_it(bare, tmp_path):
    assert "No module named 'sae_utils'" in bare("import sae_utils").stderr
    done = bare(guard() + "\nimport sae_utils\nprint(sae_utils.__file__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "work" / "sae-utils" / "sae_utils" / "__init__.py")
    elsewhere = bare("import sae_utils\n" + guard() + "\nprint('nothing to do')", "no address", cwd=tmp_path)
    assert elsewhere.stdout.strip() == "nothing to do", elsewhere.stderr


def test_it_says_what_went_wrong(bare, tmp_path):
    done = bare(guard(), tmp_path / "nowhere")
    assert re.search(r"RuntimeError: git clone .* failed: .*nowhere", done.stderr, re.DOTALL)
