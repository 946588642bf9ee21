"""How fast activations are harvested and read, beside the floor of each. Prints a table; asserts nothing.

    python benchmarks/store.py [--n-tokens 262144]

Harvesting: tokens/s of `ActivationStore` against the bare prefix forward pass over the same batches. Reading: activations/s of
shuffled `batches` at several widths (the embeddings of random tokens; no training beside it).
"""

import argparse
import os
import statistics
import tempfile
import time

import numpy as np
import torch

from sae_utils import ActivationStore, load_language_model, tokens
from sae_utils.files import ASSETS
from sae_utils.lm import run_prefix

HOOK = "blocks.3.hook_resid_pre"


def seconds(function) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def harvesting(n_tokens: int, rounds: int = 5) -> None:
    lm = load_language_model()
    rows = tokens("python-source", lm.tokenizer, lm.cfg.n_ctx, n_tokens)
    chunks = [torch.from_numpy(rows[i : i + 32].astype(np.int64)).to(lm.cfg.device) for i in range(0, len(rows), 32)]

    def bare():
        for chunk in chunks:
            run_prefix(lm, chunk, [HOOK])

    def harvest():
        with tempfile.TemporaryDirectory() as cache:
            os.environ["SAE_UTILS_CACHE"] = cache
            ActivationStore(lm, rows, HOOK)

    bare()
    pairs = [(seconds(bare), seconds(harvest)) for _ in range(rounds)]
    prefix, store = (statistics.median(times) for times in zip(*pairs))
    print(f"bare prefix forward  {rows.size / prefix:10,.0f} tokens/s")
    print(f"harvest              {rows.size / store:10,.0f} tokens/s   {prefix / store:.0%} of the bare forward")


def reading(d_in: int, n_tokens: int = 1_000_000, batch_size: int = 2048, rounds: int = 5) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as directory:
        os.environ["SAE_UTILS_CACHE"] = directory
        # one layer: its embedding is activation enough
        config = GPT2Config(vocab_size=4096, n_positions=250, n_embd=d_in, n_layer=1, n_head=1)
        GPT2LMHeadModel(config).save_pretrained(directory)
        AutoTokenizer.from_pretrained(ASSETS / "python-lm").save_pretrained(directory)
        rows = np.random.default_rng(0).integers(0, 4096, (n_tokens // 250, 250)).astype(np.uint16)
        store = ActivationStore(load_language_model(directory, "cpu"), rows, "blocks.0.hook_resid_pre")
        times = []
        for seed in range(rounds):
            stream = iter(store.batches(batch_size, seed))
            next(stream)  # draws the permutation
            n_steps = len(store) // batch_size - 1
            times.append(seconds(lambda: [next(stream) for _ in range(n_steps)]))  # noqa: B023
    print(f"read d_in {d_in:4d}        {n_steps * batch_size / statistics.median(times):10,.0f} activations/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-tokens", type=int, default=262_144)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    harvesting(arguments.n_tokens)
    for width in (128, 512):
        reading(width)
