"""Every notebook through a few steps at the size of GPT-2: does it run, and in the memory that a dry run predicts?

    python benchmarks/smoke.py [--keep DIRECTORY] [NOTEBOOK...]

The model is a GPT-2 of 124M parameters with random weights, saved as a local directory with the built-in tokenizer (nothing is
downloaded), the text a file of words of the built-in corpus. Steps of 512 tokens, a row each, d_sae 3,072. The memory measured is the peak
resident set of the notebook's kernel, as the system counts it. Exit code 1 if a notebook fails or needs over 20% more or less
than predicted. With --keep, what finished there is found again.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sae_utils.activations.corpus import builtin_documents
from sae_utils.files import ASSETS, BUILTIN_MODEL
from sae_utils.lab import estimate, parameters, sweep

WITHIN = 0.2
TEXT = 6_000_000  # characters; the probes of notebook 06 want 40 held-out tokens for each of 768 inputs
TOML = """
[shared]
model = "{directory}/gpt2-random"
dataset = "{directory}/text.txt"
hook_name = "blocks.6.hook_resid_pre"
n_tokens = 8192
device = "cpu"
d_sae = 3072
k = 32
batch_size = 512
n_eval_tokens = 1024

[00_base_model]
n_tokens = 2048
retrain = true
d_vocab = 50257
d_model = 768
n_layer = 12
n_head = 12
n_ctx = 32

[01_train_topk]
ks = [16, 64]
d_wide = 6144

[02_train_gated]  # the penalty has to tell within a few steps
lr = 0.012
coefficients = [0.1, 0.3, 1.0]

[03_train_e2e]
[04_train_gsae]

[05_train_adaptive]
d_wide = 6144

[06_dark_matter]  # the shrinking of its first exercise has to cost variance: not so after 15 steps, when x̂ is too long
n_tokens = 32768
k = 8
widths = [768, 1536, 3072]
n_eval_tokens = 40_960

[07_steering]
n_latents = 6
n_contexts = 3
n_prompt = 16
n_new = 2

[08_compare]
n_rule_tokens = 4096
n_latents = 8
n_contexts = 2
"""


def make(directory: Path) -> None:
    """The model and the text.

    A random model with tied embeddings expects the token that it has just seen, if anything. So that its predictions are worth
    something, and worse without x, the text says every word (of one token) of the corpus three times.
    """
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=512, bos_token_id=0, eos_token_id=0))  # a row is a step
    model.save_pretrained(directory / "gpt2-random")
    for file in (ASSETS / BUILTIN_MODEL).glob("tokenizer*"):
        shutil.copy(file, directory / "gpt2-random")
    write_text(directory / "text.txt", AutoTokenizer.from_pretrained(directory / "gpt2-random"))


def write_text(path: Path, tokenizer) -> None:
    single, text, n = tokenizer.get_vocab(), [], 0
    for _, document in builtin_documents():
        words = [f" {word}" * 3 for word in re.findall("[A-Za-z]+", document) if f"Ġ{word}" in single]
        text.append("".join(words))
        n += len(text[-1])
        if n > TEXT:
            break
    path.write_text("\n".join(text), encoding="utf-8")


def measure(name: str, environment: dict) -> tuple[int, float, float]:
    """Exit code, minutes and peak memory in bytes of a run: the largest resident set of its process and of its kernel."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "sae_utils.sweep", "run", name], env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return process.returncode, (time.monotonic() - began) / 60, used.ru_maxrss * unit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="default: all")
    parser.add_argument("--keep", type=Path, help="a directory to work in and to leave as it is")
    args = parser.parse_args()
    scratch = args.keep or Path(tempfile.mkdtemp(prefix="smoke-"))
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        return smoke(scratch.resolve(), args.notebooks)
    finally:
        if not args.keep:
            shutil.rmtree(scratch)


def smoke(directory: Path, wanted: list[str]) -> int:
    if not (directory / "text.txt").exists():
        make(directory)
    (directory / "smoke.toml").write_text(TOML.format(directory=directory.as_posix()))
    params_of = dict(sweep.planned(directory / "smoke.toml"))
    if unknown := set(wanted) - set(params_of):
        raise SystemExit(f"no notebook {', '.join(sorted(unknown))}: there are {', '.join(params_of)}")
    plan = [(name, params_of[name]) for name in wanted or params_of]
    os.environ |= {
        parameters.TIER: str(directory / "smoke.toml"),
        "SAE_UTILS_OUTPUT": str(directory / "outputs"),
        "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # glibc gives back what is freed: the peak is then what was in use
    }
    rows, bad = [("run", "minutes", "predicted GiB", "measured GiB", "ratio", "")], 0
    for name, params in plan:
        predicted = estimate.estimate(name, params, params.get("d_sae", 3072)).memory()
        if sweep.state(name, params) == "finished":
            rows.append((name, "", "", "", "", "found"))
            continue
        # a cache of its own: every run harvests, as its prediction says
        code, minutes, used = measure(name, os.environ | {"SAE_UTILS_CACHE": str(directory / "cache" / name)})
        ratio = predicted / used
        verdict = "FAILED" if code else "" if abs(ratio - 1) <= WITHIN else f"more than {WITHIN:.0%} off"
        bad += bool(verdict)
        sizes = f"{predicted / 2**30:.2f}", f"{used / 2**30:.2f}", f"{ratio:.2f}"
        rows.append((name, f"{minutes:.1f}", *sizes, verdict))
        print(*rows[-1], sep="  ", flush=True)
    print()
    sweep.print_table(rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
