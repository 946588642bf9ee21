"""What all SAE architectures share: parameters, counters, and the form of their output.

    latents = select(relu((x − b_dec) W_enc + b_enc)),    x̂ = latents W_dec + b_dec

Every class centres its input by `b_dec` and returns the same `SAEOutput`. In training mode a forward updates the SAE's
counters; in eval mode it uses the inference rule. An fp32 SAE computes in fp32.
"""

import contextlib
import functools
import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..sparse.bags import Active
from ..sparse.select_encode import densify, pre_activations, sparse_decode
from ..values import whole

HIGH_NORM = 5.0  # times the usual norm: beyond it a token does not count as ordinary (ours)


@dataclass
class SAEOutput:
    """What a forward returns, for every architecture; `batch` is the product of x's leading axes.

    >>> TopKSAE(8, 32, k=2)(torch.randn(3, 8)).indices.shape
    torch.Size([3, 2])
    """

    x_hat: Tensor  # reconstruction, shaped like x
    values: Tensor | None = None  # active latents: [batch, k], or flat where tokens differ in number; None if dense
    indices: Tensor | None = None  # their latent index, shaped like values
    offsets: Tensor | None = None  # [batch + 1], where flat values of each token begin
    active: Active | None = None  # the same entries, as `sae_utils.sparse` reads them
    dense: Tensor | None = None  # [batch, d_sae] for an architecture without a sparse form
    extra: dict[str, Tensor] = field(default_factory=dict)  # what only the class's own loss needs

    @property
    def entries(self) -> Tensor:
        """The values that are stored, sparse or dense: all latents that may be positive."""
        return self.values if self.dense is None else self.dense

    @property
    def latents(self) -> Tensor:
        """Dense latents [..., d_sae], made when read; `...` are x's leading axes."""
        dense = densify(self.values.flatten(), self.active) if self.dense is None else self.dense
        return dense.view(*self.x_hat.shape[:-1], -1)


class SAE(nn.Module):
    """Parameters, counters and checks that all architectures share; a subclass says how latents are chosen.

    W_enc [d_in, d_sae] (kept transposed in memory: its sparse gradient comes by rows of latents), b_enc [d_sae],
    W_dec [d_sae, d_in] with rows of unit norm, b_dec [d_in]. At the start W_enc = W_decᵀ, random directions, and biases are 0.
    `x_scale` is the standard deviation of a coordinate of x over the ordinary tokens (`high_norm`) of `train`'s first batch (0
    before). `objective` names the loss in `sae_utils.losses` that `train` takes by default.
    `tokens_since_fired` [d_sae] counts training tokens since a latent was last active; at `dead_after` it counts as dead.

    >>> sae = TopKSAE(8, 32, k=2)
    >>> {name: list(p.shape) for name, p in sae.named_parameters()}
    {'W_enc': [8, 32], 'b_enc': [32], 'W_dec': [32, 8], 'b_dec': [8]}
    """

    architecture = ""  # SAELens' name for the saved form
    objective = "reconstruction_loss"
    needs_grad = False  # whether batches have to hold `grad`
    in_units_of_x = ("b_enc", "b_dec")  # `train` learns these in units of `x_scale`
    frozen = {}  # what `saes.baselines.frozen` holds: {"decoder": least cosine to its start}

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
        """What the class was called with, from the attributes of the same names: enough, with the state, to make it again."""
        names = []
        for cls in type(self).__mro__:
            if "__init__" in vars(cls):
                parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
                named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
                names += [name for name in named if name not in names]
                if len(named) == len(parameters):  # else the others go to the class above
                    break
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

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
        """Record a training batch in which the latents `active` (bool [d_sae], or indices) fired."""
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired[active] = 0

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """(x − b_dec) W_enc + b_enc of some latents (indices; default all), [batch, n_latents]."""
        W_enc, b_enc = self.W_enc, self.b_enc
        if latents is not None:  # by rows, as W_enc and its gradient lie in memory
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

    def output(self, x: Tensor, f: Tensor, active: Active | None = None, **extra: Tensor) -> SAEOutput:
        """The output for latents f, dense [batch, d_sae] or the values of `active`; in training mode the counters move."""
        if self.training:
            total = (
                f.detach().sum(0)
                if active is None
                else f.new_zeros(self.d_sae).index_add_(0, active.indices, f.detach())
            )
            self.count(total > 0, x.numel() // self.d_in)
        if active is None:
            return SAEOutput(self.decode(f).view(x.shape), dense=f, extra=extra)
        x_hat = (sparse_decode(f, active, self.W_dec) + self.b_dec).view(x.shape)
        return SAEOutput(x_hat, f, active.indices, active.offsets, active, extra=extra)

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Before the first step, from a batch [batch, d_in]: x_scale, and b_dec = mean of x; what is set is kept.

        Raises ValueError if the tokens do not differ by more than rounding, or if the dtype cannot hold the sum of their squares.
        """
        if self.x_scale == 0:
            exact, limits = scale_of(rows.double()).item(), torch.finfo(rows.dtype)
            in_range = exact**2 * self.d_in >= limits.tiny and exact**2 * rows.numel() <= limits.max / 4
            if 0 < exact < float("inf") and not in_range:
                raise ValueError(
                    f"x has a scale of {exact:.2g}, whose squares {rows.dtype} cannot hold: multiply it by {1 / exact:.0e}, or use a "
                    f"float64 SAE"
                )
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

    def hold(self) -> None:
        """Parameters that are frozen get no gradient: W_dec, or W_enc and the W_mag of an untied gate."""
        held = {"W_dec"} if self.frozen.get("decoder") == 1 else set()
        held |= {"W_enc", "W_mag"} if "encoder" in self.frozen else set()
        for name, parameter in self.named_parameters():
            if name in held:
                parameter.requires_grad_(False)

    def revive(self, latents: Tensor) -> None:
        """Forget what the latents (indices) did: `resample_dead` lets them begin anew."""
        self.tokens_since_fired[latents] = 0

    def before_step(self) -> None:
        """What has to happen between the clipping of the gradient and the optimizer's step: nothing, but for `free_norm`."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the parameters back where they belong: rows of W_dec at norm 1, and near `W_dec_start` if soft-frozen."""
        if not self.W_dec.requires_grad:
            return
        if "decoder" in self.frozen:  # a row outside the cone goes to the nearest direction on it
            start, cosine = self.W_dec_start, self.frozen["decoder"]
            along = (self.W_dec * start).sum(1, keepdim=True)
            across = self.W_dec - along * start
            least = across.norm(dim=1, keepdim=True) * cosine / (1 - cosine**2) ** 0.5
            self.W_dec.copy_(across + along.maximum(least).clamp_min(1e-6) * start)
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(self.W_dec.dtype).tiny)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Take out of W_dec's gradient its part along each row, which the normalisation would undo."""
        if self.W_dec.grad is not None:
            for grad, row in zip(self.W_dec.grad.split(1024), self.W_dec.split(1024)):  # few enough to stay in cache
                grad.addcmul_((grad * row).sum(1, keepdim=True), row, value=-1)


def check_parameters(sae, name: str = "") -> None:
    """ValueError if a parameter of an SAE holds NaN or infinity, as a training that went wrong leaves it."""
    for key, p in sae.named_parameters() if isinstance(sae, SAE) else ():
        if not torch.isfinite(p).all():
            raise ValueError(
                f"{key}{f' of {name!r}' if name else ''} holds NaN or infinite values: make the SAE anew, or load one that is whole"
            )


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
