"""How long a training step takes, beside its floor and beside the public libraries. Prints tables; asserts nothing.

    python benchmarks/step.py [--sizes 512,8192,32,2048 …] [--rounds 7] [--only topk,dense …] [--memory]

The floor of a TopK step is its one dense product x W_enc in fp32. Every contender gets the same batches, of a planted
dictionary whose seed is not the initialiser's; every step follows a floor, and figures are medians of times and of their
ratios. sae-lens, dictionary-learning and eai-sparsify are measured where they are installed (`make interop`), each by
its own training step. --memory runs each contender in a process of its own and prints its peak over the data alone.
"""

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
import time
import warnings

import torch

from sae_utils import GatedSAE, ReluSAE, SAEOutput, TopKSAE
from sae_utils.sparse import selection
from sae_utils.training import losses
from sae_utils.training.optimizer import Optimizer

warnings.filterwarnings("ignore")
SIZES = ["512,8192,32,2048", "768,24576,32,4096", "128,1024,8,1024"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def data(d_in: int, n: int, seed: int = 1234) -> torch.Tensor:
    """[n, d_in]: 24 of 4·d_in planted directions a token, plus noise."""
    g = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=g), dim=1)
    which = torch.randint(0, 4 * d_in, (n, 24), generator=g)
    size = torch.rand(n, 24, generator=g) + 0.2
    x = torch.nn.functional.embedding_bag(which, dictionary, per_sample_weights=size, mode="sum")
    return (x + 0.05 * torch.randn(n, d_in, generator=g)).to(DEVICE)


def ours(sae, objective, x, bf16=False, dead=0.0, l0=0, certified=True):
    """One step of `train` on one SAE. dead: the share of latents that count as dead; l0: set the biases so that it begins there."""
    sae = sae.to(DEVICE).train()
    optimizer = Optimizer(sae, (0.9, 0.999))
    sae.initialise(x[0])
    scale, batches = sae.x_scale.item(), itertools.cycle(x)
    if dead:
        gone = torch.arange(sae.d_sae, device=DEVICE) < dead * sae.d_sae
        sae.dead = lambda: gone
    if l0:
        bias = sae.b_gate if isinstance(sae, GatedSAE) else sae.b_enc
        z = (x[0, :256] - sae.b_dec) @ sae.W_enc
        bias.data -= z.flatten().kthvalue(z.numel() - 256 * l0).values.detach()

    def step():
        selection.bf16_is_fast = BF16 if certified else lambda device: False
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = objective(sae, {"x": next(batches), "progress": 1.0})["loss"]
        optimizer.update(loss, 2e-4, scale, 1.0)

    return step


BF16 = selection.bf16_is_fast


def one_of(cls, d_in, d_sae, loss, x, **options):
    return ours(cls(d_in, d_sae), loss, x, **options)


def dense(x, d_in, d_sae, k):
    """The same SAE as anyone would write it first: dense latents, autograd, fused Adam."""
    sae = TopKSAE(d_in, d_sae, k).to(DEVICE)
    sae.forward = functools.partial(dense_forward, sae)
    return ours(sae, losses.reconstruction_loss, x)


def dense_forward(sae, x, grad=None):
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    top = z.topk(sae.k, dim=1)
    f = torch.zeros_like(z).scatter(1, top.indices, top.values)
    return SAEOutput(f @ sae.W_dec + sae.b_dec, top.values, top.indices, dense=f)


def contenders(d_in: int, d_sae: int, k: int, batch: int) -> dict:
    """Name → a function that makes a step; those of libraries that are not installed are left out."""
    x = data(d_in, 8 * batch).view(8, batch, d_in)
    W, out = torch.randn(d_sae, d_in, device=DEVICE), torch.empty(batch, d_sae, device=DEVICE)
    x16, W16, out16 = x[0].bfloat16(), W.bfloat16(), out.bfloat16()
    topk, reconstruction = functools.partial(TopKSAE, d_in, d_sae, k), losses.reconstruction_loss
    made = {
        "floor, fp32 product": lambda: lambda: torch.mm(x[0], W.T, out=out),
        "floor, bf16 product": lambda: lambda: torch.mm(x16, W16.T, out=out16),
        "topk": lambda: ours(topk(), reconstruction, x),
        "topk, fp32 product": lambda: ours(topk(), reconstruction, x, certified=False),
        "topk, bf16": lambda: ours(topk(), reconstruction, x, bf16=True),
        "topk, dense": lambda: dense(x, d_in, d_sae, k),
        "topk, AuxK on a quarter": lambda: ours(topk(), reconstruction, x, dead=0.25),
    }
    for name, cls, loss in (("relu", ReluSAE, losses.l1_loss), ("gated", GatedSAE, losses.gated_loss)):
        for l0, when in ((0, ", half active"), (k, f", L0 {k}")):
            for bf16, precision in ((False, ""), (True, ", bf16")):
                made[name + when + precision] = functools.partial(one_of, cls, d_in, d_sae, loss, x, bf16=bf16, l0=l0)
    return made | public(x, d_in, d_sae, k)


def public(x, d_in, d_sae, k) -> dict:
    made = {}
    try:
        from dictionary_learning.trainers import gdm, standard, top_k
    except ImportError:
        pass
    else:

        def dictionary_learning(trainer, dead=0.0, **options):
            t = trainer(10_000, d_in, d_sae, layer=0, lm_name="", device=DEVICE, seed=0, **options)
            gone, count, batches = int(dead * d_sae), itertools.count(1), itertools.cycle(x)

            def step():
                if dead:
                    t.num_tokens_since_fired[:gone] = 1 << 60
                t.update(next(count), next(batches))

            return step

        made["dictionary_learning topk"] = lambda: dictionary_learning(top_k.TopKTrainer, k=k)
        made["dictionary_learning topk, AuxK"] = lambda: dictionary_learning(top_k.TopKTrainer, 0.25, k=k)
        made["dictionary_learning relu"] = lambda: dictionary_learning(standard.StandardTrainer)
        made["dictionary_learning gated"] = lambda: dictionary_learning(gdm.GatedSAETrainer)
    try:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput
    except ImportError:
        pass
    else:

        def sae_lens(dead=0.0, bf16=False):
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=DEVICE)).train()
            adam = torch.optim.Adam(sae.parameters(), lr=2e-4)
            mask, batches = torch.arange(d_sae, device=DEVICE) < dead * d_sae, itertools.cycle(x)

            def step():
                given = TrainStepInput(next(batches), sae.get_coefficients(), mask, 0, False)
                with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                    loss = sae.training_forward_pass(given).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
                adam.step()
                adam.zero_grad()

            return step

        made["SAELens topk"] = sae_lens
        made["SAELens topk, bf16"] = lambda: sae_lens(bf16=True)
        made["SAELens topk, AuxK"] = lambda: sae_lens(0.25)
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError:
        pass
    else:

        def sparsify(dead=0.0):
            sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=DEVICE)
            adam = torch.optim.Adam(sae.parameters(), lr=2e-4, fused=True)
            mask = torch.arange(d_sae, device=DEVICE) < dead * d_sae if dead else None
            batches = itertools.cycle(x)

            def step():
                sae.set_decoder_norm_to_unit_norm()
                out = sae(next(batches), dead_mask=mask)
                (out.fvu + out.auxk_loss / 32).backward()
                sae.remove_gradient_parallel_to_decoder_directions()
                torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
                adam.step()
                adam.zero_grad()

            return step

        made["sparsify topk"] = sparsify
        made["sparsify topk, AuxK"] = lambda: sparsify(0.25)
    return made


def synchronised(step) -> float:
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def compare(size: str, rounds: int, only: list[str]) -> None:
    d_in, d_sae, k, batch = map(int, size.split(","))
    chosen = {n: make for n, make in contenders(d_in, d_sae, k, batch).items() if wanted(n, only)}
    print(f"\nd_in {d_in}, d_sae {d_sae}, k {k}, batch {batch}; medians of {rounds}\n")
    print(f"{'':34s} {'ms':>9s} {'floors':>7s} {'tokens/s':>10s}")
    floor = chosen.pop("floor, fp32 product")()
    for name, make in chosen.items():  # one at a time in memory, a floor before each of its steps
        step = make()
        for _ in range(3):
            step()
        pairs = [(synchronised(floor), synchronised(step)) for _ in range(rounds)]
        ms = statistics.median(time for _, time in pairs)
        ratio = statistics.median(time / least for least, time in pairs)
        print(f"{name:34s} {ms:9.1f} {ratio:7.2f} {batch / ms * 1e3:10,.0f}", flush=True)
        del step


def wanted(name: str, only: list[str]) -> bool:
    return name == "floor, fp32 product" or not only or any(part in name for part in only)


def peak(size: str, name: str) -> None:
    """In a process of its own: the most memory over the data's, after three steps."""
    d_in, d_sae, k, batch = map(int, size.split(","))
    x = data(d_in, 8 * batch)
    make = contenders(d_in, d_sae, k, batch)[name]
    del x
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # forget the peak so far
    before = resident("VmRSS")
    step = make()
    for _ in range(3):
        step()
    print(f"{name:34s} {(resident('VmHWM') - before) / 2**20:6.2f} GiB")


def resident(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], help="parts of contenders' names")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peak_of:
        peak(a.sizes[0], a.peak_of)
        sys.exit()
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
    for size in a.sizes:
        if a.memory:
            print(f"\npeak memory, {size}", flush=True)
            for name in contenders(*map(int, size.split(","))):
                if wanted(name, a.only) and not name.startswith("floor"):
                    subprocess.run([sys.executable, __file__, "--sizes", size, "--peak-of", name], check=True)
        else:
            compare(size, a.rounds, a.only)
