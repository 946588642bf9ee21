"""Inference-time optimisation: keep an SAE's dictionary and search for the best sparse code in place of its encoder.

Gradient pursuit as in arXiv 2404.16014 and 2410.14670, beside orthogonal matching pursuit (ours).
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..saes.base import SAEOutput
from ..values import one_of


@torch.no_grad()
def gradient_pursuit(
    x: Tensor, W_dec: Tensor, b_dec: Tensor, l0: int | Tensor, method: str = "gradient"
) -> tuple[Tensor, Tensor]:
    """A sparse non-negative code of x over the rows of W_dec, with at most `l0` latents: values and indices, [..., max l0].

    Starting from r = x − b_dec and no latent, l0 times: add the latent whose direction has the largest r · d > 0, move the
    weights w ≥ 0, and put r = x − b_dec − w D. Directions d are rows at norm 1. A weight of 0 stands for "not used".

    method: "gradient" is gradient pursuit: one step of w along its gradient g = r Dᵀ on the support, ‖g‖²/‖g D‖² long, which is
    exact for the squared error; then w ← max(w, 0). Two details are ours: a latent is added once, and a weight at 0 whose
    gradient is negative stays out of g. "orthogonal" is orthogonal matching pursuit: w becomes the least-squares fit on
    the support, fitted again without those that came out negative until none does.
    x [..., d_in], W_dec [d_sae, d_in], b_dec [d_in]; l0 one number or one for each token, [...]. Raises ValueError if
    shapes do not fit, l0 is not between 0 and d_sae, or for an unknown method.
    """
    d_sae, d_in = W_dec.shape
    shape = x.shape[:-1]
    l0 = torch.as_tensor(l0, device=x.device).expand(shape).flatten()
    if x.shape[-1] != d_in or b_dec.shape != (d_in,):
        raise ValueError(f"x {list(x.shape)} and b_dec {list(b_dec.shape)} have to end in d_in={d_in} of W_dec")
    if l0.is_floating_point() or len(l0) and not 0 <= l0.min() <= l0.max() <= d_sae:
        raise ValueError(f"l0 has to be whole numbers between 0 and d_sae={d_sae}")
    fit = METHODS[one_of("method", method, METHODS)]
    norm = W_dec.norm(dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
    D, signal = W_dec / norm[:, None], x.reshape(-1, d_in).to(W_dec.dtype) - b_dec
    n_steps = int(l0.max()) if len(l0) else 0
    values = signal.new_zeros(len(signal), n_steps)
    indices = torch.zeros_like(values, dtype=torch.long)
    order = l0.argsort(descending=True)  # tokens that take part in a step are then a slice
    n_chunk = max(1, 2**26 // (d_sae + d_in * max(n_steps, 1)))  # about 256 MiB
    for chunk in order.split(n_chunk):
        values[chunk], indices[chunk] = pursue(signal[chunk], D, l0[chunk], n_steps, fit)
    return (values / norm[indices]).view(*shape, n_steps), indices.view(*shape, n_steps)


def pursue(signal: Tensor, D: Tensor, l0: Tensor, n_steps: int, fit) -> tuple[Tensor, Tensor]:
    """One chunk of tokens with l0 falling; rows of D have norm 1. Values and indices [n, n_steps]."""
    w = signal.new_zeros(len(signal), n_steps)
    support = torch.zeros_like(w, dtype=torch.long)
    used = torch.zeros_like(w, dtype=torch.bool)
    residual, smallest = signal.clone(), 1e-6 * signal.norm(dim=1)
    for step in range(n_steps):
        now, old = slice(0, int((l0 > step).sum())), slice(0, step + 1)
        inner = residual[now] @ D.T
        best = inner.scatter(1, support[now, :step], -torch.inf).max(1)
        support[now, step], used[now, step] = best.indices, best.values > smallest[now]
        w[now, old] = fit(signal[now], D, support[now, old], used[now, old], w[now, old], inner)
        residual[now] = signal[now] - embedding_bag(support[now, old], D, per_sample_weights=w[now, old], mode="sum")
    return w, support


def gradient_step(signal: Tensor, D: Tensor, support: Tensor, used: Tensor, w: Tensor, inner: Tensor) -> Tensor:
    """w [n, s] after a step of the best length along its gradient."""
    gradient = inner.gather(1, support) * used
    gradient = torch.where((w == 0) & (gradient < 0), 0, gradient)
    change = embedding_bag(support, D, per_sample_weights=gradient, mode="sum")
    length = gradient.square().sum(1, keepdim=True) / change.square().sum(1, keepdim=True).clamp_min(1e-30)
    return (w + length * gradient).relu()


def least_squares(signal: Tensor, D: Tensor, support: Tensor, used: Tensor, w: Tensor, inner: Tensor) -> Tensor:
    """argmin_w ‖signal − w D‖² on the part of the support where it is not negative."""
    rows = D[support].double()  # [n, s, d_in]
    gram, target = rows @ rows.mT, (rows @ signal.double()[:, :, None]).squeeze(2)
    eye = torch.eye(support.shape[1], dtype=torch.double, device=D.device)
    while True:
        both = used[:, :, None] & used[:, None, :]
        w = torch.linalg.solve(torch.where(both, gram, 0) + (~used[:, :, None] + 1e-9) * eye, target * used)
        if not (w < 0).any():
            return w.to(D.dtype)
        used = used & (w >= 0)


METHODS = {"gradient": gradient_step, "orthogonal": least_squares}


@torch.no_grad()
def with_pursuit(sae, x: Tensor, method: str = "gradient") -> SAEOutput:
    """The SAE's decoder with latents found by `gradient_pursuit`, for every token as many as its encoder would use.

    >>> with_pursuit(TopKSAE(8, 32, k=2), torch.randn(5, 8)).latents.shape
    torch.Size([5, 32])
    """
    values, indices = gradient_pursuit(x, sae.W_dec, sae.b_dec, (sae.encode(x) > 0).sum(-1), method)
    latents = values.new_zeros(*x.shape[:-1], sae.d_sae).scatter_add_(-1, indices, values)  # unused slots add 0
    return SAEOutput(sae.decode(latents), dense=latents.flatten(0, -2))
