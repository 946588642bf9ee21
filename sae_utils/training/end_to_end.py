"""End-to-end objectives: an SAE is judged by what the rest of the model makes of x̂ (arXiv 2405.12241, 2503.17272).

An architecture's own objective, with its distance between x and x̂ replaced by one between the model's predictions, and
between its later layers:

    distance = kl · KL(orig ‖ new) + β · mean over later layers l' of FVU(resid_pre_l', orig → new) + mse · FVU(x → x̂)

KL(orig ‖ new) is a sum over the vocabulary and a mean over tokens, in nats. The paper has a mean square over d_in where we have
batch FVUs (ours: then β and mse need no units), and its λ is ours up to that unit. Position 0 stays clean and counts nowhere.
Only the layers after the hook run: forward for the clean model, once a batch for all SAEs; forward and backward for each SAE.
"""

import contextlib
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations.hooks import AllFound, check_hook, check_tokens, later_layers, splice
from ..activations.store import weights_hash
from ..saes.base import inference
from ..values import flag, one_of, real
from .losses import as_batch, batch_fvu, fvu_of, own_objective

AT_ONCE = 2**24  # entries of [tokens, d_vocab] that exist at a time: 64 MiB in fp32
KEPT = 2**26  # clean probabilities of a batch are kept for the next SAE if they are no more than this


class Clean(NamedTuple):
    """What the model does with the true x of a batch: all that end-to-end objectives compare with."""

    x: Tensor  # [rows, n_ctx, d_in], as the batch holds it
    tokens: Tensor  # [rows, n_ctx]
    last: Tensor  # [tokens, d_model], what is unembedded, positions ≥ 1
    p: list[tuple[Tensor, Tensor]] | None  # `probabilities` by chunks of tokens, or None where too large to keep
    later: dict[str, Tensor]  # resid_pre of the later layers, [rows, n_ctx − 1, d_model]


class Suffix:
    """The part of a frozen language model after a hook, with the clean run of the last batch kept for all SAEs.

    later: hooks at which e2e_downstream_loss compares: resid_pre of all layers after the hook. The final resid_post, which the
    KL judges, is none of them, nor is the hook itself under another name.

    Raises ValueError for an unknown hook, a model that is not frozen and in eval mode, or one whose logits are not its
    unembedding of the last residual stream.
    """

    def __init__(self, lm, hook_name: str):
        check_hook(lm, hook_name)
        if any(p.requires_grad for p in lm.parameters()) or lm.training:
            raise ValueError("the language model has to stay as it is: call lm.eval().requires_grad_(False) first")
        self.lm, self.hook_name = lm, hook_name
        self.later = later_layers(lm, hook_name)
        self.at_once = max(1, AT_ONCE // lm.cfg.d_vocab)  # tokens whose logits exist at a time
        self.kept: Clean | None = None
        self.check_unembedding()

    def __repr__(self) -> str:  # part of a checkpoint's signature: the same in every process
        if not hasattr(self, "model_hash"):
            self.model_hash = weights_hash(self.lm)
        return f"Suffix({self.hook_name!r}, model {self.model_hash})"

    def check_unembedding(self) -> None:
        tokens, found = torch.arange(4, device=self.lm.cfg.device)[None] % self.lm.cfg.d_vocab, []
        with torch.no_grad():
            logits = self.lm.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_in", lambda h, hook: found.append(h))])
            same = torch.allclose(self.logits(found[0]), logits, rtol=1e-3, atol=1e-3)
        if not same:
            raise ValueError(
                "this model does more to its logits than the unembedding: end-to-end losses do not know it"
            )

    def logits(self, last: Tensor) -> Tensor:
        logits, cap = self.lm.unembed(last), getattr(self.lm.cfg, "output_logits_soft_cap", None) or 0
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def run(self, tokens: Tensor, x: Tensor, hooks: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """With x in its place, at positions ≥ 1: what is unembedded [tokens, d_model], and the activations at `hooks`."""
        found: dict[str, Tensor] = {}

        def keep(name):
            def hook_function(activation, hook):
                found[name] = activation[:, 1:]
                if name == "unembed.hook_in":
                    raise AllFound

            return name, hook_function

        with contextlib.suppress(AllFound):
            hooks = [keep(name) for name in [*hooks, "unembed.hook_in"]]
            splice(self.lm, tokens, self.hook_name, x, hooks, self.lm.idle_blocks[self.hook_name])
        return found.pop("unembed.hook_in").flatten(0, 1), found

    @torch.no_grad()
    def clean(self, batch: dict) -> Clean:
        """The clean run of a batch of whole rows; the same batch is not run twice."""
        batch = as_batch(batch)
        x, tokens = batch["x"], batch.get("tokens")
        if tokens is None or x.shape[:-1] != tokens.shape or x.ndim != 3:
            raise ValueError(
                f"x has shape {list(x.shape)}: end-to-end objectives need whole rows [rows, n_ctx, d_in] and their "
                f"`tokens`, which store.batches(n_rows, whole_rows=True) gives"
            )
        version = None if x.is_inference() else x._version  # a buffer that is filled anew is another batch
        if self.kept is None or self.kept.x is not x or self.version != version or version is None:
            check_tokens(self.lm, tokens)
            tokens = tokens.to(x.device)
            last, later = self.run(tokens, x, self.later)
            small = len(last) * self.lm.cfg.d_vocab <= KEPT
            p = [probabilities(self.logits(part)) for part in self.chunks(last)] if small else None
            self.kept, self.version = Clean(x, tokens, last, p, later), version
        return self.kept

    def chunks(self, last: Tensor) -> tuple[Tensor, ...]:
        return last.split(self.at_once)

    def kl(self, clean: Clean, last: Tensor) -> Tensor:
        """KL(orig ‖ new) = Σ_v p_orig (log p_orig − log p_new), a mean over tokens, in nats; last [tokens, d_model] of the new run."""
        return KLOrigNew.apply(last, clean, self)

    def gradient(
        self, batch: dict, at: Tensor | None = None, of: str = "kl", own: bool = False, seed: int = 0
    ) -> Tensor:
        """g = ∇ Σ_p loss_p at an activation `at` [rows, n_ctx − 1, d_in] that takes the place of x at positions ≥ 1; shaped like it.

        at: x̂ say; None is x itself. A sum over positions, in nats: g does not shrink with the batch.
        of: "kl" is KL(orig ‖ new), whose gradient at x is 0. "ce" is the cross-entropy of the next token, which therefore leaks
        into g. "sampled" is that of a token drawn from the clean predictions, which does not.
        own: of every position the gradient of its own loss alone, without later positions that read it. It is an estimate
        without bias: losses get random signs ε_p, and g_p the sign of its position, so that what the others add has mean 0.
        seed: of samples and signs, together with the batch's tokens.

        Raises ValueError for another `of`, an `at` of another shape, or KL at x.
        """
        one_of("of", of, ("kl", "ce", "sampled"))
        clean = self.clean(batch)
        if at is None and of == "kl":
            raise ValueError(
                "of='kl' at x: KL(orig ‖ new) is least there and has no gradient. Give at=x_hat, or of='sampled'"
            )
        if at is not None and at.shape != clean.x[:, 1:].shape:
            raise ValueError(f"at has shape {list(at.shape)}: it has to be {list(clean.x[:, 1:].shape)}, positions ≥ 1")
        generator = seeded(clean.tokens, seed) if own or of == "sampled" else None
        weights = torch.ones_like(clean.x[:, 1:, 0])
        if own:
            weights = torch.randint(0, 2, weights.shape, generator=generator).to(weights) * 2 - 1
        signs = weights[..., None]
        if of == "ce":
            weights = torch.nn.functional.pad(weights[:, :-1], (0, 1))  # the last position has no next token
        next_tokens = clean.tokens[:, 1:].roll(-1, 1).flatten().long()
        with torch.enable_grad():
            point = (clean.x[:, 1:] if at is None else at).detach().clone().requires_grad_()
            last, _ = self.run(clean.tokens, torch.cat([clean.x[:, :1].to(point), point], 1), [])
        gradients, known = [], itertools.repeat(None) if of == "ce" else self.clean_p(clean)
        for (part, logits), found, weight, target in zip(
            self.unembedded(last), known, self.chunks(weights.flatten()), self.chunks(next_tokens)
        ):
            by_logits = log_softmax(logits.detach()).exp_()
            if of == "sampled":
                target = torch.multinomial(found[0].cpu(), 1, generator=generator)[:, 0].to(target.device)
            if of == "kl":
                by_logits -= found[0]
            else:
                by_logits[torch.arange(len(target)), target] -= 1
            gradients += torch.autograd.grad(logits, part, (by_logits * weight[:, None]).to(logits.dtype))
        (g,) = torch.autograd.grad(last, point, torch.cat(gradients).to(last.dtype))
        return g * signs if own else g

    def clean_p(self, clean: Clean):
        """`probabilities` of the clean run, for each chunk of tokens."""
        return clean.p or (probabilities(self.logits(part)) for part in self.chunks(clean.last))

    def unembedded(self, last: Tensor):
        """For each chunk of tokens what is unembedded, as a leaf, and its logits."""
        for part in self.chunks(last):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                logits = self.logits(part)
            yield part, logits


def seeded(tokens: Tensor, seed: int = 0) -> torch.Generator:
    """A generator whose numbers depend on a batch's tokens, and so are equal when a training is resumed."""
    return torch.Generator().manual_seed((seed + int(tokens.sum())) % 2**32)


def log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p [tokens, d_vocab], and Σ p log p over words and tokens."""
    log_p = log_softmax(logits)
    p = log_p.exp()
    return p, p.flatten() @ log_p.flatten()


class KLOrigNew(torch.autograd.Function):
    """KL(orig ‖ new) in chunks of tokens. Its gradient by the new logits, (p_new − p_orig)/tokens, is at hand in the forward
    and goes through the unembedding there, so that no chunk outlives its turn."""

    @staticmethod
    def forward(ctx, last: Tensor, clean: Clean, suffix: Suffix) -> Tensor:
        total, gradient = 0.0, []
        for (part, logits), (p, p_log_p) in zip(suffix.unembedded(last), suffix.clean_p(clean)):
            log_q = log_softmax(logits.detach())
            total = total + p_log_p - p.flatten() @ log_q.flatten()
            if ctx.needs_input_grad[0]:
                by_logits = log_q.exp_().sub_(p)
                gradient += torch.autograd.grad(logits, part, by_logits.to(logits.dtype))
        if gradient:
            ctx.save_for_backward(torch.cat(gradient) / len(last))
        return total / len(last)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (grad * gradient).to(gradient.dtype), None, None


def e2e_loss(
    sae, batch, *, suffix: Suffix, local=None, kl: float = 1.0, beta: float = 0.0, mse: float = 0.0, balanced=False
) -> dict[str, Tensor]:
    """`local` with KL(orig ‖ new) in place of the batch FVU (arXiv 2405.12241): what else `local` has, sparsity say, stays.

    batch: whole rows, x [rows, n_ctx, d_in] and tokens; the SAE sees positions ≥ 1. `local` is the objective of the SAE's class
    if None, else one that fits it, its settings bound by `functools.partial`: `reconstruction_loss` for TopK, which becomes
    KL + α sg(KL / FVU) AuxK, so that AuxK has the part in the loss that it has beside an FVU (ours); `l1_loss` for ReLU;
    `jumprelu_loss`; `gated_loss`, whose gate alone then has to preserve the predictions, too, in a second spliced run.
    kl, beta, mse: weights as at the top of this module. Fine-tuning (arXiv 2503.17272) is a second `train` with mse > 0, or with
    `balanced`: ½ (FVU + sg(FVU / KL) · KL), in which both count alike in every batch. It has the size of the FVU, so that
    penalties and α stay as they were (our reading of that paper's dynamic balance). It takes the place of the three weights.
    Returns the terms of `local`, kl, fvu and, with beta, downstream (a mean over the later layers).
    """
    for name, weight in (("kl", kl), ("beta", beta), ("mse", mse)):
        real(name, weight, 0)
    if flag("balanced", balanced) and (kl, beta, mse) != (1.0, 0.0, 0.0):
        raise ValueError("balanced=True weighs KL and FVU itself: use e2e_loss, and leave out kl, beta and mse")
    local = local or own_objective(sae)
    clean = suffix.clean(batch)
    if beta and not suffix.later:
        raise ValueError(f"beta={beta}: no layer's resid_pre comes after {suffix.hook_name}")
    first: dict[str, Tensor] = {}

    def distance(x: Tensor, x_hat: Tensor) -> Tensor:
        spliced = torch.cat([clean.x[:, :1].to(x_hat.dtype), x_hat.view(len(clean.x), -1, sae.d_in)], 1)
        last, later = suffix.run(clean.tokens, spliced, suffix.later if beta else [])
        terms = {"kl": suffix.kl(clean, last), "fvu": fvu_of(sae)(x, x_hat if mse or balanced else x_hat.detach())}
        total = kl * terms["kl"]
        if balanced:
            share = (terms["fvu"] / terms["kl"].clamp_min(1e-6)).detach()
            total = (terms["fvu"] + share * terms["kl"]) / 2
        if mse:
            total = total + mse * terms["fvu"]
        if beta:
            terms["downstream"] = sum(batch_fvu(clean.later[n], later[n]) for n in suffix.later) / len(suffix.later)
            total = total + beta * terms["downstream"]
        first.update(terms if not first else {})  # a second call is an auxiliary one
        distance.unit = (total / terms["fvu"].clamp_min(1e-6)).detach()
        return total

    ours = {key: batch[key][:, 1:] for key in ("x", "grad") if key in batch}
    return local(sae, batch | ours, distance=distance) | first


def e2e_downstream_loss(sae, batch, *, suffix: Suffix, kl: float = 0.5, beta: float = 1.0, **settings):
    """e2e+ds (arXiv 2405.12241): ½ KL(orig ‖ new) + β/L · Σ of the FVUs of the L later resid_pre, and what else `local` has."""
    return e2e_loss(sae, batch, suffix=suffix, kl=kl, beta=beta, **settings)


def selected_by_gradient(
    sae, batch, *, suffix: Suffix, of: str = "kl", at: str = "x_hat", own: bool = False, control: str = "", local=None
) -> dict[str, Tensor]:
    """`local` of a `GradientSAE` whose `grad` is made in each step: `Suffix.gradient` at x, or at the x̂ of its plain selection.

    batch: whole rows, x [rows, n_ctx, d_in] and tokens; the SAE sees positions ≥ 1. The gradient costs a run of the layers after
    the hook, forward and backward; the SAE's own weights get none through it. local: the objective of the class if None.
    control: "other tokens" permutes the gradients over the batch's tokens; "noise" puts isotropic noise in their place, of the
    same mean |W_dec g| on every token. With either, what the gradient knows of its token is gone. "mean" gives all tokens the
    batch's mean gradient, so that every latent has one weight in a batch.

    Raises ValueError for another `at`, `of` or `control`, for batches that are not whole rows, or an SAE of another class.
    """
    one_of("at", at, ("x_hat", "x"))
    one_of("control", control, ("", "other tokens", "noise", "mean"))
    if not hasattr(sae, "gradient_scale"):
        raise ValueError(f"{type(sae).__name__} selects without a gradient: selected_by_gradient is for a GradientSAE")
    x = suffix.clean(batch).x[:, 1:]
    with torch.no_grad(), inference(sae):
        x_hat = sae(x).x_hat if at == "x_hat" else None
    g = suffix.gradient(batch, x_hat, of, own)
    rows = g.flatten(0, 1)
    if control == "other tokens":
        rows = rows[torch.randperm(len(rows), generator=seeded(batch["tokens"])).to(rows.device)]
    if control == "mean":
        rows = rows.mean(0).expand_as(rows)
    if control == "noise":
        noise = torch.randn(rows.shape, generator=seeded(batch["tokens"])).to(rows)
        effect, of_noise = ((v @ sae.W_dec.detach().T.to(v)).abs().mean(1, keepdim=True) for v in (rows, noise))
        rows = noise * effect / of_noise
    return (local or own_objective(sae))(sae, batch | {"x": x, "grad": rows.view(g.shape)})


selected_by_gradient.gives_grad = True  # so `train` asks none of the stream
