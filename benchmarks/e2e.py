"""How long an end-to-end step takes beside the parts that it cannot do without. Prints a table; asserts nothing.

    python benchmarks/e2e.py [--models python-lm,gpt2-small] [--rounds 5]

The parts, each run by itself on the same rows: the clean model after the hook (forward), the spliced one (forward and
backward), each with logits for all tokens, and the SAE's own step as it is locally. "gpt2-small" has GPT-2 small's shape and
random weights. Every step follows the parts; figures are medians of times and of their ratios.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time

import torch

from sae_utils import TopKSAE, load_language_model
from sae_utils.activations.hooks import run_spliced
from sae_utils.training.end_to_end import Suffix, e2e_downstream_loss, e2e_loss
from sae_utils.training.losses import reconstruction_loss
from sae_utils.training.optimizer import Optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {  # hook, d_sae, k, rows, n_ctx
    "python-lm": ("blocks.3.hook_resid_pre", 1024, 8, 4, 256),
    "gpt2-small": ("blocks.6.hook_resid_pre", 24576 if DEVICE == "cuda" else 8192, 32, 4, 256),
}


def load(name: str):
    if name != "gpt2-small":
        return load_language_model(name, device=DEVICE)
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from sae_utils.activations.model import model_path

    with tempfile.TemporaryDirectory() as path:
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(path)
        AutoTokenizer.from_pretrained(model_path("python-lm")).save_pretrained(path)
        return load_language_model(path, device=DEVICE)


def measure(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, one after the other in every round; the first round is not counted."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def functions_for(name: str) -> dict:
    hook, d_sae, k, rows, n_ctx = SETTINGS[name]
    lm = load(name)
    suffix = Suffix(lm, hook)
    tokens = torch.randint(0, 4096, (rows, n_ctx), device=DEVICE)
    x = torch.cat([suffix_input(lm, part, hook) for part in tokens.split(1)])
    leaf = x.clone().requires_grad_()

    def clean():
        with torch.no_grad():
            run_spliced(lm, tokens, hook, x)

    def spliced():
        logits = run_spliced(lm, tokens, hook, leaf)
        logits.backward(logits.detach())  # any gradient will do

    def step_of(objective):
        torch.manual_seed(0)
        sae = TopKSAE(x.shape[-1], d_sae, k=k).to(DEVICE).train()
        sae.initialise(x[:, 1:].flatten(0, 1))
        optimizer, scale = Optimizer(sae, (0.9, 0.999)), sae.x_scale.item()

        def step():
            suffix.kept = None  # a new batch every time
            terms = objective(sae, {"x": x, "tokens": tokens, "progress": 1.0})
            optimizer.update(terms["loss"], 1e-4, scale, 1.0)

        return step

    return {
        "clean suffix, forward": clean,
        "spliced suffix, forward and backward": spliced,
        "the SAE's own step": step_of(lambda sae, batch: reconstruction_loss(sae, batch["x"][:, 1:])),
        "e2e step": step_of(functools.partial(e2e_loss, suffix=suffix)),
        "e2e+ds step": step_of(functools.partial(e2e_downstream_loss, suffix=suffix)),
    }


def suffix_input(lm, tokens, hook):
    from sae_utils.activations.hooks import run_prefix

    return run_prefix(lm, tokens, [hook])[hook]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in options.models.split(","):
        hook, d_sae, k, rows, n_ctx = SETTINGS[name]
        times = measure(functions_for(name), options.rounds)
        parts = [sum(seconds) for seconds in zip(*list(times.values())[:3])]
        print(f"\n{name}, {hook}, TopK d_sae {d_sae} k {k}, {rows} rows of {n_ctx} tokens\n")
        print("| | ms | of the parts' sum |\n| --- | --- | --- |")
        for what, seconds in {**times, "sum of the three parts": parts}.items():
            ratio = statistics.median(s / p for s, p in zip(seconds, parts))
            print(f"| {what} | {1000 * statistics.median(seconds):.1f} | {ratio:.2f} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
