"""Baselines to put beside any SAE: directions that never learn.

arXiv 2602.14111 finds trained SAEs hardly better than the frozen ones in interpretability, probing and editing. What an SAE is said
to have learnt has to be missing from these. Two more are elsewhere: `train(…, stop_after=64)` gives an SAE stopped early, and
`analysis.controls.PrincipalComponents` is PCA.
"""

import torch
from torch import Tensor

from ..values import one_of, real, whole
from .base import SAE, measuring
from .jumprelu import JumpReluSAE


def frozen(sae, part: str, cosine: float = 1.0):
    """The same SAE, of any class, of which one part stays where it is now while the rest trains (arXiv 2602.14111).

        "decoder"   W_dec stays;  with cosine = c < 1 (soft-frozen; there 0.8) its rows keep  cos(W_dec_i, start_i) ≥ c
        "encoder"   W_enc stays, and W_mag of an untied `GatedSAE`;  biases, r_mag and thresholds train

    A new SAE's directions are random. Of an encoder only directions are held: with its biases held too, a penalty could not set
    how often a latent fires (ours). A soft-frozen row that leaves its cone goes to the nearest unit vector on it after each step.
    Call it before `train`. `save_sae` and checkpoints keep what is frozen.

    Raises ValueError for what is no SAE, another part, one that is frozen already, a cosine outside 0 … 1, or below 1 for the
    encoder, whose directions have no fixed norm.

    >>> sae = frozen(TopKSAE(8, 32, k=2), "decoder")
    >>> [name for name, p in sae.named_parameters() if p.requires_grad]
    ['W_enc', 'b_enc', 'b_dec']
    """
    if not isinstance(sae, SAE):
        raise ValueError(f"sae is a {type(sae).__name__}: it has to be an SAE")
    one_of("part", part, ("decoder", "encoder"))
    cosine = real("cosine", cosine, 0, 1)
    if part in sae.frozen:
        raise ValueError(f"part={part!r} is frozen already, at cosine={sae.frozen[part]:g}: make the SAE anew")
    if part == "encoder" and cosine < 1:
        raise ValueError(f"cosine={cosine:g}: only a decoder, whose rows have norm 1, can be soft-frozen. Leave it out")
    sae.frozen = sae.frozen | {part: cosine}
    if cosine < 1:
        sae.register_buffer("W_dec_start", sae.W_dec.detach().clone())
    sae.hold()
    return sae


@measuring
def random_like(sae, x: Tensor, seed: int = 0) -> JumpReluSAE:
    """Random directions, of which the i-th fires on x [..., d_in] on as many tokens as latent i of `sae` (ours).

        f = z ⊙ 1[z > θ],    z = c ((x − x̄) W_decᵀ + b),    x̂ = f W_dec + x̄ − c m,    rows of W_dec random, of norm 1

    θ_i / c − b_i lies halfway between two projections of x. The scale c and the offset c m are the least-squares fit to x.
    The decoder is not refitted, since its directions would no longer be random: `analysis.controls.refit_decoder` does that, to any SAE.
    x: activations on which rates are matched, some thousands of tokens; tokens that are equal fire together. The result is in fp32.

    Raises ValueError if no latent of `sae` fires on x, or if all tokens are the same.

    >>> sae, x = TopKSAE(8, 32, k=2), torch.randn(500, 8)
    >>> bool(((random_like(sae, x).encode(x) > 0).sum(0) == (sae.encode(x) > 0).sum(0)).all())
    True
    """
    if not isinstance(sae, SAE):
        raise ValueError(f"sae is a {type(sae).__name__}: it has to be an SAE")
    x = sae.rows(x).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(whole("seed", seed, 0, 2**32 - 1))
        made = JumpReluSAE(sae.d_in, sae.d_sae).to(sae.W_dec.device).eval()
    mean = x.mean(0)
    made.b_dec.copy_(mean)
    times = sum((sae.encode(part) > 0).sum(0) for part in x.split(1024))
    for latents in torch.arange(sae.d_sae, device=x.device).split(max(1, 2**24 // len(x))):
        falling = made.pre_activations(x, latents).sort(0, descending=True).values
        spread = falling[:1] - falling[-1:]
        # one more at either end, for latents that fire never or always
        falling = torch.cat([falling[:1] + spread, falling, falling[-1:] - spread])
        above = times[latents][None]
        bar = ((falling.gather(0, above) + falling.gather(0, above + 1)) / 2)[0]
        made.threshold[latents] = bar.relu()
        made.b_enc[latents] = (-bar).relu()  # θ ≥ 0: a bar below 0 is a bias
    y = torch.cat([made(part).x_hat for part in x.split(1024)]) - mean
    m = y.mean(0)
    c = ((x - mean) * (y - m)).sum() / (y - m).square().sum()  # not negative: f_i rises with the projection of x
    if not torch.isfinite(c):
        raise ValueError(
            f"no latent of sae fires on these {len(x):,} tokens, or all are the same: give activations as in training"
        )
    made.b_enc.copy_(c * (made.b_enc - c * m @ made.W_enc))  # the latents stay, times c, as b_dec moves
    made.b_dec.sub_(c * m)
    made.W_enc.mul_(c)
    made.threshold.mul_(c)
    made.initialised.fill_(True)
    return made
