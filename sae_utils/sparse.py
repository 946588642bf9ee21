"""Top-k encoding and sparse decoding with hand-written backward passes.

After the selection only the k active latents of each token exist: values and indices, both [batch, k]. Products with W_dec
and the weight gradients touch those entries alone. Gradients follow the selection as it was made (its indices are
constants); an entry that ReLU set to zero gets none. The dense form of both functions, which the tests hold them to, is

    z = relu((x − b_dec) W_enc + b_enc);  latents = z where z is among its row's k largest, else 0;  x̂ = latents W_dec + b_dec
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """(x − b_dec) W_enc + b_enc, [batch, d_sae], by one product: the centring is moved into the bias."""
    return torch.addmm(b_enc - b_dec @ W_enc, x, W_enc)


def weight_gradient(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """Fᵀ rows, [d_sae, d_in], where F [batch, d_sae] has `values` at `indices`: one bag of tokens for every latent."""
    order = indices.flatten().argsort(stable=True)
    start = torch.zeros(d_sae, dtype=torch.long, device=indices.device)
    start[1:] = torch.bincount(indices.flatten(), minlength=d_sae)[:-1].cumsum(0)
    token = order.div(indices.shape[1], rounding_mode="floor")
    return embedding_bag(token, rows, start, per_sample_weights=values.flatten()[order], mode="sum")


class TopKEncode(torch.autograd.Function):
    """(x, W_enc, b_enc, b_dec) → values [batch, k] ≥ 0 and their indices."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, k):
        values, indices = pre_activations(x, W_enc, b_enc, b_dec).topk(k, dim=1, sorted=False)
        values = values.relu_().to(W_enc.dtype)  # under autocast the product is bf16
        ctx.save_for_backward(x, W_enc, b_dec, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad_values, _):
        x, W_enc, b_dec, values, indices = ctx.saved_tensors
        d_sae = W_enc.shape[1]
        grad = grad_values.contiguous() * (values > 0)
        grad_b_enc = torch.zeros(d_sae, dtype=grad.dtype, device=grad.device)
        grad_b_enc.index_add_(0, indices.flatten(), grad.flatten())
        grad_W = weight_gradient(grad, indices, x, d_sae) - grad_b_enc[:, None] * b_dec  # [d_sae, d_in]
        grad_x = (
            embedding_bag(indices, W_enc.T, per_sample_weights=grad, mode="sum") if ctx.needs_input_grad[0] else None
        )
        return grad_x, grad_W.T, grad_b_enc, -(grad_b_enc @ W_enc.T), None


class SparseDecode(torch.autograd.Function):
    """(values, indices, W_dec) → Σ_j values_j W_dec[indices_j], [batch, d_in]."""

    @staticmethod
    def forward(ctx, values, indices, W_dec):
        ctx.save_for_backward(values, indices, W_dec)
        return embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        values, indices, W_dec = ctx.saved_tensors
        batch, k = indices.shape
        grad = grad.contiguous()
        grad_values = grad_W_dec = None
        if ctx.needs_input_grad[0]:
            offsets = torch.arange(0, batch * k, k, device=indices.device)
            bag = torch.arange(batch, device=indices.device).repeat_interleave(k)
            flat = indices.flatten()
            grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, W_dec, flat, offsets, bag, 0)
            grad_values = grad_values.view(batch, k)
        if ctx.needs_input_grad[2]:
            grad_W_dec = weight_gradient(values, indices, grad, W_dec.shape[0])
        return grad_values, None, grad_W_dec


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu((x − b_dec) W_enc + b_enc) per row: values [batch, k] (≥ 0, unsorted) and indices [batch, k]."""
    return TopKEncode.apply(x, W_enc, b_enc, b_dec, k)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Σ_j values[b, j] · W_dec[indices[b, j]], [batch, d_in]."""
    return SparseDecode.apply(values, indices, W_dec)


def densify(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """The dense [batch, d_sae] view of sparse latents; gradients reach `values`."""
    return torch.zeros(len(values), d_sae, dtype=values.dtype, device=values.device).scatter(1, indices, values)
