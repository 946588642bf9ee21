"""What a run will take, by arithmetic on its parameters: hours, memory and disk. Loads no model, asks no hub, imports no torch.

With d = d_in, F = d_sae, P = 2dF + 2F + d parameters of an SAE, B tokens a step, and of the language model V words, a context of n,
L layers of 12d² parameters:

    FLOP a token     SAE in training: 2dF (its one dense product; twice that for g-SAE) + 12dk (what is sparse); ReLU and Gated are
                     counted as sparse, as they are after some hundred steps. SAE in use: 2dF + 2dk.
                     l layers: S(l) = l (24 d² + 4nd), unembedding 2dV. End to end: the layers after the hook once for all
                     SAEs, and three times (forward, gradients of activations) for each.
    bytes a step     40 P of each SAE: gradient written, read, projected; Adam's two moments, the weights and their norms
    memory           4 bytes a parameter of the language model + 8 P of every SAE (weights, last gradient) + the largest of what
                     the phases hold besides (`Plan.phase`): training Adam's 8 P of the SAEs that train together, evaluation the
                     logits, a forward its attention patterns
    disk             2 bytes × d for each token and hook that is stored (and 2 for each token), once for all runs of the same text,
                     model and hook; checkpoints, 12 P of SAEs that train together; SAEs saved, 4 P

    hours = FLOP ÷ throughput + bytes ÷ bandwidth, both given or measured here by one product and one copy of NumPy: a lower
    bound, as no run keeps a machine at its best.

Not counted: downloads and tokenising, figures, statistics that no SAE or model takes part in. Sources: our code, and what it holds
in memory, measured by benchmarks/smoke.py.
"""

import functools
import json
import math
import re
import time
from typing import NamedTuple

import numpy as np

from . import parameters

GIB = 2**30
PROCESS = 0.65 * GIB  # Python, torch, transformers and what else a notebook imports (measured)
AT_ONCE = 2**24  # entries that end-to-end losses and interventions hold at a time (end_to_end.py, steering.py)
KL_COPIES = 7  # logits, clean and new; their log-softmax; and three factors of KL(orig ‖ new)


class Model(NamedTuple):
    n_layers: int
    d_model: int
    n_heads: int
    n_ctx: int
    d_vocab: int

    @property
    def n_parameters(self) -> int:
        """Those of GPT-2, whose unembedding is its embedding: (V + n) d + L (12 d² + 13 d) + 2 d."""
        d = self.d_model
        return (self.d_vocab + self.n_ctx) * d + self.n_layers * (12 * d * d + 13 * d) + 2 * d

    def layers(self, n: int) -> float:
        """FLOP a token of n layers, forward: 24 d² of products with weights and 4 n_ctx d of attention (all positions), each."""
        return n * (24 * self.d_model**2 + 4 * self.n_ctx * self.d_model)

    @property
    def unembedding(self) -> float:
        return 2 * self.d_model * self.d_vocab


KNOWN = {
    "gpt2": Model(12, 768, 12, 1024, 50257),
    "openai-community/gpt2": Model(12, 768, 12, 1024, 50257),
    "gpt2-medium": Model(24, 1024, 16, 1024, 50257),
    "gpt2-large": Model(36, 1280, 20, 1024, 50257),
    "gpt2-xl": Model(48, 1600, 25, 1024, 50257),
}


def model_of(name: str) -> Model | None:
    """The shape of a language model: of a local directory by its config.json, of a hub name if it is `KNOWN`, else None."""
    found = parameters.config_of(name)
    return Model(**found) if len(found) == len(Model._fields) else KNOWN.get(name.partition("@")[0])


def sae_parameters(d: int, F: int) -> int:
    """P = 2dF + 2F + d: encoder, decoder, b_dec, and two vectors over latents (biases; for Gated three)."""
    return 2 * d * F + 2 * F + d


class Plan:
    """What a run does, added up step by step: FLOP, bytes moved, what is kept in memory, the largest phase, disk."""

    def __init__(self, p: dict, model: Model, d_sae: int = 0):
        self.p, self.m = p, model
        self.d, self.n = model.d_model, model.n_ctx
        self.n_tokens = p["n_tokens"] // self.n * self.n
        self.n_eval = p.get("n_eval_tokens", 16_384) // self.n * self.n
        self.F, self.k, self.B = p.get("d_sae", d_sae), p.get("k", 32), p.get("batch_size", 4096)
        found = re.match(r"blocks\.(\d+)\.(.*)", p["hook_name"])
        self.layer = int(found[1]) + (found[2] != "hook_resid_pre") if found else model.n_layers
        self.after = model.n_layers - self.layer
        self.flop = self.bytes = self.disk = self.checkpoints = 0.0
        self.weights = 4.0 * model.n_parameters
        self.kept = self.left = 0.0
        self.phases = {}
        self.stores = {}  # what other runs share: {key: bytes}
        self.phase("weights", 8 * self.d * model.d_vocab)  # the hash of the weights copies the largest of them twice

    def phase(self, name: str, size: float, host: float = 0.0) -> None:
        """A phase that holds so many bytes besides what is kept by now, and so many more that are never on a GPU."""
        before = self.phases.get(name, (0, 0))
        self.phases[name] = max(before[0], self.kept + size), max(before[1], self.kept + size + host)

    @property
    def suffix(self) -> float:
        return self.m.layers(self.after) + self.m.unembedding

    def activations(self, n_rows: float, n_layers: int) -> float:
        """Bytes that autograd keeps of frozen layers for n rows: about 20 d and 2.5 attention patterns a token and layer."""
        return 4 * n_rows * self.n * n_layers * (20 * self.d + 2.5 * self.m.n_heads * self.n)

    def patterns(self, n_rows: float, n_layers: float) -> float:
        """Bytes of the attention patterns of n rows, of which the model keeps the last of every layer that it has run."""
        return 4 * n_rows * n_layers * self.m.n_heads * self.n**2

    def harvest(self, n_tokens: int, hooks: int = 1, gradients: bool = False, what: str = "train") -> None:
        """Activations of n tokens to disk, 32 rows at a time."""
        self.flop += n_tokens * self.m.layers(self.layer)
        n_rows = min(32, max(1, n_tokens // self.n))
        self.phase("harvest", self.patterns(n_rows, self.layer + 4.4))  # 4.4: a layer at work
        self.left = max(self.left, self.patterns(n_rows, self.layer))
        if gradients:
            self.flop += 2 * n_tokens * self.suffix
            most = 2**23 if self.p["device"] == "cpu" else 2**25  # logits at a time, as in ActivationStore.harvest
            n_rows = max(1, min(n_rows, most // (self.n * self.m.d_vocab)))
            logits = 4 * n_rows * self.n * self.m.d_vocab
            self.phase("gradients", 4 * logits + self.activations(n_rows, self.after))
        for i in range(hooks + gradients):
            about = [self.p.get(key) for key in ("model", "dataset", "hook_name")]
            key = json.dumps([*about, what, n_tokens, i if i < hooks else "gradient"])
            self.stores[key] = (2 * self.d + 2) * n_tokens

    def train(self, widths, share: float = 1.0, products: float = 1.0, kind: str = "TopK") -> None:
        """SAEs of these widths side by side, on a share of the activations."""
        P = [sae_parameters(self.d, F) for F in widths]
        n = share * self.n_tokens
        self.flop += n * sum(2 * products * self.d * F + 12 * self.d * self.k for F in widths)
        self.bytes += n / self.B * 40 * sum(P)
        self.kept += 8 * sum(P)
        self.checkpoints = max(self.checkpoints, 12 * sum(P))
        adam = 8 * sum(P)
        F, entries = max(widths), self.B * self.k
        dense = {"TopK": min(self.B * F, 2**25), "dense": 5 * self.B * F, "Choice": 4 * self.B * F}[kind]
        # the encoder lies transposed: a checkpoint copies it; x, x̂ and their gradients; entries with int64 indices
        step = 4 * dense + 32 * self.B * self.d + 64 * entries
        self.phase("train", adam + self.left + max(4 * self.d * sum(widths), step))

    def end_to_end(self, n_saes: int, share: float) -> None:
        """SAEs of width d_sae on whole rows through the layers after the hook."""
        n_rows = max(self.B // self.n, 1)
        self.train([self.F] * n_saes, share)
        self.flop += share * self.n_tokens * (1 + 3 * n_saes) * self.suffix
        tokens = n_rows * self.n
        logits = 4 * tokens * self.m.d_vocab
        kept = logits if tokens * self.m.d_vocab <= 2**26 else 0
        chunk = 4 * 4 * min(AT_ONCE, tokens * self.m.d_vocab)
        self.phase(
            "end to end",
            8 * n_saes * sae_parameters(self.d, self.F)
            + self.left
            + kept
            + chunk
            + self.activations(n_rows, self.after),
        )

    def evaluate(self, widths, n_tokens: int = 0, batch_rows: int = 16) -> None:
        """SAEs spliced into the model: two clean runs, two ablations, one run an SAE; KL holds the logits seven times."""
        n = n_tokens or self.n_eval
        self.flop += n * (self.m.layers(self.layer) + (3 + len(widths)) * self.suffix)
        self.flop += n * sum(2 * self.d * F for F in widths)
        rows = min(batch_rows, max(1, n // self.n))
        size = 4 * rows * self.n * (KL_COPIES * self.m.d_vocab + max(widths))
        self.phase("evaluate", size + self.patterns(rows, self.m.n_layers))

    def encode(self, widths, n_tokens: int, times: int = 1, at_once: int = 8192) -> None:
        """Dense latents of n tokens, `at_once` of them in memory with their product and a mask."""
        self.flop += times * n_tokens * sum(2 * self.d * F for F in widths)
        self.phase("encode", 9 * min(n_tokens, at_once) * max(widths))

    def steer(self, n_tokens: int, n_contexts: int) -> None:
        """Interventions on n tokens in all through the whole model, in chunks of contexts."""
        self.flop += n_tokens * (self.m.layers(self.m.n_layers) + self.m.unembedding)
        self.phase("steer", 4 * KL_COPIES * max(AT_ONCE, n_contexts * self.m.d_vocab))

    def save(self, n: int) -> None:
        self.disk += n * 4 * sae_parameters(self.d, self.F)

    def memory(self, device: bool = False) -> float:
        """Bytes at the peak: of one process on a CPU, or of the GPU alone."""
        if device:
            return self.weights + max(size for size, _ in self.phases.values())
        return PROCESS + self.weights + max(size for _, size in self.phases.values())

    def in_phase(self) -> str:
        """The phase with the peak of one process on a CPU."""
        return max(self.phases, key=lambda name: self.phases[name][1])

    def hours(self, tflops: float, gbs: float) -> float:
        return (self.flop / (tflops * 1e12) + self.bytes / (gbs * 1e9)) / 3600


def estimate(name: str, p: dict, d_sae: int = 0) -> Plan | None:
    """The plan of a notebook's run, or None where the model's shape or the notebook is unknown.

    d_sae: width of the SAEs that a notebook which trains none (07, 08) requires.
    """
    if name == "00_base_model" and p["retrain"]:
        shape = Model(p["n_layer"], p["d_model"], p["n_head"], p["n_ctx"], p["d_vocab"])
    else:
        shape = model_of(p["model"]) if "model" in p else None
    if shape is None or name not in PLANS:
        return None
    plan = Plan(p, shape, d_sae)
    PLANS[name](plan)
    return plan


def base_model(run: Plan) -> None:
    if run.p["retrain"]:
        m, rows = run.m, 16
        run.flop += 3 * run.n_tokens * (m.layers(m.n_layers) + m.unembedding)
        run.bytes += run.n_tokens / (rows * run.n) * 40 * m.n_parameters
        run.kept += 12 * m.n_parameters  # gradients and the optimiser's state
        run.phase("train", 16 * rows * run.n * m.d_vocab + 2 * run.activations(rows, m.n_layers))
    run.phase("xz -9 of the text", 0, host=0.66 * GIB)  # what its manual says


def topk(run: Plan) -> None:
    ks = {*run.p["ks"], run.k}
    run.harvest(run.n_tokens)
    run.train([run.p["d_wide"]] * 2)
    run.evaluate([run.p["d_wide"]] * 2)
    run.train([run.F] * len(ks))
    run.evaluate([run.F] * len(ks))
    run.train([run.p["d_wide"]] * 2, 1 / 3)  # an exercise
    run.save(1)


def gated(run: Plan) -> None:
    wide, n = run.F * 3 // 2, 7 if run.p["full"] else len(run.p["coefficients"])
    run.harvest(run.n_tokens)
    run.train([wide, run.F] * n, kind="dense")
    run.train([wide, run.F] + [run.F] * (9 if run.p["full"] else 1), kind="dense")
    # the baseline rescaled: four matrices [F, F], and their 2F equations in float64, solved on the CPU
    run.flop += (n + 1) * (4 * 2 * min(50_000, run.n_tokens) * wide**2 + 2 / 3 * (2 * wide) ** 3)
    run.phase("rescale", 2 * 16 * wide**2, 4 * 8 * (2 * wide) ** 2)
    run.evaluate([wide] * 2 * (n + 1) + [run.F] * (n + 2))
    run.train([run.F], 2.0, kind="dense")  # an exercise, twice
    run.save(2)


def e2e(run: Plan) -> None:
    full, tune = run.p["full"], run.p["tune_share"]
    n_local, n_starts = (6, 3) if full else (3, 1)
    run.harvest(run.n_tokens)
    # two rows through four losses with their graphs, two of them with all logits, to compare gradients
    logits = 4 * 2 * run.n * run.m.d_vocab
    run.phase("gradients compared", 4 * run.activations(2, run.after) + 2 * 4 * logits)
    run.train([run.F] * n_local)
    run.train([run.F] * n_starts, 0.8)
    run.end_to_end(2 * n_starts, 0.2)
    run.train([run.F], 1 - tune)
    run.end_to_end(1, tune)
    if full:
        for _ in range(2):
            run.end_to_end(2, 1.0)
        run.train([run.F])
    run.evaluate([run.F] * (n_local + 3 * n_starts + (3 if full else 1)), batch_rows=4)
    run.encode([run.F] * 4, min(200_000, run.n_tokens), at_once=1024)
    run.save(4)


def gsae(run: Plan) -> None:
    n_betas = len({run.p["beta"], *([0.03, 0.1, 0.3, 1.0, 3.0] if run.p["full"] else [0.1, 1.0])})
    n_controls = 3 if run.p["full"] else 1
    run.harvest(run.n_tokens, gradients=True)
    run.train([run.F] * (1 + n_betas), products=2)
    run.train([run.F] * n_controls, products=2)
    run.harvest(run.n_eval, gradients=True, what="test")
    run.evaluate([run.F] * (1 + n_betas), batch_rows=4)
    run.evaluate([run.F] * (4 + n_controls + 3), batch_rows=4)
    run.encode([run.F] * 3, min(200_000, run.n_tokens), at_once=1024)
    run.steer(3 * (128 if run.p["full"] else 24) * 2 * run.n, 2)
    run.save(1)


def adaptive(run: Plan) -> None:
    n = 3 + (8 if run.p["full"] else 0)
    run.harvest(run.n_tokens)
    run.train([run.F] * n, kind="Choice")
    run.train([run.p["d_wide"]] * 3, kind="Choice")
    run.encode([run.F] * n, run.n_eval, 4, at_once=run.n_eval)
    run.encode([max(run.F, run.p["d_wide"])] * 9, 100_000, at_once=run.B)
    run.evaluate([run.F] * (n + 5))
    run.evaluate([run.F] * 8)
    run.evaluate([run.p["d_wide"]] * 3)
    run.save(2)


def dark_matter(run: Plan) -> None:
    widths, full = run.p["widths"], run.p["full"]
    some = widths if full else sorted({widths[0], widths[len(widths) // 2], widths[-1]})
    middle = widths[len(widths) // 2]
    run.harvest(run.n_tokens)
    run.harvest(2 * run.n_eval, what="held out")
    run.train(widths)
    run.kept += run.left + run.weights  # both models stay
    run.harvest(run.n_tokens, what="untrained")
    run.train(some)
    run.train(some[:: len(some) // 2] if full else [middle])
    # decoders refitted: normal equations in float64, and copies to scale and to factor them
    run.flop += sum(2 / 3 * F**3 + 2 * run.n_tokens * (run.d + run.k) * run.k for F in widths)
    run.phase("refit", 5 * 8 * max(widths) ** 2)
    run.kept += 4 * 2 * run.n_eval * run.d  # the Gaussian's tokens, which no file holds
    run.harvest(2 * run.n_eval, what="untrained, held out")
    run.encode([*widths, *widths, *some, *some], 4 * run.n_eval, at_once=4096)
    run.evaluate([middle] * 12, run.n_eval, batch_rows=4)
    if full:
        for _ in range(2):
            run.train(widths[::2])
        for _ in range(run.m.n_layers + 4 + 3):
            run.train([middle])


def steering(run: Plan) -> None:
    p = run.p
    n_latents, n_contexts, n_texts = p["n_latents"], p["n_contexts"], 8
    if p["full"]:
        n_latents, n_contexts, n_texts = max(n_latents, 200), max(n_contexts, 64), 4
    n_own, n_texts = min(n_contexts, 12), min(n_contexts, n_texts)
    run.kept += 7 * 4 * sae_parameters(run.d, run.F)
    run.phase("harvest", run.patterns(16, run.layer + 4.4))
    run.encode([run.F] * 7, 16_384 * (4 if p["full"] else 1), 2, at_once=10**9)
    # 12 sets of directions in arbitrary contexts, 8 in their own, five strengths; what is generated is read once more
    of_each = (12 * n_contexts + 8 * n_own) * p["n_prompt"] + 20 * n_texts * 2 * (p["n_prompt"] + p["n_new"])
    run.steer(5 * n_latents * of_each, n_contexts)


def compare(run: Plan) -> None:
    p = run.p
    more, times = (4, 3) if p["full"] else (1, 1)  # as many tokens, and latents
    run.harvest(run.n_tokens)
    run.harvest(more * p["n_rule_tokens"] // 2, what="rules")
    run.kept += 8 * 4 * sae_parameters(run.d, run.F)
    run.evaluate([run.F] * 8, more * run.n_eval)
    run.encode([run.F] * 8, more * p["n_rule_tokens"] * 3 // 2, 5)
    run.steer(9 * 32 * times * p["n_contexts"] * min(64, run.n), p["n_contexts"])
    # of each token: its activation; a method's latents, the random directions, and those cut to fire as often
    run.phase("rules", more * p["n_rule_tokens"] * 3 // 2 * (8 * run.d + 3 * 4 * times * p["n_latents"]))


PLANS = {
    "00_base_model": base_model,
    "01_train_topk": topk,
    "02_train_gated": gated,
    "03_train_e2e": e2e,
    "04_train_gsae": gsae,
    "05_train_adaptive": adaptive,
    "06_dark_matter": dark_matter,
    "07_steering": steering,
    "08_compare": compare,
}


@functools.cache
def measured() -> tuple[float, float]:
    """(TFLOP/s of a product in float32, GB/s of a copy, read and written) of this machine's CPU, the best of three by NumPy."""
    a = np.ones((1536, 1536), np.float32)
    big = np.ones(2**25, np.float32)
    products, copies = [], []
    for _ in range(3):
        began = time.perf_counter()
        a @ a
        products.append(time.perf_counter() - began)
        began = time.perf_counter()
        big.copy()
        copies.append(time.perf_counter() - began)
    return 2 * 1536**3 / min(products) / 1e12, 2 * big.nbytes / min(copies) / 1e9


def table(plan, tflops: float = 0.0, gbs: float = 0.0) -> tuple[list[tuple], str]:
    """Rows (run, hours, memory in GiB, the phase that needs it, GiB of the GPU alone, disk in GiB) and what they rest on.

    plan: (notebook, parameters) of every run; a row names what tells it from its notebook's others. The total's disk counts
    an activation store once, and of checkpoints, which go when a run ends, the largest; so its memory.
    """
    plan = [run for run in plan if run[0] in PLANS]
    if not plan:
        return [], ""
    if not (0 <= tflops < math.inf and 0 <= gbs < math.inf):
        raise ValueError(f"--tflops {tflops:g} --gbs {gbs:g}: they have to be above 0, or left out to be measured here")
    how = "as given" if gbs else "the bandwidth guessed from this CPU's: give --gbs"
    if not tflops:
        how = "measured on this CPU; for another machine give --tflops and --gbs"
    if not (tflops and gbs):
        here = measured()
        tflops = tflops or here[0]
        gbs = gbs or here[1] * tflops / here[0]
    width = max([p["d_sae"] for _, p in plan if "d_sae" in p], default=1024)
    rows, stores, most, total = [], {}, 0.0, {"hours": 0.0, "memory": 0.0, "device": 0.0, "disk": 0.0}
    for name, p in plan:
        others = [q for other, q in plan if other == name]
        label = " ".join(
            [name, *(f"{key}={value}" for key, value in p.items() if any(q[key] != value for q in others))]
        )
        made = estimate(name, p, width)
        if made is None:
            rows.append((label, *["unknown"] * 5))
            continue
        hours, disk = made.hours(tflops, gbs), made.disk + made.checkpoints + sum(made.stores.values())
        memory, device = made.memory(), made.memory(device=True)
        rows.append(
            (label, f"{hours:.2g}", f"{memory / GIB:.1f}", made.in_phase(), f"{device / GIB:.1f}", f"{disk / GIB:.3g}")
        )
        stores |= made.stores
        total["hours"] += hours
        total["disk"] += made.disk
        most = max(most, made.checkpoints)
        total["memory"], total["device"] = max(total["memory"], memory), max(total["device"], device)
    disk = total["disk"] + most + sum(stores.values())
    last = (
        f"{total['hours']:.3g}",
        f"{total['memory'] / GIB:.1f}",
        "",
        f"{total['device'] / GIB:.1f}",
        f"{disk / GIB:.3g}",
    )
    rows.append(("in all (memory: the largest)", *last))
    return rows, f"hours at {tflops:.3g} TFLOP/s in float32 and {gbs:.3g} GB/s ({how})"
