"""The Gated SAE: which latents are active and how active they are, decided apart."""

import torch
from torch import Tensor, nn

from ..sparse.select_encode import at, encode_at, pre_activations, relu_encode
from ..values import flag
from .base import SAEOutput
from .relu import ReluSAE


class GatedSAE(ReluSAE):
    """Which latents are active and how active they are, decided apart (arXiv 2404.16014, eq. 5–7; train with `gated_loss`).

        π = (x − b_dec) W_enc + b_gate,    f = 1[π > 0] ⊙ relu((x − b_dec) W_mag + b_mag),    W_mag = W_enc diag(exp(r_mag))

    W_enc is the paper's W_gate. Ablations: `tied=False` gives W_mag [d_in, d_sae] as a parameter of its own instead of r_mag;
    `rescale=False` keeps r_mag at 0.

    >>> sorted(name for name, _ in GatedSAE(8, 32).named_parameters())
    ['W_dec', 'W_enc', 'b_dec', 'b_gate', 'b_mag', 'r_mag']
    """

    objective = "gated_loss"
    in_units_of_x = ("b_gate", "b_mag", "b_dec")

    def __init__(self, d_in: int, d_sae: int, tied: bool = True, rescale: bool = True):
        super().__init__(d_in, d_sae)
        del self.b_enc
        self.tied, self.rescale = flag("tied", tied), flag("rescale", rescale)
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        if tied:
            self.r_mag = nn.Parameter(torch.zeros(d_sae), requires_grad=rescale)
        else:
            self.W_mag = nn.Parameter(self.W_enc.detach().T.clone().T)

    @property
    def architecture(self) -> str:
        return "gated" if self.tied else "sae_utils_gated_untied"

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        rows = self.rows(x)
        # relu(π): the rest needs no other entries
        gate, active = relu_encode(rows, self.W_enc, self.b_gate, self.b_dec)
        if self.tied:
            scale, b_gate, b_mag = (at(v, active) for v in (self.r_mag.exp(), self.b_gate, self.b_mag))
            magnitude = (gate - b_gate) * scale + b_mag
        elif active is None:
            magnitude = pre_activations(rows, self.W_mag, self.b_mag, self.b_dec)
        else:
            magnitude = encode_at(active, rows, self.W_mag, self.b_mag, self.b_dec)
        return self.output(x, magnitude.relu() * (gate > 0), active, gate=gate)
