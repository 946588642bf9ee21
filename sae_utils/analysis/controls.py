"""Controls (ours): SAEs whose error is known, frozen latents with another decoder, and data and models without features."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from scipy.sparse import csr_array, hstack
from torch import Tensor

from ..activations.model import load_language_model
from ..saes.base import SAEOutput, measuring
from .least_squares import Moments, solve


@measuring
def identity(sae, stream) -> dict[str, float]:
    """How far an SAE is from Cov(e, x̂) = 0, where b* = Σ_x⁻¹ Σ_e and R² = tr(Σ_e Σ_x⁻¹ Σ_e) / tr Σ_e ≥ FVU hold in sample.

    r2: of the probe b*; r2_identity: by that formula; gap: their absolute difference; distance: E‖x (b* − Σ_x⁻¹ Σ_e)‖² / tr Σ_e,
    by how much the two predictions differ; fvu; bound_holds: r2 ≥ fvu, up to 1e-9.
    """
    moments = Moments()
    for batch in stream:
        error = batch["x"] - sae(batch["x"]).x_hat
        moments.add(torch.cat([batch["x"], error], 1), error[:, :0])
    mean, cov = moments.covariance()
    d = len(mean) // 2
    xx, xe, ee = cov[:d, :d], cov[:d, d:], cov[d:, d:]
    b, b_identity, power = solve(xx, xe), solve(xx, ee), ee.trace().clamp_min(1e-300)
    r2, r2_identity = (xe * b).sum() / power, (ee * b_identity).sum() / power
    off, fvu = b - b_identity, (power + mean[d:].square().sum()) / xx.trace()
    values = {"r2": r2, "r2_identity": r2_identity, "gap": (r2 - r2_identity).abs(), "fvu": fvu}
    values["distance"] = (off * (xx @ off)).sum() / power
    return {key: float(value) for key, value in values.items()} | {"bound_holds": bool(r2 >= fvu - 1e-9)}


@measuring
def with_decoder(sae, decode, x: Tensor) -> SAEOutput:
    """An SAE's latents [..., d_sae], frozen, with `decode` of them as x̂."""
    out = sae(x)
    return replace(out, x_hat=decode(out.latents))


@measuring
def refit_decoder(sae, stream) -> partial:
    """x → SAEOutput with the best decoder for an SAE's latents f: argmin over W, b of Σ‖x − f W − b‖². There Cov(e, x̂) = 0.

    Normal equations [d_sae + 1, d_sae + 1] in fp64, with a ridge of 1e-9 for latents that always fire together. A latent that
    never fires keeps its row.
    """
    d = sae.d_sae
    gram, target = np.zeros((d + 1, d + 1)), np.zeros((d + 1, sae.d_in))
    for batch in stream:
        for x in batch["x"].split(4096):
            out = sae(x)
            if out.active is None:
                f = csr_array(out.latents.double().cpu())
            else:
                entries = out.values.flatten().double(), out.active.indices, out.active.offsets
                f = csr_array(tuple(part.cpu() for part in entries), shape=(len(x), d))
            f = hstack([f, np.ones((len(x), 1))], format="csr")  # the last column is the bias
            products = (f.T @ f).tocoo()
            gram[products.row, products.col] += products.data
            target += f.T @ x.double().cpu().numpy()
    gram, target = (torch.from_numpy(sums).to(sae.W_dec.device) for sums in (gram, target))
    fired = gram.diagonal() > 0
    gram, target = gram[fired][:, fired], target[fired]
    scale = gram.diagonal().rsqrt()  # every latent in units of its own size
    gram = gram * scale[:, None] * scale
    gram.diagonal().add_(1e-9)
    decoder = torch.cat([sae.W_dec, sae.b_dec[None]]).detach().clone()
    decoder[fired] = (torch.linalg.solve(gram, target * scale[:, None]) * scale[:, None]).to(decoder)
    W_dec, b_dec = decoder[:-1], decoder[-1]
    return partial(with_decoder, sae, lambda f: f @ W_dec + b_dec)


@measuring
def rescale(sae, x: Tensor) -> partial:
    """x → SAEOutput of an SAE whose active latents have other sizes, f_i → f_i + a_i f_i + c_i: arXiv 2404.16014's repair of shrinkage.

    a and c [d_sae] are the least-squares fit to x [n, d_in] in closed form (ours; the paper trains them), with a small ridge: a
    latent that never fires stays as it is. The normal equations [2 d_sae, 2 d_sae] are solved in fp64.

    >>> sae, x = ReluSAE(8, 32), torch.randn(500, 8)
    >>> bool((x - rescale(sae, x)(x).x_hat).square().sum() < (x - sae(x).x_hat).square().sum())
    True
    """
    n = sae.d_sae
    gram, target = x.new_zeros(2 * n, 2 * n), x.new_zeros(2, n)
    for part in x.split(8192):
        f = sae.encode(part)
        terms = torch.cat([f, (f > 0).to(f)], 1)  # what a and c stand before
        gram += terms.T @ terms
        target += ((terms.T @ (part - sae.decode(f))).view(2, n, -1) * sae.W_dec).sum(2)
    gram = (gram * (sae.W_dec @ sae.W_dec.T).repeat(2, 2)).double().cpu()
    ridge = 1e-6 * gram.diagonal().mean() + 1e-3 * gram.diagonal()
    a, c = torch.linalg.solve(gram + ridge.diag(), target.flatten().double().cpu()).to(x).view(2, n)
    return partial(with_decoder, sae, lambda f: sae.decode(f + (f > 0) * (a * f + c)))


class PrincipalComponents:
    """x̂ = the projection on the k directions of largest variance: its error is linear in x by construction.

    Its latents are the sizes of the k coordinates, without their signs, so that `evaluate` counts L0 = k.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, k: int):
        self.mean, self.directions = mean, torch.linalg.eigh(covariance).eigenvectors[:, -k:]

    def __call__(self, x: Tensor) -> SAEOutput:
        latents = (x - self.mean) @ self.directions
        return SAEOutput(latents @ self.directions.T + self.mean, dense=latents.abs().flatten(0, -2))


class DeadSAE(PrincipalComponents):
    """x̂ = mean, the projection on no direction: all of x is error, and all of it linear in x."""

    def __init__(self, mean: Tensor):
        self.mean, self.directions = mean, mean.new_zeros(len(mean), 1)


def matched_gaussian(mean: Tensor, covariance: Tensor, n: int, seed: int = 0) -> Tensor:
    """n draws [n, d] of a Gaussian: no features, but every probe that reads mean and covariance alone must find the same."""
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0).sqrt()
    normal = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed)).to(mean.device)
    return mean.float() + normal @ root.T.float()


def mean_and_covariance(stream) -> tuple[Tensor, Tensor]:
    """Of x over a stream, fp64: [d], [d, d]."""
    moments = Moments()
    for batch in stream:
        moments.add(batch["x"], batch["x"][:, :0])
    return moments.covariance()


@torch.no_grad()
def untrained(model: str, device: str, seed: int = 0):
    """The language model with its weights drawn anew: matrices N(0, 0.02²), biases 0, layer norms 1."""
    lm = load_language_model(model, device=device)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.fill_(float(name.endswith("weight")))
    return lm
