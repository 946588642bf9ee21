"""The ReLU SAE: every positive latent."""

import torch
from torch import Tensor

from ..sparse.select_encode import relu_encode
from ..values import flag
from .base import SAE, SAEOutput


class ReluSAE(SAE):
    """Keep every positive latent; sparsity comes from the L1 penalty of `l1_loss` (the baseline of arXiv 2404.16014).

    f = relu((x − b_dec) W_enc + b_enc),    x̂ = f W_dec + b_dec

    free_norm: train rows V of any norm, of which W_dec = V / ‖V‖ is used (the decoder of arXiv 2405.12241, normalised inside
    the forward). Gradients pass through the division, which shortens them by ‖V‖; `decoder_norm` [d_sae] keeps ‖V‖. Without
    it, ‖V‖ goes back to 1 after every step.

    >>> sae = ReluSAE(8, 32)
    >>> sae.encode(sae.W_dec[:1])[0, 0].round(decimals=4)  # a token that is a latent's own direction
    tensor(1.)
    """

    architecture = "standard"
    objective = "l1_loss"

    def __init__(self, d_in: int, d_sae: int, free_norm: bool = False):
        super().__init__(d_in, d_sae)
        self.free_norm = flag("free_norm", free_norm)
        if free_norm:
            self.register_buffer("decoder_norm", torch.ones(d_sae))

    def revive(self, latents: Tensor) -> None:
        super().revive(latents)
        if self.free_norm:
            self.decoder_norm[latents] = 1

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        super().project_decoder_gradient()
        if self.free_norm and self.W_dec.grad is not None:
            self.W_dec.grad /= self.decoder_norm[:, None]

    @torch.no_grad()
    def before_step(self) -> None:
        if self.free_norm and self.W_dec.grad is not None:  # Adam moves V
            self.W_dec *= self.decoder_norm[:, None]

    @torch.no_grad()
    def after_step(self) -> None:
        if self.free_norm and self.W_dec.grad is not None:
            self.decoder_norm.copy_(self.W_dec.norm(dim=1))
        super().after_step()

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        return self.output(x, *relu_encode(self.rows(x), self.W_enc, self.b_enc, self.b_dec))
