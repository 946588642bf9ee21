"""The ReLU SAE: every positive latent."""

from torch import Tensor

from ..sparse.select_encode import relu_encode
from .base import SAE, SAEOutput


class ReluSAE(SAE):
    """Keep every positive latent; sparsity comes from the L1 penalty of `l1_loss` (the baseline of arXiv 2404.16014).

    f = relu((x − b_dec) W_enc + b_enc),    x̂ = f W_dec + b_dec

    >>> sae = ReluSAE(8, 32)
    >>> sae.encode(sae.W_dec[:1])[0, 0].round(decimals=4)  # a token that is a latent's own direction
    tensor(1.)
    """

    architecture = "standard"
    objective = "l1_loss"

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        return self.output(x, *relu_encode(self.rows(x), self.W_enc, self.b_enc, self.b_dec))
