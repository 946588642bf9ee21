"""The examples of CONTRIBUTING.md's "Your own things" run as they stand, each by itself, beside small files of the names they use."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_utils import load_sae
from sae_utils.files import ROOT
from sae_utils.lab.sweep import main

SECTION = re.search(
    r"^## Your own things\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
)[1]
WORDS = "a the cat dog tree river sings runs falls over under green old slowly never stone light".split()


@pytest.fixture
def directory(tmp_path, monkeypatch, model_directories):
    """A directory with the files that the examples read, and no runs."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3_000, 4)) @ generator.standard_normal((4, 32))
    x[7] *= 100  # one token of very high norm
    np.save(tmp_path / "activations.npy", x.astype(np.float32))
    documents = [" ".join(generator.choice(WORDS, 200)) for _ in range(60)]
    lines = [json.dumps({"body": {"text": document}}) + "\n" for document in documents]
    (tmp_path / "papers.jsonl").write_text("".join(lines))
    shutil.copytree(model_directories["gpt2"], tmp_path / "my-model")
    shapes = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    save_file({name: torch.randn(shape) / 4 for name, shape in shapes.items()}, tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_UTILS_OUTPUT", str(tmp_path / "runs"))
    return tmp_path


def without_sizes(text):
    """The words of every line, with a mark for each size, which depends on the files."""
    return [re.sub(r"[\d.]+ (bytes|[KMGT]iB)", "SIZE", " ".join(line.split())) for line in text.splitlines()]


def test_examples_run_and_sweep_clean_prints_what_is_said(directory, capsys):
    examples = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    assert len(examples) == 4 and all(5 <= len(example.strip().splitlines()) <= 12 for example in examples)
    activations, text, model, sae = [{"__name__": "__main__"} for _ in examples]
    for number, (names, example) in enumerate(zip((activations, text, model, sae), examples), 1):
        exec(compile(example, f"CONTRIBUTING.md, example {number}", "exec"), names)
    assert activations["history"]["fvu"].iloc[-1] < 0.2, "with the token of high norm it is near 1"
    assert load_sae("my-sae").d_in == 32
    assert text["rows"].shape[1] == 64 and len(text["rows"]) > 10 * len(text["test_rows"]) > 0
    assert (directory / "my-model" / "SHA256SUMS").exists() and model["store"].d_in == 16
    assert 0 < sae["results"]["l0"] <= 4
    assert all(torch.equal(load_sae("their-sae").state_dict()[name], w) for name, w in sae["weights"].items())
    capsys.readouterr()
    consoles = re.findall(r"```console\n\$ python -m sae_utils.sweep ([^\n]*)\n(.*?)```", SECTION, re.DOTALL)
    assert [command for command, _ in consoles] == ["clean", "clean --caches"]
    for command, shown in consoles:
        assert main(command.split()) == 0
        assert without_sizes(capsys.readouterr().out) == without_sizes(shown)
