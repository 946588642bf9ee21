"""Steering: push an activation along a direction, or set a latent, and measure what the model then says.

n interventions act on all contexts at once, in chunks that fit memory. A forward pass runs only the layers after a residual
hook, and generation only the new token of every step, by Hugging Face's KV cache. Position 0 is an outlier in most models and is
left alone by default. The steering formula of arXiv 2411.10397 is not known; what is here is ours.
"""

import contextlib

import numpy as np
import torch
from torch import Tensor

from ..activations.hooks import (
    agree,
    check_hook,
    check_tokens,
    described,
    few_tokens,
    run_prefix,
    run_spliced,
    token_loss,
)
from ..values import flag, real, whole
from .metrics import kl_divergence

AT_ONCE = 2**22  # floats that the largest tensor of a chunk of interventions holds: 16 MiB, what a CPU keeps near


class Add:
    """x + direction: `directions` [n, d_in], already at the length wanted (α · direction).

    An intervention acts n times at once: called with x [n or 1, contexts, positions, d_in], it returns [n, ...].

    >>> Add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))(torch.zeros(1, 1, 1, 2)).flatten(1)
    tensor([[1., 0.],
            [0., 2.]])
    """

    def __init__(self, directions: Tensor):
        self.directions = as_directions(directions)

    def __len__(self) -> int:
        return len(self.directions)

    def __getitem__(self, part: slice) -> "Add":
        return Add(self.directions[part])

    def __call__(self, x: Tensor) -> Tensor:
        width = self.directions.shape[1]
        if x.shape[-1] != width:
            raise ValueError(f"directions are {width} wide, and x at this hook is {x.shape[-1]} wide")
        return x + self.directions[:, None, None].to(x)


class SetLatent:
    """Set latent i to a value v: x + (v − f_i(x)) W_dec[i], or x̂ + (v − f_i(x)) W_dec[i] without the SAE's error.

    latents: indices [n]; values: a finite number or [n], where 0 ablates. Raises ValueError for an index outside the dictionary
    or a dead latent.

    >>> sae, x = TopKSAE(8, 32, k=8), torch.randn(1, 1, 1, 8)
    >>> moved = SetLatent(sae, [0], 0.0)(x) - x  # ablation takes away the latent's own part
    >>> torch.allclose(moved, -sae.encode(x)[..., :1] * sae.W_dec[0], atol=1e-6)
    True
    """

    def __init__(self, sae, latents, values=0.0, keep_error: bool = True):
        self.sae, self.keep_error = sae, flag("keep_error", keep_error)
        self.latents = check_latents(sae, latents)
        values = torch.as_tensor(values).to(sae.W_dec.device, sae.W_dec.dtype).reshape(-1)
        if len(values) not in (1, len(self.latents)) or not values.isfinite().all():
            raise ValueError(f"values={values.tolist()}: one finite number, or one for each of {len(self)} latents")
        self.values = values.expand(len(self.latents))

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, part: slice) -> "SetLatent":
        return SetLatent(self.sae, self.latents[part], self.values[part], self.keep_error)

    def __call__(self, x: Tensor) -> Tensor:
        f = self.sae.encode(x)  # [n or 1, contexts, positions, d_sae]
        index = self.latents[:, None, None, None].expand(-1, *f.shape[1:3], 1)
        now = f.expand(len(self), *f.shape[1:]).gather(-1, index)
        base = x if self.keep_error else self.sae.decode(f)
        return base + (self.values[:, None, None, None] - now) * self.sae.W_dec.detach()[self.latents][:, None, None]


def as_directions(directions) -> Tensor:
    """Directions [n, d_in] without gradient; ValueError for what is no such tensor, or not finite."""
    if not isinstance(directions, Tensor) or directions.ndim != 2 or not directions.isfinite().all():
        raise ValueError(f"directions are {described(directions)}: they have to be a finite tensor [n, d_in]")
    return directions.detach()


def scaled(directions: Tensor, norm: float) -> Tensor:
    """Directions [n, d_in] at length `norm`; ValueError for one of length 0.

    >>> scaled(torch.tensor([[3.0, 4.0]]), norm=10)
    tensor([[6., 8.]])
    """
    norm, directions = real("norm", norm), as_directions(directions)
    lengths = directions.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError(f"direction {int((lengths == 0).nonzero()[0, 0])} has length 0: it cannot be made {norm} long")
    return norm * directions / lengths


def indices(name: str, values, n: int, where: str) -> Tensor:
    """Whole numbers from 0 to n − 1, as a tensor of their shape; ValueError for others, and for none at all."""
    found = torch.as_tensor(values if hasattr(values, "dtype") or np.isscalar(values) else list(values))
    if found.is_floating_point() or found.dtype == torch.bool or not found.numel():
        raise ValueError(f"{name}={values!r}: they have to be whole numbers from 0 to {n - 1}, at least one")
    found = found.long()
    if len(outside := found[(found < 0) | (found >= n)]):
        raise ValueError(f"{name}: {int(outside[0])} is outside {where}; allowed are 0 to {n - 1}")
    return found


def check_latents(sae, latents) -> Tensor:
    """Indices as a tensor [n]; ValueError for one outside the dictionary, or of a latent that was dead at the end of training."""
    latents = indices("latents", latents, sae.d_sae, "this SAE").flatten().to(sae.W_dec.device)
    if len(dead := latents[sae.dead()[latents]]):
        raise ValueError(
            f"latent {int(dead[0])} is dead: it never fired in the last {sae.dead_after:,} training tokens"
        )
    return latents


def check_edit(edit) -> None:
    """ValueError for what is no intervention, such as a plain function."""
    if not callable(edit) or not hasattr(edit, "__len__"):
        raise ValueError(f"edit={edit!r:.100} is no intervention: use Add(directions) or SetLatent(sae, latents)")


def check_positions(positions, n_ctx: int, name: str = "positions") -> Tensor:
    """A mask [n_ctx] of the positions named, or of all but the first; ValueError for one outside the context, or for none."""
    mask = torch.zeros(n_ctx, dtype=torch.bool)
    mask[indices(name, range(1, n_ctx) if positions is None else positions, n_ctx, "the context")] = True
    return mask


def as_tokens(lm, rows, n: int | None = None) -> Tensor:
    """Token ids [1 or n, contexts, n_ctx] on the model's device; ValueError for what are none of this model."""
    rows = rows if isinstance(rows, Tensor) else torch.tensor(np.asarray(rows))
    if rows.ndim not in (2, 3):
        raise ValueError(f"rows are {described(rows)}: tokens are [contexts, n_ctx] or [n, contexts, n_ctx]")
    check_tokens(lm, rows.flatten(0, -2))
    rows = rows.long().reshape(-1, *rows.shape[-2:]).to(lm.cfg.device)
    if n and len(rows) not in (1, n):
        raise ValueError(f"rows hold contexts for {len(rows)} interventions, but there are {n}")
    return rows


def parts_of(n: int, at_once: int, entries: int) -> list[slice]:
    """n interventions in parts whose tensors hold `at_once` entries at most, where one intervention has so many `entries`."""
    size = max(1, at_once // entries)
    return [slice(start, start + size) for start in range(0, n, size)]


@torch.no_grad()
def steer(lm, rows, hook_name: str, edit, positions=None, at=None, at_once: int = AT_ONCE):
    """Run n interventions on contexts, and yield them in chunks: (part, logits, steered logits, norm).

    rows: token ids [contexts, n_ctx], the same for all, or [n, contexts, n_ctx]. positions: where `edit` acts (default all but
    0). at: positions whose predictions are wanted (default all but 0). part is a slice of interventions, with logits
    [part or 1, contexts, at, d_vocab], steered logits [part, ...], and norm [part]: mean ‖x_new − x‖ over the positions edited.
    """
    check_edit(edit)
    rows = as_tokens(lm, rows, len(edit))
    n_contexts, n_ctx = rows.shape[1:]
    mask = check_positions(positions, n_ctx).to(rows.device)
    at = check_positions(at, n_ctx, "at").to(rows.device)

    def logits_with(tokens, x):
        only = ("unembed.hook_in", lambda h, hook: h[:, at])  # other positions are not unembedded
        logits = run_spliced(lm, tokens.flatten(0, 1), hook_name, x.flatten(0, 1), hooks=[only])
        return logits.float().unflatten(0, x.shape[:2])

    def clean(tokens):
        x = run_prefix(lm, tokens.flatten(0, 1), [hook_name])[hook_name].unflatten(0, tokens.shape[:2])
        return tokens, x, logits_with(tokens, x)

    entries = n_contexts * max(int(at.sum()) * lm.cfg.d_vocab, n_ctx * lm.cfg.d_model * 8)
    shared = clean(rows) if len(rows) == 1 else None
    for part in parts_of(len(edit), at_once, entries):
        some, (tokens, x, logits) = edit[part], shared or clean(rows[part])
        new = torch.where(mask[:, None], some(x), x)
        norm = (new - x)[:, :, mask].norm(dim=-1).mean((1, 2))
        yield part, logits, logits_with(tokens.expand(len(some), -1, -1), new), norm


@torch.no_grad()
def direct_logits(lm, directions: Tensor) -> Tensor:
    """What directions [n, d_model] write straight into the logits, [n, d_vocab]: LN(d) W_U − LN(0) W_U.

    Only the last norm and the unembedding take part. Biases drop out; the scale is that of a residual stream which is d alone.
    """
    weight = next(lm.parameters())
    directions = as_directions(directions).to(weight.device, weight.dtype)
    norm = getattr(lm, "ln_final", torch.nn.Identity())  # GPT-1 has none
    direct = lm.unembed(norm(directions[None])) - lm.unembed(norm(torch.zeros_like(directions[None, :1])))
    return direct[0].float()


def of_targets(values: Tensor, targets: Tensor) -> Tensor:
    """Entries of values [..., d_vocab] at the targets: [n_targets], or a row of them for each entry of the first axis."""
    index = targets.view(-1, *[1] * (values.ndim - 2), targets.shape[-1])
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def target_logprob(logits: Tensor, new: Tensor, targets: Tensor) -> Tensor:
    """log Σ_{t ∈ targets} p_new(t) − log Σ_{t ∈ targets} p(t) in nats, [...].

    logits, new [..., d_vocab]; targets [n_targets], or one row of them for each entry of the first axis of `new`.

    >>> p, p_new = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    >>> target_logprob(p.log(), p_new.log(), torch.tensor([1]))  # log 2
    tensor([0.6931])
    """
    before, after = logits.log_softmax(-1).expand_as(new), new.log_softmax(-1)
    return of_targets(after, targets).logsumexp(-1) - of_targets(before, targets).logsumexp(-1)


def specificity(logits: Tensor, new: Tensor, targets: Tensor) -> Tensor:
    """(mean Δ logit over targets − mean over all other tokens) / standard deviation over those others; shapes as target_logprob.

    0: the targets rise no more than the vocabulary does; 3: three standard deviations more. No unit, so strengths compare.
    """
    delta = new - logits
    own = of_targets(delta, targets)
    n_others = delta.shape[-1] - targets.shape[-1]
    mean = (delta.sum(-1) - own.sum(-1)) / n_others
    squares, own_squares = (((d - mean[..., None]).square()).sum(-1) for d in (delta, own))
    variance = (squares - own_squares) / n_others
    return (own.mean(-1) - mean) / variance.clamp_min(1e-12).sqrt()


def effects(
    lm, rows, hook_name: str, edit, targets, positions=None, at=None, *, each_context=False, at_once=AT_ONCE
) -> dict[str, Tensor]:
    """What n interventions do to the predictions: means over the positions `at` and the contexts, each [n] on the CPU.

    targets: tokens of each intervention, [n, n_targets], or several such sets, {name: [n, n_targets]}. rows, positions, at: as in
    `steer`. each_context: means over positions alone, [n, contexts].

    kl: KL(unsteered ‖ steered) in nats. max_logit: max over the vocabulary of |Δ logit|. target_logprob: the function of this name,
    and of several sets each under its own name. specificity: that function, of the first set. norm: mean ‖x_new − x‖ where
    edited, [n] or [n, 1]. logprob_per_norm: target_logprob / norm of the first set, nats per unit of x, 0 where nothing changed.
    """
    check_edit(edit)
    sets = dict(targets) if isinstance(targets, dict) else {"target_logprob": targets}
    for name, tokens in sets.items():
        sets[name] = tokens = indices("targets", tokens, lm.cfg.d_vocab, "the vocabulary").to(lm.cfg.device)
        if tokens.ndim != 2 or len(tokens) != len(edit):
            raise ValueError(f"targets have shape {list(tokens.shape)}: they have to be [{len(edit)}, n_targets]")
    main = next(iter(sets))
    parts = []
    for part, logits, new, norm in steer(lm, rows, hook_name, edit, positions, at, at_once):
        found = {"kl": kl_divergence(logits, new), "max_logit": (new - logits).abs().amax(-1)}
        found |= {name: target_logprob(logits, new, tokens[part]) for name, tokens in sets.items()}
        found["specificity"] = specificity(logits, new, sets[main][part])
        found = {name: value.mean(2 if each_context else (1, 2)) for name, value in found.items()}
        found["norm"] = norm = norm[:, None] if each_context else norm
        found["logprob_per_norm"] = torch.where(norm > 0, found[main] / norm.clamp_min(1e-12), 0)
        parts.append({name: value.cpu() for name, value in found.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def latent_effects(
    lm, rows, hook_name: str, directions: Tensor, norm: float, *, tokens=None, at_once: int = AT_ONCE
) -> dict[str, Tensor]:
    """Add each direction, scaled to `norm`, at positions ≥ 1 of every row, and measure the predictions made there.

    rows [contexts, n_ctx] tokens; directions [n, d_in], of any length but 0; tokens [n]: each direction's own token, by default
    the first of its `direct_logits`. Returns kl and max_logit as in `effects`, own_logprob, the change of log p of the own token
    in nats, and tokens; each [n].

    >>> rows, hook = torch.arange(6).view(2, 3), "blocks.1.hook_resid_post"
    >>> {name: list(v.shape) for name, v in latent_effects(lm, rows, hook, torch.eye(128)[:4], norm=1.0).items()}
    {'kl': [4], 'max_logit': [4], 'own_logprob': [4], 'tokens': [4]}
    """
    pushes = scaled(directions, norm).to(lm.cfg.device)
    tokens = torch.as_tensor(direct_logits(lm, pushes).argmax(-1) if tokens is None else tokens, device=lm.cfg.device)
    found = effects(lm, rows, hook_name, Add(pushes), {"own_logprob": tokens[:, None]}, at_once=at_once)
    return {name: found[name] for name in ("kl", "max_logit", "own_logprob")} | {"tokens": tokens}


@torch.no_grad()
def generate(
    lm, rows, n_new: int, hook_name: str, edit, positions=None, *, temperature=1.0, seed=0, cached=True, at_once=AT_ONCE
) -> Tensor:
    """Continue contexts under n interventions, [n, contexts, n_prompt + n_new].

    rows: tokens [contexts, n_prompt] or [n, contexts, n_prompt]. positions: where `edit` acts (default all but 0, generated ones
    too). The next token is argmax(logits / temperature + Gumbel noise), a sample. All interventions share the noise, so that they
    differ by what they do and not by luck. temperature 0 is greedy. `cached=False` runs the whole text at every step, which gives
    the same slowly; a model whose cache is not exact always does. Raises ValueError if the text outgrows the model's context.
    """
    from transformers import DynamicCache

    check_hook(lm, hook_name)
    check_edit(edit)
    rows, n_new = as_tokens(lm, rows, len(edit)), whole("n_new", n_new)
    temperature, seed = real("temperature", temperature, least=0), whole("seed", seed, 0, 2**63 - 1)
    cached = cached and cache_is_exact(lm)
    n_contexts, n_prompt = rows.shape[1:]
    if n_prompt + n_new > lm.cfg.n_ctx:
        raise ValueError(f"{n_prompt} + n_new={n_new} tokens are more than the model's context of {lm.cfg.n_ctx}")
    mask = check_positions(positions, n_prompt + n_new).to(rows.device)
    entries = n_contexts * max(lm.cfg.d_vocab, n_prompt * lm.cfg.d_model * 8)
    done = []
    for part in parts_of(len(edit), at_once, entries):
        some, text = edit[part], rows.expand(len(edit), -1, -1)[part].flatten(0, 1)
        noise = torch.Generator().manual_seed(seed)
        cache = DynamicCache() if cached else None
        for step in range(n_new):
            first = text.shape[1] - 1 if cached and step else 0  # position of the first token that this step runs

            def change(x, hook, some=some, first=first):
                split = x.flatten(2).unflatten(0, (len(some), n_contexts))
                new = torch.where(mask[first : first + x.shape[1], None], some(split), split)
                return new.to(x.dtype).reshape(x.shape).contiguous()

            more = {"past_key_values": cache, "use_cache": True} if cached else {}
            last = ("unembed.hook_in", lambda h, hook: h[:, -1:])
            logits = lm.run_with_hooks(text[:, first:], fwd_hooks=[(hook_name, change), last], **more)[:, -1].float()
            if temperature:
                uniform = torch.rand(n_contexts, logits.shape[-1], generator=noise).clamp_min(1e-20)
                gumbel = -(-uniform.log()).clamp_min(1e-20).log()
                logits = logits / max(temperature, 1e-6) + gumbel.to(logits.device).repeat(len(some), 1)
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        done.append(text.unflatten(0, (len(some), n_contexts)))
    return torch.cat(done)


@torch.no_grad()
def cache_is_exact(lm) -> bool:
    """Whether a few tokens in two parts, with Hugging Face's cache between, give the logits of one run; found once per model."""
    from transformers import DynamicCache

    if "cache_is_exact" not in vars(lm):
        tokens, cache = few_tokens(lm), DynamicCache()
        lm.cache_is_exact = False
        # a model with a cache of its own kind ends in one of these errors
        with contextlib.suppress(AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            parts = [lm(part, past_key_values=cache, use_cache=True) for part in tokens.tensor_split(2, 1)]
            lm.cache_is_exact = agree(torch.cat(parts, 1), lm(tokens))
    return lm.cache_is_exact


@torch.no_grad()
def generation_nats(lm, generated: Tensor, n_prompt: int, batch_rows: int = 64) -> Tensor:
    """Cross-entropy of the generated tokens under the unsteered model, a mean over them, [n, contexts]; perplexity is exp of it."""
    rows = as_tokens(lm, generated).flatten(0, 1)
    n_prompt = whole("n_prompt", n_prompt, most=rows.shape[1] - 1)
    keep = ("unembed.hook_in", lambda h, hook: h[:, n_prompt - 1 :])
    losses = [
        token_loss(lm.run_with_hooks(part, fwd_hooks=[keep]), part[:, n_prompt - 1 :]).mean(1)
        for part in rows.split(batch_rows)
    ]
    return torch.cat(losses).view(generated.shape[:2]).cpu()
