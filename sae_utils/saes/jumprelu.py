"""The JumpReLU SAE: every latent above a threshold of its own."""

import torch
from torch import Tensor, nn

from ..values import real
from .base import SAEOutput
from .gated import GatedSAE
from .relu import ReluSAE


class JumpReluSAE(ReluSAE):
    """Keep a latent where it exceeds a threshold of its own: f = z ⊙ 1[z > θ], z = (x − b_dec) W_enc + b_enc, θ ≥ 0.

    The inference form of gated (`to_jumprelu`) and threshold SAEs, and an architecture of its own (arXiv 2407.14435, train with
    `jumprelu_loss`): the step has no gradient, so θ gets that of a step smeared over `bandwidth`. Bandwidth, and the θ at the
    start of training, are in units of σ = √d_in · x_scale, about the root mean square of ‖x − x̄‖ (0.03 and equal: ours).

    >>> sae = JumpReluSAE(1, 2).requires_grad_(False)
    >>> _, _ = sae.W_enc.fill_(1.0), sae.threshold.fill_(0.5)
    >>> sae.encode(torch.tensor([[0.4], [0.6]]))
    tensor([[0.0000, 0.0000],
            [0.6000, 0.6000]])
    """

    architecture = "jumprelu"
    objective = "jumprelu_loss"
    in_units_of_x = ("b_enc", "b_dec", "threshold")

    def __init__(self, d_in: int, d_sae: int, bandwidth: float = 0.03):
        super().__init__(d_in, d_sae)
        self.bandwidth = real("bandwidth", bandwidth, above=0)
        self.threshold = nn.Parameter(torch.zeros(d_sae))

    def width(self) -> Tensor:
        """The bandwidth in units of x."""
        return self.bandwidth * self.d_in**0.5 * self.x_scale

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        z = self.pre_activations(x)
        active = step(z, self.threshold, self.width())
        # z · step would send θ the gradient −z/ε near θ; the paper's is −θ/ε, of the same smeared step
        f = z * active.detach() + self.threshold * (active - active.detach())
        return self.output(x, f, step=active)

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        first = not self.initialised
        super().initialise(rows)
        if first:
            self.threshold.fill_(self.width())

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self.threshold.clamp_(min=0)


class Step(torch.autograd.Function):
    """1[z > θ]; backward to θ as if the step were a ramp of width ε centred at θ: −1[|z − θ| < ε/2]/ε; none to z."""

    @staticmethod
    def forward(ctx, z, threshold, width):
        ctx.save_for_backward(z, threshold, width)
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, threshold, width = ctx.saved_tensors
        near = (z - threshold).abs() < width / 2
        return None, -(grad * near).sum(0) / width, None


step = Step.apply


@torch.no_grad()
def to_jumprelu(sae: GatedSAE) -> JumpReluSAE:
    """The JumpReLU SAE with the same latents and reconstructions as a tied gated one.

    1[π > 0] relu(m) with m = exp(r_mag) (π − b_gate) + b_mag is m where m > θ = max(b_mag − exp(r_mag) b_gate, 0), else 0
    (the max is ours: without it a negative m would pass where the gate is open).

    >>> gated, x = GatedSAE(8, 32), torch.randn(5, 8)
    >>> torch.allclose(to_jumprelu(gated).encode(x), gated.encode(x), atol=1e-6)
    True
    """
    if not (isinstance(sae, GatedSAE) and sae.tied):
        raise ValueError(f"{sae!r}: only a tied GatedSAE has a JumpReLU form")
    made = JumpReluSAE(sae.d_in, sae.d_sae).to(sae.W_dec)
    scale = sae.r_mag.exp()
    made.W_enc.copy_(sae.W_enc * scale)
    made.b_enc.copy_(sae.b_mag)
    made.threshold.copy_((sae.b_mag - scale * sae.b_gate).clamp_min(0))
    for name in ("W_dec", "b_dec", "tokens_since_fired", "initialised", "x_scale"):
        getattr(made, name).copy_(getattr(sae, name))
    made.dead_after = sae.dead_after
    return made.train(sae.training)
