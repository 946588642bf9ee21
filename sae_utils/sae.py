"""SAE architectures: how an activation x becomes latents, and latents become x̂.

    latents = select(relu((x − b_dec) W_enc + b_enc)),    x̂ = latents W_dec + b_dec

Every class centres its input by `b_dec` and returns the same `SAEOutput`. In training mode a forward updates the SAE's
counters; in eval mode it uses the inference rule. An fp32 SAE computes in fp32.
"""

import contextlib
import functools
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .sparse import (
    Active,
    at,
    densify,
    encode_at,
    gradient_encode,
    pre_activations,
    relu_encode,
    sparse_decode,
    topk_encode,
)
from .values import flag, real, whole

HIGH_NORM = 5.0  # times the usual norm: beyond it a token does not count as ordinary (ours)


@dataclass
class SAEOutput:
    """What a forward returns, for every architecture; `batch` is the product of x's leading axes."""

    x_hat: Tensor  # reconstruction, shaped like x
    values: Tensor | None = None  # active latents: [batch, k], or flat where tokens differ in number; None if dense
    indices: Tensor | None = None  # their latent index, shaped like values
    offsets: Tensor | None = None  # [batch + 1], where flat values of each token begin
    active: Active | None = None  # the same entries, as `sae_utils.sparse` reads them
    dense: Tensor | None = None  # [batch, d_sae] for an architecture without a sparse form
    extra: dict[str, Tensor] = field(default_factory=dict)  # what only the class's own loss needs

    @property
    def latents(self) -> Tensor:
        """Dense latents [..., d_sae], made when read; `...` are x's leading axes."""
        dense = self.dense
        if dense is None:
            dense = densify(self.values.flatten(), self.active)
        return dense.view(*self.x_hat.shape[:-1], -1)


class SAE(nn.Module):
    """Parameters, counters and checks that all architectures share; a subclass says how latents are chosen.

    W_enc [d_in, d_sae] (kept transposed in memory: its sparse gradient comes by rows of latents), b_enc [d_sae],
    W_dec [d_sae, d_in] with rows of unit norm, b_dec [d_in]. At the start W_enc = W_decᵀ, random directions, and biases are 0.
    `x_scale` is the standard deviation of a coordinate of x over the ordinary tokens (`high_norm`) of `train`'s first batch (0
    before). `objective` names the loss in `sae_utils.losses` that `train` takes by default.
    `tokens_since_fired` [d_sae] counts training tokens since a latent was last active; at `dead_after` it counts as dead.
    """

    architecture = ""  # SAELens' name for the saved form
    objective = "reconstruction_loss"
    needs_grad = False  # whether batches have to hold `grad`
    in_units_of_x = ("b_enc", "b_dec")  # `train` learns these in units of `x_scale`

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae = whole("d_in", d_in), whole("d_sae", d_sae)
        self.dead_after = 10_000_000
        directions = nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_enc = nn.Parameter(directions.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("initialised", torch.tensor(False))  # has `train` set b_dec
        self.register_buffer("x_scale", torch.tensor(0.0))

    @property
    def arguments(self) -> dict:
        """What the class was called with: enough, with the state, to make it again."""
        return {"d_in": self.d_in, "d_sae": self.d_sae}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())

    def rows(self, x: Tensor) -> Tensor:
        """x as [batch, d_in] in the SAE's dtype; ValueError if it is no tensor or its last axis is not d_in."""
        if not isinstance(x, Tensor):
            raise ValueError(f"x is a {type(x).__name__}: it has to be a tensor, as torch.as_tensor(x) makes it")
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x has shape {list(x.shape)}; its last axis has to be d_in={self.d_in}")
        return x.reshape(-1, self.d_in).to(self.W_dec.dtype)

    def dead(self) -> Tensor:
        """Boolean [d_sae]: not active in the last `dead_after` training tokens."""
        return self.tokens_since_fired >= self.dead_after

    @torch.no_grad()
    def count(self, active: Tensor, n_tokens: int) -> None:
        """Record a training batch in which the latents `active` (indices, repeats allowed) fired."""
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired[active] = 0

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """(x − b_dec) W_enc + b_enc of some latents (indices; default all), [batch, n_latents]."""
        W_enc, b_enc = self.W_enc, self.b_enc
        if latents is not None:  # by rows, as W_enc lies in memory, and its gradient
            W_enc, b_enc = W_enc.T.index_select(0, latents).T, b_enc.index_select(0, latents)
        return pre_activations(self.rows(x), W_enc, b_enc, self.b_dec)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Dense latents [..., d_sae] ≥ 0 by the inference rule, without gradient."""
        with inference(self):
            return self(x).latents

    def decode(self, f: Tensor) -> Tensor:
        """x̂ = f W_dec + b_dec, [..., d_in], of dense latents f [..., d_sae]."""
        return f @ self.W_dec + self.b_dec

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Before the first step, from a batch [batch, d_in]: x_scale, and b_dec = mean of x; what is set is kept.

        Raises ValueError if the tokens do not differ by more than rounding.
        """
        if self.x_scale == 0:
            scale = scale_of(rows)
            if scale <= 1e-6 * rows.square().mean().sqrt() < float("inf"):
                raise ValueError(
                    f"the first batch has no variance: all of its {len(rows):,} tokens are the same. x_scale and b_dec start "
                    f"from it, so shuffle the activations, or leave such batches out"
                )
            self.x_scale.copy_(torch.where(scale > 0, scale, 1))  # NaN is for `train` to name
        if not self.initialised:
            self.b_dec.copy_(rows.mean(0))
            self.initialised.fill_(True)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the parameters back where they belong: rows of W_dec at norm 1."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(self.W_dec.dtype).tiny)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Take out of W_dec's gradient its part along each row, which the normalisation would undo."""
        if self.W_dec.grad is not None:
            for grad, row in zip(self.W_dec.grad.split(1024), self.W_dec.split(1024)):  # few enough to stay in cache
                grad.addcmul_((grad * row).sum(1, keepdim=True), row, value=-1)


def scale_of(rows: Tensor) -> Tensor:
    """The standard deviation of a coordinate of rows [n, d_in] over tokens that are not of high norm."""
    ordinary = rows[~high_norm(rows, *typical(rows))]
    return (ordinary - ordinary.mean(0)).square().mean().sqrt()


@contextlib.contextmanager
def inference(*saes):
    """The SAEs among these modules and functions in eval mode, where no counter moves; then in the mode they had."""
    modes = [(module, module.training) for sae in saes if isinstance(sae, nn.Module) for module in sae.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def measuring(function):
    """Decorator: no gradient, and the SAEs among the arguments, or in a dictionary there, by their inference rule."""

    @functools.wraps(function)
    def measured(*args, **kwargs):
        given = [*args, *kwargs.values()]
        given += [value for one in given if isinstance(one, dict) for value in one.values()]
        with torch.no_grad(), inference(*given):
            return function(*args, **kwargs)

    return measured


def typical(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and usual norm of rows [n, d_in]: the median of each coordinate [d_in], and the median of ‖x − centre‖.

    From 4,096 rows at most, evenly spaced. A few tokens of huge norm move neither.
    """
    rows = rows[:: -(-len(rows) // 4096)].float()
    centre = rows.median(0).values
    return centre, (rows - centre).norm(dim=1).median()


def high_norm(x: Tensor, centre: Tensor, usual: Tensor, times: float = HIGH_NORM) -> Tensor:
    """Bool [...]: ‖x − centre‖ > times · usual, as at attention sinks; none where the usual norm is 0. x [..., d_in]."""
    return ((x - centre).norm(dim=-1) > times * usual) & (usual > 0)


class TopKSAE(SAE):
    """Keep the k largest latents of every token (arXiv 2406.04093; the base of arXiv 2411.10397 and 2410.14670).

        latents = TopK(relu((x − b_dec) W_enc + b_enc)),    x̂ = latents W_dec + b_dec

    k: active latents per token, 1 ≤ k ≤ d_sae; fewer where fewer pre-activations are positive.
    """

    architecture = "topk"

    def __init__(self, d_in: int, d_sae: int, k: int = 32):
        super().__init__(d_in, d_sae)
        self.k = whole("k", k, 1, self.d_sae)

    @property
    def arguments(self) -> dict:
        return super().arguments | {"k": self.k}

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        rows = self.rows(x)
        values, active = self.select(rows, grad)
        x_hat = sparse_decode(values, active, self.W_dec) + self.b_dec
        if self.training:
            self.count(active.indices[values > 0], len(rows))
        shape = len(rows), self.k
        return SAEOutput(x_hat.view(x.shape), values.view(shape), active.indices.view(shape), active=active)

    def select(self, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, Active]:
        """Values [batch · k] and where they are."""
        return topk_encode(rows, self.W_enc, self.b_enc, self.b_dec, self.k)


class GradientSAE(TopKSAE):
    """TopK that prefers latents to which the model's loss is sensitive (arXiv 2411.10397; our reading, no code is public).

        latents = z on the k largest of z (1 + β |W_dec g| / m),    z = relu((x − b_dec) W_enc + b_enc),    g = ∇ₓ loss

    `grad`: g shaped like x, a constant; a row of zeros (masked) is selected as in TopK. m = `gradient_scale` is a running mean
    of |W_dec g| over latents and tokens with a gradient (0.99 of the old, 0.01 of each training batch; ours), so that β has no
    units. Before any training batch, m is the mean of the batch at hand. Without `grad`, in `encode`, or with β = 0: plain TopK.

    Raises ValueError for a grad of another shape or β < 0, FloatingPointError for NaN or inf; all zeros give a UserWarning.
    """

    def __init__(self, d_in: int, d_sae: int, k: int = 32, beta: float = 1.0):
        super().__init__(d_in, d_sae, k)
        self.beta = real("beta", beta, 0)
        self.register_buffer("gradient_scale", torch.tensor(0.0))

    @property
    def arguments(self) -> dict:
        return super().arguments | {"beta": self.beta}

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
        weights = self.W_enc, self.b_enc, self.b_dec
        values, active, total = gradient_encode(rows, *weights, self.k, g, self.W_dec, weight)
        if self.training:
            self.gradient_scale.copy_(scale.lerp((total / n).to(scale.dtype), 0.01))
        return values, active


class ReluSAE(SAE):
    """Keep every positive latent; sparsity comes from the L1 penalty of `l1_loss` (the baseline of arXiv 2404.16014).

    f = relu((x − b_dec) W_enc + b_enc),    x̂ = f W_dec + b_dec
    """

    architecture = "standard"
    objective = "l1_loss"

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        return self.output(x, *relu_encode(self.rows(x), self.W_enc, self.b_enc, self.b_dec))

    def output(self, x: Tensor, f: Tensor, active: Active | None = None, **extra: Tensor) -> SAEOutput:
        """The output for latents f, dense [batch, d_sae] or the values of `active`; in training mode the counters move."""
        if self.training:
            fired = (f > 0).any(0).nonzero() if active is None else active.indices[f > 0]
            self.count(fired, x.numel() // self.d_in)
        if active is None:
            return SAEOutput(self.decode(f).view(x.shape), dense=f, extra=extra)
        x_hat = (sparse_decode(f, active, self.W_dec) + self.b_dec).view(x.shape)
        return SAEOutput(x_hat, f, active.indices, active.offsets, active, extra=extra)


class GatedSAE(ReluSAE):
    """Which latents are active and how active they are, decided apart (arXiv 2404.16014, eq. 5–7; train with `gated_loss`).

        π = (x − b_dec) W_enc + b_gate,    f = 1[π > 0] ⊙ relu((x − b_dec) W_mag + b_mag),    W_mag = W_enc diag(exp(r_mag))

    W_enc is the paper's W_gate. Ablations: `tied=False` gives W_mag [d_in, d_sae] as a parameter of its own instead of r_mag;
    `rescale=False` keeps r_mag at 0.
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

    @property
    def arguments(self) -> dict:
        return super().arguments | {"tied": self.tied, "rescale": self.rescale}

    def forward(self, x: Tensor, grad: Tensor | None = None) -> SAEOutput:
        rows = self.rows(x)
        gate, active = relu_encode(
            rows, self.W_enc, self.b_gate, self.b_dec
        )  # relu(π): the rest needs no other entries
        if self.tied:
            scale, b_gate, b_mag = (at(v, active) for v in (self.r_mag.exp(), self.b_gate, self.b_mag))
            magnitude = (gate - b_gate) * scale + b_mag
        elif active is None:
            magnitude = pre_activations(rows, self.W_mag, self.b_mag, self.b_dec)
        else:
            magnitude = encode_at(active, rows, self.W_mag, self.b_mag, self.b_dec)
        return self.output(x, magnitude.relu() * (gate > 0), active, gate=gate)


class JumpReluSAE(ReluSAE):
    """Keep a latent where it exceeds a threshold of its own: f = z ⊙ 1[z > θ], z = (x − b_dec) W_enc + b_enc, θ ≥ 0.

    The inference form of gated (`to_jumprelu`) and threshold SAEs, and an architecture of its own (arXiv 2407.14435, train with
    `jumprelu_loss`): the step has no gradient, so θ gets that of a step smeared over `bandwidth`. Bandwidth, and the θ at the
    start of training, are in units of σ = √d_in · x_scale, about the root mean square of ‖x − x̄‖ (0.03 and equal: ours).
    """

    architecture = "jumprelu"
    objective = "jumprelu_loss"
    in_units_of_x = ("b_enc", "b_dec", "threshold")

    def __init__(self, d_in: int, d_sae: int, bandwidth: float = 0.03):
        super().__init__(d_in, d_sae)
        self.bandwidth = real("bandwidth", bandwidth, above=0)
        self.threshold = nn.Parameter(torch.zeros(d_sae))

    @property
    def arguments(self) -> dict:
        return super().arguments | {"bandwidth": self.bandwidth}

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
    """
    if not (isinstance(sae, GatedSAE) and sae.tied):
        raise ValueError(f"{sae!r}: only a tied GatedSAE has a JumpReLU form")
    made = JumpReluSAE(sae.d_in, sae.d_sae).to(sae.W_dec)
    scale = sae.r_mag.exp()
    made.W_enc.copy_(sae.W_enc * scale)
    made.b_enc.copy_(sae.b_mag)
    made.W_dec.copy_(sae.W_dec)
    made.b_dec.copy_(sae.b_dec)
    made.threshold.copy_((sae.b_mag - scale * sae.b_gate).clamp_min(0))
    for name in ("tokens_since_fired", "initialised", "x_scale"):
        getattr(made, name).copy_(getattr(sae, name))
    return made.train(sae.training)
