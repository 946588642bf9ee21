"""Controls (ours) for what is said of an SAE's error: the algebra of a refitted decoder, and data and SAEs without features."""

from dataclasses import replace

import torch
from torch import Tensor

from ..activations.model import load_language_model
from ..saes.base import SAEOutput, inference, measuring
from .least_squares import Moments, solve


@measuring
def identity(sae, stream) -> dict[str, float]:
    """How far an SAE is from Cov(e, x̂) = 0, where b* = Σ_x⁻¹ Σ_e and R² = tr(Σ_e Σ_x⁻¹ Σ_e) / tr Σ_e ≥ FVU hold in sample.

    r2: of the probe; r2_identity: by that formula; gap: their absolute difference; distance: E‖x (b* − Σ_x⁻¹ Σ_e)‖² / tr Σ_e, by
    how much the two predictions differ; fvu; bound_holds: r2 ≥ fvu, up to 1e-9.
    """
    moments, errors = Moments(), Moments()
    for batch in stream:
        error = batch["x"] - sae(batch["x"]).x_hat
        moments.add(batch["x"], error)
        errors.add(error, error[:, :0])
    (_, cov), (mean_error, ee) = moments.covariance(), errors.covariance()
    xx, xe = cov.split([moments.d_u, errors.d_u], 1)
    b, b_identity, power = solve(xx, xe), solve(xx, ee), ee.trace().clamp_min(1e-300)
    r2, r2_identity = (xe * b).sum() / power, (ee * b_identity).sum() / power
    fvu = (power + mean_error.square().sum()) / xx.trace()
    values = {"r2": r2, "r2_identity": r2_identity, "gap": (r2 - r2_identity).abs(), "fvu": fvu}
    values["distance"] = ((b - b_identity) * (xx @ (b - b_identity))).sum() / power
    return {key: float(value) for key, value in values.items()} | {"bound_holds": bool(r2 >= fvu - 1e-9)}


class Refitted:
    """An SAE's latents, frozen, with another decoder: x → SAEOutput."""

    def __init__(self, sae, W_dec: Tensor, b_dec: Tensor):
        self.sae, self.W_dec, self.b_dec = sae, W_dec, b_dec

    @torch.no_grad()
    def __call__(self, x: Tensor) -> SAEOutput:
        with inference(self.sae):
            out = self.sae(x)
        return replace(out, x_hat=out.latents @ self.W_dec + self.b_dec)


@measuring
def refit_decoder(sae, stream, ridge: float = 1e-9) -> Refitted:
    """The best decoder for the latents f of an SAE: argmin over W_dec, b_dec of Σ‖x − f W_dec − b_dec‖². There Cov(e, x̂) = 0.

    Normal equations [d_sae + 1, d_sae + 1] in fp64, summed from pairs of active latents. `ridge`, times the mean diagonal, keeps
    them solvable where latents always fire together. A latent that never fires keeps its row.
    """
    d = sae.d_sae
    gram = torch.zeros(d + 1, d + 1, dtype=torch.double, device=sae.W_dec.device)  # the last one is the bias
    target = torch.zeros(d + 1, sae.d_in, dtype=torch.double, device=sae.W_dec.device)
    for batch in stream:
        for x in batch["x"].split(4096):
            out, n = sae(x), len(x)
            if out.values is None or out.values.ndim == 1:
                f = out.latents.double()
                f = torch.cat([f, f.new_ones(n, 1)], 1)
                gram += f.T @ f
                target += f.T @ x.double()
                continue
            values = torch.cat([out.values.double(), out.values.new_ones(n, 1).double()], 1)
            indices = torch.cat([out.indices, torch.full_like(out.indices[:, :1], d)], 1)
            pairs = indices[:, :, None] * (d + 1) + indices[:, None, :]
            gram.view(-1).index_add_(0, pairs.flatten(), (values[:, :, None] * values[:, None, :]).flatten())
            entries = (values[:, :, None] * x.double()[:, None, :]).flatten(0, 1)
            target.index_add_(0, indices.flatten(), entries)
    fired = gram.diagonal() > 0
    gram, target = gram[fired][:, fired], target[fired]
    scale = gram.diagonal().rsqrt()  # every latent in units of its own size
    gram = gram * scale[:, None] * scale
    gram.diagonal().add_(ridge)
    solution = torch.linalg.solve(gram, target * scale[:, None]) * scale[:, None]
    full = torch.cat([sae.W_dec, sae.b_dec[None]]).detach().clone()
    full[fired] = solution.to(full.dtype)
    return Refitted(sae, full[:-1], full[-1])


class DeadSAE:
    """x̂ = mean: all of x is error, and all of it linear in x."""

    def __init__(self, mean: Tensor):
        self.mean = mean

    def __call__(self, x: Tensor) -> SAEOutput:
        return SAEOutput(self.mean.expand_as(x), dense=x.new_zeros(x.shape[:-1].numel(), 1))


class PrincipalComponents:
    """x̂ = the projection on the k directions of largest variance: its error is linear in x by construction."""

    def __init__(self, mean: Tensor, covariance: Tensor, k: int):
        self.mean, self.directions = mean, torch.linalg.eigh(covariance).eigenvectors[:, -k:]

    def __call__(self, x: Tensor) -> SAEOutput:
        latents = (x - self.mean) @ self.directions
        return SAEOutput(latents @ self.directions.T + self.mean, dense=latents.flatten(0, -2))


def matched_gaussian(mean: Tensor, covariance: Tensor, n: int, seed: int = 0) -> Tensor:
    """n draws [n, d] of a Gaussian: no features, but every probe that reads mean and covariance alone must find the same."""
    values, vectors = torch.linalg.eigh(covariance.double())
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, len(mean), generator=generator).to(mean.device)
    root = vectors * values.clamp_min(0).sqrt()
    return mean.float() + normal @ root.T.float()


def mean_and_covariance(stream) -> tuple[Tensor, Tensor]:
    """Of x over a stream, fp64: [d], [d, d]."""
    moments = Moments()
    for batch in stream:
        moments.add(batch["x"], batch["x"][:, :0])
    return moments.covariance()


@torch.no_grad()
def untrained(model: str, device: str, seed: int = 0, std: float = 0.02):
    """The language model with its weights drawn anew: matrices N(0, std²), biases 0, layer norms 1."""
    lm = load_language_model(model, device=device)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.fill_(float(name.endswith("weight")))
    return lm
