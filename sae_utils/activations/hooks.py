"""Run a language model up to a hook, splice an activation in and go on, and measure the loss per token.

Hooks are those of the model's `hook_dict`; those with more than one feature axis (attn.hook_z: [batch, pos, head, d_head])
are flattened to [batch, pos, d_in] on the way out and restored on the way in.
"""

import contextlib
import difflib
import functools
import re
import warnings
from unittest.mock import patch

import torch
from torch import Tensor


def check_name(lm, hook_name: str) -> None:
    """Raise ValueError that names the nearest hooks and the number of layers if the model has no such hook."""
    if not hasattr(lm, "hook_dict"):
        raise ValueError(f"lm is {type(lm).__name__}: it has to be a model that load_language_model returned")
    if hook_name not in lm.hook_dict:
        usual = [n for n in lm.hook_dict if re.search(r"hook_(resid_\w+|mlp_out|attn_out|z)$", n)]
        near = ", ".join(difflib.get_close_matches(str(hook_name), usual, n=4, cutoff=0))
        layers = f"{lm.cfg.n_layers} layers are blocks.0 to blocks.{lm.cfg.n_layers - 1}"
        raise ValueError(f"hook_name={hook_name!r} is not a hook of this model, whose {layers}. Near ones: {near}")


def check_hook(lm, hook_name: str) -> None:
    """Raise ValueError for an unknown hook, or one at which this model cannot be spliced exactly; once per model and hook.

    On a few tokens, the clean activation has to leave the logits as they are, and another one has to change them. Where the
    layers before a residual hook cannot be left out exactly, splices there run the whole model, and a warning says so.
    """
    check_name(lm, hook_name)
    checked = vars(lm).setdefault("idle_blocks", {})  # by hook: how many blocks a splice of a tensor leaves out
    if hook_name in checked:
        return
    residual = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    n_idle, exact = int(residual[1]) + (residual[2] == "post") if residual else 0, False
    tokens = few_tokens(lm).expand(2, -1)
    with torch.no_grad():
        clean, x = lm(tokens), run_prefix(lm, tokens, [hook_name])[hook_name]
        if not clean.isfinite().all():  # nothing to compare: whoever runs the model says where it is not finite
            checked[hook_name] = 0
            return
        noise = torch.arange(x.numel(), device=x.device).sin().view(x.shape)
        other = x + (noise * (x.float().std() or 1)).to(x.dtype)
        whole = splice(lm, tokens, hook_name, lambda _: other)
        if not agree(splice(lm, tokens, hook_name, lambda x: x.clone()), clean) or torch.equal(whole, clean):
            wrong = "what is put there does not reach the logits of this model as it should"
            raise ValueError(f"hook_name={hook_name!r}: {wrong}. Use another hook, such as blocks.0.hook_resid_post")
        # some families do more with what a layer returns than hand it on, and end in an error
        with contextlib.suppress(IndexError, TypeError, ValueError, RuntimeError, AttributeError):
            exact = not n_idle or agree(splice(lm, tokens, hook_name, other, n_idle=n_idle), whole)
    if not exact:
        warnings.warn(f"{hook_name}: this model needs its early layers, so every splice there runs all of them")
    checked[hook_name] = n_idle if exact else 0


def few_tokens(lm) -> Tensor:
    """[1, 8] tokens to check a model with."""
    return torch.arange(min(8, lm.cfg.n_ctx), device=lm.cfg.device)[None] % lm.cfg.d_vocab


def agree(logits: Tensor, expected: Tensor) -> bool:
    """Whether two logits are equal but for rounding: relative to the largest, 1e-3, or 0.05 in half precision."""
    tolerance = 0.05 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool((logits.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())


def check_tokens(lm, tokens) -> None:
    """ValueError for token ids that are no [batch, n_ctx] of whole numbers, too long, or outside the model's vocabulary."""
    if "int" not in str(getattr(tokens, "dtype", "")) or tokens.ndim != 2 or not min(tokens.shape):
        raise ValueError(f"tokens are {described(tokens)}: they have to be whole numbers [batch, n_ctx]")
    if tokens.shape[-1] > lm.cfg.n_ctx:
        raise ValueError(f"n_ctx={tokens.shape[-1]} is longer than the model's context of {lm.cfg.n_ctx} tokens")
    tokens = tokens.long() if isinstance(tokens, Tensor) else tokens  # torch has no minimum of some integer types
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < lm.cfg.d_vocab:
            vocabulary = f"the model's vocabulary has {lm.cfg.d_vocab}"
            raise ValueError(f"rows holds token {token}, and {vocabulary}: another tokenizer's")


def described(value) -> str:
    """What a value is, for messages: its type, and shape and dtype if it has them."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{value.dtype} {list(shape)}"


class AllFound(Exception):
    """Raised inside the model when the last hook wanted has been seen, to run no further."""


def run_prefix(lm, tokens: Tensor, hook_names: list[str]) -> dict[str, Tensor]:
    """Run the model just far enough; return the activation at each hook, [batch, n_ctx, d_in], without gradient.

    >>> run_prefix(lm, torch.tensor([[1, 2, 3]]), ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"].shape
    torch.Size([1, 3, 128])
    """
    for name in hook_names:
        check_name(lm, name)
    check_tokens(lm, tokens)
    found: dict[str, Tensor] = {}

    def keep(name, activation, hook):  # the hook's own name may be another: hook_resid_pre is an alias of hook_in
        found[name] = activation
        if len(found) == len(set(hook_names)):
            raise AllFound

    with torch.no_grad(), contextlib.suppress(AllFound):
        lm.run_with_hooks(tokens, fwd_hooks=[(name, functools.partial(keep, name)) for name in set(hook_names)])
    for name in hook_names:
        if name not in found or found[name].shape[:2] != tokens.shape or found[name].ndim < 3:
            raise ValueError(f"hook_name={name!r} does not give one vector for each token [batch, n_ctx]")
    return {name: found[name].flatten(2) for name in hook_names}


def run_spliced(lm, tokens: Tensor, hook_name: str, replace, hooks=()) -> Tensor:
    """Logits [batch, n_ctx, d_vocab] with the activation at the hook replaced.

    replace: a tensor [batch, n_ctx, d_in], or a function from the clean activation of that shape to its replacement.
    Gradients flow through the replacement if it needs them. With a tensor at a residual hook only the layers after it run.
    hooks: further pairs (name, function of activation and hook), called after the splice.

    >>> hook, tokens = "blocks.1.hook_resid_post", torch.tensor([[1, 2, 3]])
    >>> torch.allclose(run_spliced(lm, tokens, hook, lambda x: x), lm(tokens), atol=1e-4)
    True
    """
    check_hook(lm, hook_name)
    check_tokens(lm, tokens)
    return splice(lm, tokens, hook_name, replace, hooks, 0 if callable(replace) else lm.idle_blocks[hook_name])


def splice(lm, tokens: Tensor, hook_name: str, replace, hooks=(), n_idle: int = 0) -> Tensor:
    """`run_spliced` without its checks; the first n_idle blocks hand on the residual stream, and their hooks still see it.

    TransformerLens' `start_at_layer` computes the early blocks and throws the result away; this does not.
    """
    n_more = n_outputs(lm) - 1 if n_idle else 0

    def hand_on(hidden_states, *args, **kwargs):
        return hidden_states if n_more < 0 else (hidden_states, *[None] * n_more)

    def put(activation, hook):
        flat = activation.flatten(2)
        new = replace(flat) if callable(replace) else replace
        if not isinstance(new, Tensor) or new.shape != flat.shape:
            wanted = f"a tensor {list(flat.shape)}, as x there"
            raise ValueError(f"the replacement at {hook_name} is {described(new)}: it has to be {wanted}")
        return new.to(activation).reshape(activation.shape).contiguous()  # some layers view it

    with contextlib.ExitStack() as idle:
        for block in lm.blocks[:n_idle]:
            idle.enter_context(patch.object(block.original_component, "forward", hand_on))
        return lm.run_with_hooks(tokens, fwd_hooks=[(hook_name, put), *hooks])


def run_with_gradient(lm, tokens: Tensor, hook_names: list[str], at: str) -> tuple[dict[str, Tensor], Tensor]:
    """Activations at the hooks, and g = ∇ₓ Σ next-token loss at hook `at` (nats; summed, so a batch's size does not scale it).

    One forward, one backward through what comes after `at`; all [batch, n_ctx, d_in]. The gradient is 0 at position 0, an
    outlier, and at the last position, which predicts nothing that is known.
    """
    check_hook(lm, at)
    for name in hook_names:
        check_name(lm, name)
    check_tokens(lm, tokens)
    found: dict[str, Tensor] = {}

    def leaf(activation, hook):
        found["leaf"] = activation.detach().requires_grad_()
        return found["leaf"].clone()

    keep = [(name, lambda x, hook, name=name: found.__setitem__(name, x.detach())) for name in hook_names]
    with torch.enable_grad():
        loss = token_loss(lm.run_with_hooks(tokens, fwd_hooks=[*keep, (at, leaf)]), tokens).sum()
        grad = torch.autograd.grad(loss, found.pop("leaf"))[0].flatten(2)
    grad[:, 0] = grad[:, -1] = 0
    return {name: x.flatten(2) for name, x in found.items()}, grad


def later_layers(lm, hook_name: str) -> list[str]:
    """resid_pre of the layers after a hook; not the hook itself under another name, and not the final resid_post."""
    at = re.match(r"blocks\.(\d+)\.(.*)", hook_name)
    first = int(at[1]) + (2 if at[2] in ("hook_resid_post", "hook_out") else 1) if at else lm.cfg.n_layers
    return [f"blocks.{layer}.hook_resid_pre" for layer in range(first, lm.cfg.n_layers)]


def n_outputs(lm) -> int:
    """Length of the tuple that a Hugging Face layer returns, 0 for the bare residual stream: run to see, once per model."""
    if not hasattr(lm, "n_layer_outputs"):
        seen, layer = [], lm.blocks[0].original_component
        with layer.register_forward_hook(lambda module, args, out: seen.append(out)), torch.no_grad():
            lm(few_tokens(lm))
        lm.n_layer_outputs = len(seen[0]) if type(seen[0]) is tuple else 0
    return lm.n_layer_outputs


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token, [batch, n_ctx − 1]; entry p is the loss of predicting token p + 1 at position p.

    >>> token_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))  # log 8 for each of two predictions
    tensor([[2.0794, 2.0794]])
    """
    log_probs = logits[:, :-1].float().log_softmax(-1)
    return -log_probs.gather(-1, tokens[:, 1:, None].long()).squeeze(-1)
