"""The sparse encoder and decoder against the dense form that defines them: values and every gradient."""

import pytest
import torch

from sae_utils.sparse import densify, sparse_decode, topk_encode


def dense_form(x, W_enc, b_enc, b_dec, W_dec, k):
    """The oracle: a dense mask, plain autograd."""
    z = ((x - b_dec) @ W_enc + b_enc).relu()
    mask = torch.zeros_like(z).scatter(1, z.topk(k, dim=1).indices, 1.0)
    return (z * mask) @ W_dec + b_dec


def sparse_form(x, W_enc, b_enc, b_dec, W_dec, k):
    values, indices = topk_encode(x, W_enc, b_enc, b_dec, k)
    return sparse_decode(values, indices, W_dec) + b_dec


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
    values, indices = topk_encode(x, torch.ones(2, 6), torch.zeros(6), torch.zeros(2), 4)
    assert values.tolist() == [[2.0] * 4] * 3
    assert all(len(set(row)) == 4 for row in indices.tolist())


def test_gradcheck():
    tensors = problem(4, 3, 7, seed=3, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda *t: sparse_form(*t, 2), tensors)


def test_densify_by_hand():
    dense = densify(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([[2, 0], [1, 3]]), 4)
    assert dense.tolist() == [[1.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
