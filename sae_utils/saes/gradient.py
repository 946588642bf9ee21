"""The gradient SAE: latents selected by their effect on the model's loss as well."""

import warnings

import torch
from torch import Tensor

from ..sparse.bags import Active
from ..sparse.select_encode import gradient_encode
from ..values import flag, real
from .base import SAEOutput, scale_of
from .topk import TopKSAE


class GradientSAE(TopKSAE):
    """TopK that prefers latents to which the model's loss is sensitive (arXiv 2411.10397; our reading, no code is public).

        latents = z on the k largest of z (1 + β |W_dec g| / m),    z = relu((x − b_dec) W_enc + b_enc),    g = ∇ₓ loss

    `grad`: g shaped like x, a constant; a row of zeros (masked) is selected as in TopK. m = `gradient_scale` is a running mean
    of |W_dec g| over latents and tokens with a gradient (0.99 of the old, 0.01 of each training batch; ours), so that β has no
    units. Before any training batch, m is the mean of the batch at hand. Without `grad`, in `encode`, or with β = 0: plain TopK.

    signed: the k largest of z (z − β σ W_dec g / m) instead, σ = `x_scale` (ours); fewer where fewer scores are positive. Latent i
    takes about z² off the squared error, and −z W_dec_i · g off the loss, to first order: both count, in one unit, while
    |W_dec g| also prefers latents that harm.
    `selected_by_gradient` trains with gradients that are made anew in each step, at x̂ say.

    Raises ValueError for a grad of another shape or β < 0, FloatingPointError for NaN or inf; all zeros give a UserWarning.

    >>> sae, x, g = GradientSAE(8, 32, k=2), torch.randn(5, 8), torch.randn(5, 8)
    >>> sae(x, g).indices.shape
    torch.Size([5, 2])
    """

    def __init__(self, d_in: int, d_sae: int, k: int = 32, beta: float = 1.0, signed: bool = False):
        super().__init__(d_in, d_sae, k)
        self.beta, self.signed = real("beta", beta, 0), flag("signed", signed)
        self.register_buffer("gradient_scale", torch.tensor(0.0))

    @property
    def needs_grad(self) -> bool:
        return self.beta > 0

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        if grad is not None and grad.shape != x.shape:
            raise ValueError(f"grad has shape {list(grad.shape)}: it has to be that of x, {list(x.shape)}")
        return super().forward(x, grad)

    def select(self, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, Active]:
        if grad is None or not self.beta:
            return super().select(rows, None)
        g = self.rows(grad).detach()
        n = int((g != 0).any(1).sum()) * self.d_sae  # a NaN counts as well
        if not torch.isfinite(g.sum()):
            raise FloatingPointError("grad holds NaN or infinite values: the model's loss has no usable gradient there")
        if not n:
            warnings.warn("grad is zero for every token of the batch: the selection is plain TopK's")
            return super().select(rows, None)
        scale = self.gradient_scale.clone()
        if not scale:
            scale = sum((part @ self.W_dec.detach().T).abs().sum() for part in g.split(1024)) / n
        weight = self.beta / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        if self.signed:
            weight = weight * (self.x_scale if self.x_scale else scale_of(rows))
        weights = self.W_enc, self.b_enc, self.b_dec
        values, active, total = gradient_encode(rows, *weights, self.k, g, self.W_dec, weight, self.signed)
        if not torch.isfinite(total):
            raise FloatingPointError("grad is too large: the sum of |W_dec g| overflows. Divide grad by a constant")
        if self.training:
            self.gradient_scale.copy_(scale.lerp((total / n).to(scale.dtype), 0.01))
        return values, active
