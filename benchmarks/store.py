"""How fast activations are harvested and read, beside the floor of each. Prints a table; asserts nothing.

    python benchmarks/store.py [--n-tokens 262144]

Harvesting: tokens/s of `ActivationStore` against the bare prefix forward pass over the same batches. Reading: activations/s of
shuffled `batches` at several widths (the embeddings of random tokens; no training beside it). Training: the share of time spent
waiting for batches, and several SAEs on one stream against each alone.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time

import numpy as np
import torch

from sae_utils import ActivationStore, GatedSAE, TopKSAE, load_language_model, tokens, train
from sae_utils.activations.hooks import run_prefix
from sae_utils.files import ASSETS
from sae_utils.training.losses import gated_loss, reconstruction_loss

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


def several(n_tokens: int, batch_size: int = 1024) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SAE_UTILS_CACHE"] = cache
        lm = load_language_model()
        store = ActivationStore(lm, tokens("python-source", lm.tokenizer, lm.cfg.n_ctx, n_tokens), HOOK)
        n_steps = len(store) // batch_size

        def made(names):
            kinds = {
                "topk 8": lambda: (TopKSAE(store.d_in, 1024, 8), reconstruction_loss),
                "topk 32": lambda: (TopKSAE(store.d_in, 1024, 32), reconstruction_loss),
                "topk 8, wide": lambda: (TopKSAE(store.d_in, 4096, 8), reconstruction_loss),
                "gated": lambda: (GatedSAE(store.d_in, 1024), gated_loss),
            }
            return {name: kinds[name]() for name in names or kinds}

        def training(*names):
            return seconds(
                lambda: train(made(names), store.batches(batch_size, 0), n_steps=n_steps, lr=1e-3, progress=False)
            )

        training("topk 8")
        read = seconds(lambda: list(itertools.islice(store.batches(batch_size, 0), n_steps)))
        alone = {name: training(name) for name in made([])}
        together = training()
    for name, took in alone.items():
        print(f"train {name:12s}   {took / n_steps * 1e3:8.2f} ms a step, {read / took:.1%} of it waiting for data")
    most = sum(alone.values()) - (len(alone) - 1) * read
    print(
        f"all four on one stream {together / n_steps * 1e3:6.2f} ms a step: {together / most:.2f} of the steps alone + one read"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-tokens", type=int, default=262_144)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    harvesting(arguments.n_tokens)
    for width in (128, 512):
        reading(width)
    several(arguments.n_tokens)
