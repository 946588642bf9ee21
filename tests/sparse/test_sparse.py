"""The sparse encoder and decoder against the dense form that defines them: values and every gradient."""

import os
import subprocess
import sys

import pytest
import torch

from sae_utils.sparse import select_encode as sparse
from sae_utils.sparse import selection
from sae_utils.sparse.bags import Active, stable_order, triton_for
from sae_utils.sparse.select_encode import densify, relu_encode, sparse_decode, topk_encode
from sae_utils.sparse.selection import certified, largest, top_of_product, topk


def dense_form(x, W_enc, b_enc, b_dec, W_dec, k):
    """The oracle: a dense mask, plain autograd."""
    z = ((x - b_dec) @ W_enc + b_enc).relu()
    mask = torch.zeros_like(z).scatter(1, z.topk(k, dim=1).indices, 1.0)
    return (z * mask) @ W_dec + b_dec


def sparse_form(x, W_enc, b_enc, b_dec, W_dec, k):
    values, active = topk_encode(x, W_enc, b_enc, b_dec, k)
    return sparse_decode(values, active, W_dec) + b_dec


def problem(batch, d_in, d_sae, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, d_in), (d_in, d_sae), (d_sae,), (d_in,), (d_sae, d_in)]
    x, W_enc, b_enc, b_dec, W_dec = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    tensors = [x, W_enc / d_in**0.5, b_enc, b_dec, W_dec / d_in**0.5]
    return [t.requires_grad_() for t in tensors]


def assert_same(tensors, k, tolerance=1e-5):
    names = "x W_enc b_enc b_dec W_dec".split()
    target = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(99), dtype=tensors[0].dtype)
    results = []
    for form in (dense_form, sparse_form):
        x_hat = form(*tensors, k)
        results.append((x_hat, torch.autograd.grad((x_hat - target).square().mean(), tensors)))
    (x_dense, g_dense), (x_sparse, g_sparse) = results
    torch.testing.assert_close(x_sparse, x_dense, rtol=tolerance, atol=tolerance)
    for name, a, b in zip(names, g_dense, g_sparse):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("batch, d_in, d_sae, k", [(7, 5, 16, 3), (64, 32, 128, 8), (33, 17, 61, 1), (9, 8, 24, 24), (1, 4, 8, 2)])  # fmt: skip
def test_agrees_with_the_dense_form(batch, d_in, d_sae, k):
    assert_same(problem(batch, d_in, d_sae, seed=k), k)


def test_random_shapes():
    generator = torch.Generator().manual_seed(1)
    for seed in range(20):
        batch, d_in, d_sae = (int(torch.randint(1, high, (), generator=generator)) for high in (40, 30, 90))
        k = int(torch.randint(1, d_sae + 1, (), generator=generator))
        assert_same(problem(batch, d_in, d_sae, seed), k)


def test_rows_without_a_positive_pre_activation_give_b_dec_and_no_gradient():
    x, W_enc, b_enc, b_dec, W_dec = problem(6, 5, 12)
    with torch.no_grad():
        b_enc -= 100
    assert_same([x, W_enc, b_enc, b_dec, W_dec], k=4)
    values, _ = topk_encode(x, W_enc, b_enc, b_dec, 4)
    assert (values == 0).all()
    gradients = torch.autograd.grad(values.sum(), [x, W_enc, b_enc])
    assert all((g == 0).all() for g in gradients)


def test_ties_keep_k_entries():
    x = torch.ones(3, 2)
    values, active = topk_encode(x, torch.ones(2, 6), torch.zeros(6), torch.zeros(2), 4)
    assert values.tolist() == [2.0] * 12
    assert all(len(set(row)) == 4 for row in active.indices.view(3, 4).tolist())


def test_gradcheck():
    tensors = problem(4, 3, 7, seed=3, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda *t: sparse_form(*t, 2), tensors)


def test_kernels_take_over_where_they_can():
    assert bool(triton_for(torch.zeros(1))) == (os.environ.get("TRITON_INTERPRET") == "1")
    assert triton_for(torch.zeros(1, dtype=torch.double)) is None


@pytest.mark.triton
def test_the_same_with_interpreted_triton_kernels():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "agrees or gradients or positive or take_over"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and "8 passed" in run.stdout, run.stdout + run.stderr


def test_densify_by_hand():
    active = Active(torch.tensor([2, 0, 3]), torch.tensor([0, 2, 2, 3]), 4)  # tokens with 2, 0 and 1 active latents
    dense = densify(torch.tensor([3.0, 1.0, 2.0]), active)
    assert dense.tolist() == [[1.0, 0.0, 3.0, 0.0], [0.0] * 4, [0.0, 0.0, 0.0, 2.0]]
    assert active.token.tolist() == [0, 0, 2]
    order, token, offsets = active.by_latent
    assert (order.tolist(), token.tolist(), offsets.tolist()) == ([1, 0, 2], [0, 0, 2], [0, 1, 1, 2, 3])


@pytest.mark.parametrize("n, k", [(96, 3), (97, 3), (4096, 8), (4099, 8), (1000, 60), (64, 64), (5, 1), (70, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("select", [largest, topk])
def test_selection_is_exact(n, k, dtype, select):
    z = torch.randn(50, n, generator=torch.Generator().manual_seed(n)).to(dtype)  # in bfloat16 with many ties
    z[0] = -1.0
    z[1, : n // 2] = float("-inf")
    z[2, : n // 2], z[3], z[4, 0] = float("inf"), 0.0, -0.0
    z[3, ::2] = -0.0
    for nan in (False, True):  # which counts as the largest, whatever its sign
        z[5, 1], z[6, 2] = (float("nan"), -float("nan")) if nan else (1, 2)
        values, columns = select(z, k)
        expected = z.topk(k, 1).values.sort(1).values
        torch.testing.assert_close(values.sort(1).values, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(z.gather(1, columns), values, rtol=0, atol=0, equal_nan=True)
        assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("n", [2, 300, 2**16, 2**16 + 1])
def test_a_stable_order_by_hand_and_for_numbers_of_16_bits_and_more(n):
    assert stable_order(torch.tensor([1, 0, 1, 0]), n).tolist() == [1, 3, 0, 2]
    numbers = torch.randint(0, n, (1000,), generator=torch.Generator().manual_seed(n))
    numbers[::10] = n - 1
    assert torch.equal(stable_order(numbers, n), numbers.argsort(stable=True))


@pytest.mark.parametrize("make", ["plain", "close", "ties", "large bias", "negative", "nan"])
def test_certified_selection_equals_that_of_the_fp32_product(make):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(200, 64, generator=generator), torch.randn(512, 64, generator=generator) / 8
    b = torch.zeros(512)
    if make == "close":  # rows of W that bfloat16 cannot tell apart
        W[1:] = W[0] + 1e-4 * torch.randn(511, 64, generator=generator)
    if make == "ties":
        W[256:] = W[:256]
    if make == "large bias":
        b = 100 + torch.randn(512, generator=generator)
    if make == "negative":
        b -= 100
    if make == "nan":
        x[3, 5] = float("nan")
    values, columns = certified(x, W.T, b, 8)
    exact = (x.double() @ W.double().T + b.double()).topk(9, 1).values
    torch.testing.assert_close(
        values.double().sort(1, descending=True).values, exact[:, :8], equal_nan=True, rtol=2e-6, atol=2e-6
    )
    assert all(len(set(row)) == 8 for row in columns.tolist())


def test_too_few_candidates_would_be_noticed(monkeypatch):
    """The rows that the bound leaves open are the ones redone: with a bound of -inf the wrong latents come through."""
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, 64, generator=generator), torch.randn(512, 64, generator=generator) / 8
    W[1:] = W[0] + 1e-4 * W[1:]
    exact = (x.double() @ W.double().T).topk(8, 1).values.sum()
    asked = []
    monkeypatch.setattr(selection, "largest", lambda z, k: asked.append(z.shape) or largest(z, k))
    values, _ = certified(x, W.T, torch.zeros(512), 8)
    assert len(asked) == 2 and asked[1][0] > 40  # nearly every row again
    torch.testing.assert_close(values.double().sum(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_larger_than_the_workspace_are_split(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, 16, generator=generator), torch.randn(64, 16, generator=generator).T
    whole = top_of_product(x, W, torch.zeros(64), 4, dtype)
    monkeypatch.setattr(selection, "WORKSPACE", 64 * 7)
    parts = top_of_product(x, W, torch.zeros(64), 4, dtype)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_few_active_latents_make_the_sparse_form_and_both_have_the_same_gradients(monkeypatch):
    x, W_enc, b_enc, b_dec, W_dec = tensors = problem(30, 12, 200, seed=5)
    with torch.no_grad():
        b_enc -= 3
    results = []
    for few in (1 / 32, 0):
        monkeypatch.setattr(sparse, "FEW", few)
        f, active = relu_encode(x, W_enc, b_enc, b_dec)
        assert (active is None) == (few == 0) and (active is None or 0 < len(f) < 200)
        dense = f if active is None else densify(f, active)
        x_hat = dense @ W_dec if active is None else sparse_decode(f, active, W_dec)
        torch.testing.assert_close(dense, ((x - b_dec) @ W_enc + b_enc).relu())
        results.append(torch.autograd.grad((x_hat - x).square().sum() + f.sum(), tensors))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
