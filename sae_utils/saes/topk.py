"""The TopK SAE: the k largest latents of every token."""

from torch import Tensor

from ..sparse.bags import Active
from ..sparse.select_encode import topk_encode
from ..values import whole
from .base import SAE, SAEOutput


class TopKSAE(SAE):
    """Keep the k largest latents of every token (arXiv 2406.04093; the base of arXiv 2411.10397 and 2410.14670).

        latents = TopK(relu((x − b_dec) W_enc + b_enc)),    x̂ = latents W_dec + b_dec

    k: active latents per token, 1 ≤ k ≤ d_sae; fewer where fewer pre-activations are positive.

    >>> sae = TopKSAE(8, 32, k=2)
    >>> int((sae.encode(torch.randn(100, 8)) > 0).sum(1).max())
    2
    """

    architecture = "topk"

    def __init__(self, d_in: int, d_sae: int, k: int = 32):
        super().__init__(d_in, d_sae)
        self.k = whole("k", k, 1, self.d_sae)

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        out = self.output(x, *self.select(self.rows(x), grad))
        out.values, out.indices, out.offsets = out.values.view(-1, self.k), out.indices.view(-1, self.k), None
        return out

    def select(self, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, Active]:
        """Values [batch · k] and where they are."""
        return topk_encode(rows, self.W_enc, self.b_enc, self.b_dec, self.k)
