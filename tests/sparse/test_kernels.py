"""The Triton kernels against plain PyTorch: interpreted on the CPU, on the GPU where there is one, and compiled for others.

Triton reads TRITON_INTERPRET when it is imported, for good: all cases are interpreted in one process of their own.
"""

import json
import os
import subprocess
import sys
import traceback

import pytest
import torch
from torch.nn.functional import embedding_bag

pytestmark = pytest.mark.triton
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def normal(*shape, device, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check_selection(z, k):
    from sae_utils.sparse import kernels

    values, indices = kernels.select(z, k)
    assert values.dtype == z.dtype and indices.dtype == torch.int64 and values.shape == indices.shape == (len(z), k)
    assert (indices.sort(1).values.diff() > 0).all(), "an index twice in a row"
    assert torch.equal(values, z.gather(1, indices)), "values are not those at the indices"
    torch.testing.assert_close(values.sort(1).values, z.topk(k).values.sort(1).values, rtol=0, atol=0)
    if z.is_cuda:  # interpreted, programs run one by one
        again = kernels.select(z, k)
        assert torch.equal(again[0], values) and torch.equal(again[1], indices), "not the same twice"


@case
def selection_of_random_rows(device):
    for d, k in [(256, 8), (1000, 5), (513, 100), (4096, 32), (100, 1), (1, 1)]:
        for dtype in (torch.float32, torch.bfloat16):
            check_selection(normal(2, d, device=device, dtype=dtype), k)
    z = normal(3, 300, device=device)
    check_selection(-z.abs() - 1, 20)
    check_selection(-z.bfloat16().abs() - 1, 20)
    check_selection(z.exp() * 1e-42, 20)  # denormal numbers
    check_selection(z.sign() * (20 * z).exp(), 20)


@case
def selection_of_all_and_of_all_but_one(device):
    for d in (2, 37, 64):
        for dtype in (torch.float32, torch.bfloat16):
            for k in (d, d - 1):
                check_selection(normal(2, d, device=device, dtype=dtype), k)


@case
def selection_with_ties(device):
    few = normal(2, 150, device=device).mul(1.5).round()
    for z in (few, few.clamp(min=0), few.clamp(max=0), torch.full_like(few, -3.0), -0.0 * few):
        for dtype in (torch.float32, torch.bfloat16):
            for k in (1, 30, 149):
                check_selection(z.to(dtype), k)


@case
def selection_of_infinities_and_nan(device):
    from sae_utils.sparse import kernels

    z = normal(4, 90, device=device)
    z[0] = -torch.inf
    z[1, 5:] = -torch.inf
    z[2, ::2] = torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        check_selection(z.to(dtype), 8)
        broken = z.to(dtype, copy=True)
        broken[3, 70], broken[3, 11] = torch.nan, -torch.tensor(torch.nan)
        values, indices = kernels.select(broken, 4)
        assert {11, 70} < set(indices[3].tolist()) and values[3].isnan().sum() == 2, "NaN would go unseen"


@case
def selection_from_views(device):
    z = normal(6, 403, device=device)
    for view in (z[:, 3:301], z[1::2], z[:, ::2], z[:, :8].T, z[:0]):
        check_selection(view, 4)


@case
def what_cannot_be_selected_is_refused(device):
    from sae_utils.sparse import kernels

    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k = {k} of 8 values.*1 ≤ k ≤ 8"):
            kernels.select(torch.zeros(2, 8, device=device), k)
    with pytest.raises(ValueError, match="float16.*float32 or bfloat16"):
        kernels.select(torch.zeros(2, 8, device=device, dtype=torch.float16), 2)


def entries(sizes, m, device, seed=0):
    """values, indices and offsets of bags of these sizes, with indices below m."""
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    indices = torch.randint(m, (sum(sizes),), generator=torch.Generator().manual_seed(seed))
    return normal(sum(sizes), device=device, seed=seed + 1), indices.to(device), offsets.to(device)


def check_bags(sizes, rows):
    """bag_sum against embedding_bag in float64, and bag_dot against its gradient's closed form."""
    from sae_utils.sparse import kernels

    values, indices, offsets = entries(sizes, len(rows), rows.device)
    exact = embedding_bag(
        indices, rows.double(), offsets, per_sample_weights=values.double(), mode="sum", include_last_offset=True
    )
    sums = kernels.bag_sum(values, indices, offsets, rows)
    torch.testing.assert_close(sums, exact.float(), rtol=1e-5, atol=1e-5)  # tf32 and bf16 sums are off by 1e-3
    if rows.is_cuda:
        assert torch.equal(sums, kernels.bag_sum(values, indices, offsets, rows)), "not the same twice"
    bag = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), offsets.diff())
    other = normal(len(sizes), rows.shape[1], device=rows.device, dtype=rows.dtype, seed=7)
    dots = kernels.bag_dot(other, indices, offsets, rows)
    exact = (other[bag].double() * rows[indices].double()).sum(1)
    torch.testing.assert_close(dots, exact.float(), rtol=1e-5, atol=1e-5)
    return sums


@case
def bags_of_one_size(device):
    for d in (1, 48, 100, 300):
        for dtype in (torch.float32, torch.bfloat16):
            check_bags([3] * 4, normal(20, d, device=device, dtype=dtype))


@case
def empty_bags_and_no_bags(device):
    rows = normal(20, 40, device=device)
    assert not check_bags([0, 0, 5, 0, 1, 0], rows)[[0, 1, 3, 5]].any()
    assert check_bags([0, 0], rows).shape == (2, 40)
    assert check_bags([], rows).shape == (0, 40)


@case
def bags_longer_than_one_program_takes(device):
    from sae_utils.sparse import kernels

    rows, whole, kernels.LONGEST = normal(20, 24, device=device), kernels.LONGEST, 8
    try:
        for sizes in ([100], [0, 9, 9, 9, 0], [8, 16, 8, 24], [3, 50, 0, 2, 1, 60, 7, 17, 9], [17, 15, 17, 0]):
            check_bags(sizes, rows)
        check_bags(sizes, rows.bfloat16())
    finally:
        kernels.LONGEST = whole
    check_bags([1, 2 * whole + 3, 0, whole], rows[:, :4])


@case
def bags_of_rows_that_are_not_contiguous(device):
    rows = normal(40, 60, device=device)
    for view in (rows.T, rows[:, 5:35], rows[::3], rows[:, ::2]):
        check_bags([2, 0, 4], view)


@case
def both_gradients_of_a_decoder(device):
    """x_hat = F W: a latent that fires on every token, and one that never does; gradients by autograd of the dense form."""
    from sae_utils.sparse import kernels

    batch, k, d, d_sae = 30, 3, 20, 12
    indices = torch.stack([torch.cat([torch.zeros(1), torch.randperm(d_sae - 2)[: k - 1] + 1]) for _ in range(batch)])
    indices, values = indices.long().to(device), normal(batch, k, device=device)
    W, grad = normal(d_sae, d, device=device, seed=2).requires_grad_(), normal(batch, d, device=device, seed=3)
    dense = torch.zeros(batch, d_sae, device=device).scatter(1, indices, values).requires_grad_()
    x_hat = dense @ W
    x_hat.backward(grad)
    by_token = torch.arange(0, batch * k + 1, k, device=device)
    close = dict(rtol=1e-5, atol=1e-5)
    decoded = kernels.bag_sum(values.flatten(), indices.flatten(), by_token, W.detach())
    torch.testing.assert_close(decoded, x_hat.detach(), **close)
    grad_values = kernels.bag_dot(grad, indices.flatten(), by_token, W.detach())
    torch.testing.assert_close(grad_values.view(batch, k), dense.grad.gather(1, indices), **close)
    latent, order = indices.flatten().sort(stable=True)
    by_latent = torch.searchsorted(latent, torch.arange(d_sae + 1, device=device))
    grad_W = kernels.bag_sum(values.flatten()[order], order // k, by_latent, grad)
    torch.testing.assert_close(grad_W, W.grad, **close)


@pytest.fixture(scope="session")
def interpreted():
    """The error of each case, or "", on the CPU."""
    command = [sys.executable, __file__]
    process = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreted):
    if interpreted[name]:
        pytest.fail(interpreted[name], pytrace=False)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    CASES[name]("cuda")


@pytest.mark.cuda
def test_tensors_of_more_than_2_to_the_31_elements_on_a_gpu():
    from sae_utils.sparse import kernels

    W = torch.zeros(2**20 + 8, 2**11, dtype=torch.bfloat16, device="cuda")  # 4.3 GB
    W[-1] = 2
    z = torch.as_strided(W, (2, 2**11), (2**31 + 2**12, 1))
    z[1, 7] = 5
    assert kernels.select(z, 1)[1][1].item() == 7
    last = torch.full((4,), len(W) - 1, device="cuda")
    offsets = torch.tensor([0, 4], device="cuda")
    assert (kernels.bag_sum(torch.ones(4, device="cuda"), last, offsets, W) == 8).all()
    assert (kernels.bag_dot(W[-1:], last, offsets, W) == 2**13).all()


def launches(monkeypatch, kernel_names, call):
    """(kernel, its arguments by name, num_warps) of each launch that `call` makes; nothing is run."""
    from sae_utils.sparse import kernels

    seen = []

    class Launch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def record(*args, num_warps, **named):
                seen.append((self.kernel, dict(zip(self.kernel.arg_names, args)) | named, num_warps))

            return record

    with monkeypatch.context() as patch:
        for name in kernel_names:
            patch.setattr(kernels, name, Launch(getattr(kernels, name)))
        call(kernels)
    return seen


@pytest.mark.parametrize("capability, dtype", [(75, torch.float32), (80, torch.float32), (90, torch.bfloat16)])
def test_compiles_for_gpus_that_are_not_here(capability, dtype, monkeypatch, tmp_path):
    """What the interpreter takes the compiler may refuse. The sizes are those of real training."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    def calls(kernels):
        for d_sae, k in [(8192, 32), (65536, 128), (100, 100)]:
            kernels.select(torch.empty(1, d_sae, dtype=dtype), k)
        rows = torch.empty(2, 768, dtype=dtype)
        for sizes in ([kernels.LONGEST + 1, 0], [kernels.LONGEST + 1], [1, 0]):
            values, indices, offsets = entries(sizes, 2, "cpu")
            kernels.bag_sum(values, indices, offsets, rows)
        kernels.bag_dot(rows, indices, offsets, rows)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ["select_kernel", "pieces_kernel", "bag_sum_kernel", "bag_dot_kernel"]
    recorded = launches(monkeypatch, names, calls)
    assert {kernel.__name__ for kernel, *_ in recorded} == set(names) and len(recorded) == 9
    for kernel, arguments, num_warps in recorded:
        one = [
            name for name, value in arguments.items() if type(value) is int and value == 1
        ]  # as at a launch, where a 1 is compiled in
        fixed = {p.name for p in kernel.params if p.is_constexpr} | set(one)
        types = {p.name: "constexpr" if p.name in fixed else mangle_type(arguments[p.name]) for p in kernel.params}
        constants = {(p.num,): arguments[p.name] for p in kernel.params if p.name in fixed}
        aligned = {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if types[p.name].startswith("*")}
        source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
        assert compiled.asm["cubin"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    errors = dict.fromkeys(CASES, "")
    for name, function in CASES.items():
        try:
            function("cpu")
        except BaseException:
            errors[name] = traceback.format_exc()
    print(json.dumps(errors))
