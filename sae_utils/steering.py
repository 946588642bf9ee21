"""Steering: push the residual stream along a direction, or set a latent, and measure what the model then says.

Everything is batched over interventions: n interventions × contexts are one batch, chunked to memory, and only the layers after
the hook run. The steering formula of arXiv 2411.10397 is not known; what is here is ours.
"""

import torch
from torch import Tensor

from .lm import run_prefix, run_spliced

AT_ONCE = 2**24  # entries of [interventions, contexts, positions, d_vocab] that exist at a time: 64 MiB in fp32


def as_tokens(lm, rows) -> Tensor:
    """Rows [contexts, n_ctx] as a tensor of token ids on the model's device."""
    rows = rows if isinstance(rows, Tensor) else torch.from_numpy(rows.astype("int64"))
    return rows.long().to(lm.cfg.device)


@torch.no_grad()
def direct_logits(lm, directions: Tensor) -> Tensor:
    """What directions [n, d_model] write straight into the logits, [n, d_vocab]: through the last norm and the unembedding only.

    LN(d) W_U − LN(0) W_U: the biases drop out, and the scale is that of a residual stream which is d alone.
    """
    direct = lm.unembed(lm.ln_final(directions[None])) - lm.unembed(lm.ln_final(torch.zeros_like(directions[None, :1])))
    return direct[0].float()


@torch.no_grad()
def latent_effects(
    lm, rows, hook_name: str, directions: Tensor, norm: float, *, tokens=None, at_once: int = AT_ONCE
) -> dict[str, Tensor]:
    """Add each direction, scaled to `norm`, at positions ≥ 1 of every row, and measure the predictions made there.

    rows [contexts, n_ctx] tokens; directions [n, d_in], of any length but 0; tokens [n]: each direction's own token, by default
    the first of its `direct_logits`. Means over contexts and positions ≥ 1, each [n]:

    kl: KL(unsteered ‖ steered) in nats. max_logit: max over the vocabulary of |Δ logit|. own_logprob: change of log p of the
    direction's own token, in nats. And tokens [n].
    """
    rows, n_ctx = as_tokens(lm, rows), rows.shape[1]
    lengths = directions.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError(
            f"direction {int((lengths == 0).nonzero()[0, 0])} has length 0: it cannot be scaled to norm={norm}"
        )
    pushes = (norm * directions / lengths).to(lm.cfg.device)
    tokens = direct_logits(lm, pushes).argmax(-1) if tokens is None else tokens.to(pushes.device)
    clean = run_prefix(lm, rows, [hook_name])[hook_name]
    logits = run_spliced(lm, rows, hook_name, clean)[:, 1:].float()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    chunk = max(1, at_once // (len(rows) * n_ctx * lm.cfg.d_vocab))
    parts = []
    for push, token in zip(pushes.split(chunk), tokens.split(chunk)):
        x = clean.expand(len(push), *clean.shape).clone()
        x[:, :, 1:] += push[:, None, None]
        new = run_spliced(lm, rows.repeat(len(push), 1), hook_name, x.flatten(0, 1))[:, 1:].float()
        new = new.view(len(push), *logits.shape)
        largest = (new - logits).abs().amax(-1).mean((1, 2))
        log_q = new.log_softmax(-1)
        kl = (p * (log_p - log_q)).sum(-1).mean((1, 2))
        own = torch.stack([(q - log_p)[..., t].mean() for q, t in zip(log_q, token)])
        parts.append(torch.stack([kl, largest, own]))
    kl, largest, own = torch.cat(parts, 1)
    return {"kl": kl, "max_logit": largest, "own_logprob": own, "tokens": tokens}
