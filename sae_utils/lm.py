"""Language models: load one, run it up to a hook, splice an activation in and go on, loss per token.

A model is a `TransformerBridge` of TransformerLens over raw Hugging Face weights (LayerNorm not folded, writing weights not
centred). Hooks are those of its `hook_dict`; those with more than one feature axis (attn.hook_z: [batch, pos, head, d_head])
are flattened to [batch, pos, d_in] on the way out and restored on the way in.
"""

import contextlib
import difflib
import functools
import math
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from .files import ASSETS, offline
from .files import BUILTIN_MODEL as BUILTIN


def resolve_device(device: str = "auto") -> str:
    """`"auto"` is CUDA, then MPS, then CPU; a device that is not there is an error."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: this torch sees no CUDA GPU. Allowed here: 'auto', 'cpu'.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={device!r}: this torch sees no Apple GPU. Allowed here: 'auto', 'cpu'.")
    return device


def model_path(model: str) -> str:
    """What to hand to the loader: the directory of the built-in model, a local directory, or a hub name as it is."""
    path = ASSETS / BUILTIN if model == BUILTIN else Path(model).expanduser()
    if model == BUILTIN or path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"model={model!r}: no config.json in {path}; it has to be a Hugging Face directory")
        return str(path.resolve())
    reason = ""
    if path.is_absolute() or model.startswith(".") or len(path.parts) > 2:
        reason = "no such directory"
    elif offline() and not in_hub_cache(model):
        reason = "no such directory, and HF_HUB_OFFLINE is set and the hub cache does not hold it"
    if reason:
        raise FileNotFoundError(
            f"model={model!r}: {reason}. Allowed: {BUILTIN!r}, a Hugging Face directory, a hub name."
        )
    return model


def in_hub_cache(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.partition("@")[0], "config.json"), str)


def load_language_model(model: str = BUILTIN, device: str = "auto", dtype: str = "float32"):
    """A frozen TransformerBridge in eval mode, with its tokenizer as `.tokenizer`.

    model: `"python-lm"`, a local Hugging Face directory (no hub call is made), or a hub name, with `@revision` if wanted.
    Raises FileNotFoundError for a path that is not there, ValueError for a device that is not there or an unknown dtype.
    """
    device = resolve_device(device)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no type of torch. Usual: 'float32', 'bfloat16', 'float16'.")
    path = model_path(model)
    quiet_imports()
    from transformer_lens.model_bridge import TransformerBridge

    name, _, revision = (path, "", "") if Path(path).is_dir() else path.partition("@")
    lm = TransformerBridge.boot_transformers(
        name, device=device, dtype=getattr(torch, dtype), **({"revision": revision} if revision else {})
    )
    lm.eval().requires_grad_(False)
    return lm


def quiet_imports() -> None:
    """Keep transformers' progress bars and advice out of notebooks; warnings and errors stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_hook(lm, hook_name: str) -> None:
    """Raise ValueError naming the nearest hooks if the model has no such hook."""
    if hook_name in lm.hook_dict:
        return
    usual = [n for n in lm.hook_dict if re.search(r"hook_(resid_\w+|mlp_out|attn_out|z)$", n)]
    near = difflib.get_close_matches(hook_name, usual, n=4, cutoff=0) or usual[:4]
    raise ValueError(f"hook_name={hook_name!r} is not a hook of this model. Near ones: {', '.join(near)}")


def check_tokens(lm, tokens: Tensor) -> None:
    if tokens.shape[-1] > lm.cfg.n_ctx:
        raise ValueError(f"n_ctx={tokens.shape[-1]} is longer than the model's context of {lm.cfg.n_ctx} tokens")


class AllFound(Exception):
    """Raised inside the model when the last hook wanted has been seen, to run no further."""


def run_prefix(lm, tokens: Tensor, hook_names: list[str]) -> dict[str, Tensor]:
    """Run the model just far enough; return the activation at each hook, [batch, n_ctx, d_in], without gradient."""
    for name in hook_names:
        check_hook(lm, name)
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
    """
    check_hook(lm, hook_name)
    check_tokens(lm, tokens)

    def splice(activation, hook):
        new = replace(activation.flatten(2)) if callable(replace) else replace
        return new.to(activation.dtype).reshape(activation.shape).contiguous()  # some layers view it

    residual = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    n_idle = int(residual[1]) + (residual[2] == "post") if residual and not callable(replace) else 0
    with idle(lm, n_idle):
        return lm.run_with_hooks(tokens, fwd_hooks=[(hook_name, splice), *hooks])


def run_with_gradient(lm, tokens: Tensor, hook_names: list[str], at: str) -> tuple[dict[str, Tensor], Tensor]:
    """Activations at the hooks, and g = ∇ₓ Σ next-token loss at hook `at` (nats; summed, so a batch's size does not scale it).

    One forward, one backward through what comes after `at`; all [batch, n_ctx, d_in]. The gradient is 0 at position 0, an
    outlier, and at the last position, which predicts nothing that is known.
    """
    for name in {*hook_names, at}:
        check_hook(lm, name)
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
    first = int(at[1]) + (2 if at[2] == "hook_resid_post" else 1) if at else lm.cfg.n_layers
    return [f"blocks.{layer}.hook_resid_pre" for layer in range(first, lm.cfg.n_layers)]


@contextlib.contextmanager
def idle(lm, n_blocks: int):
    """Make the first blocks hand on the residual stream as they get it; their hooks still see it.

    TransformerLens' `start_at_layer` computes the early blocks and throws the result away; this does not.
    """
    layers = [block.original_component for block in lm.blocks[:n_blocks]]
    as_tuple = bool(layers) and returns_tuple(lm)
    for layer in layers:
        layer.forward = lambda hidden_states, *args, **kwargs: (hidden_states,) if as_tuple else hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes back


def returns_tuple(lm) -> bool:
    """Whether the Hugging Face layers return the residual stream in a tuple: one token is run to see, once per model."""
    if not hasattr(lm, "layers_return_tuple"):
        seen = []
        hook = lm.blocks[0].original_component.register_forward_hook(
            lambda m, args, out: seen.append(type(out) is tuple)
        )
        try:
            with torch.no_grad():
                lm(torch.zeros(1, 1, dtype=torch.long, device=lm.cfg.device))
        finally:
            hook.remove()
        lm.layers_return_tuple = seen[0]
    return lm.layers_return_tuple


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token, [batch, n_ctx − 1]; entry p is the loss of predicting token p + 1 at position p."""
    log_probs = logits[:, :-1].float().log_softmax(-1)
    return -log_probs.gather(-1, tokens[:, 1:, None].long()).squeeze(-1)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Total nats of a text ÷ ln 2 ÷ its length in bytes."""
    return nats / math.log(2) / n_bytes


def versions() -> dict[str, str]:
    """Versions a reader needs to compare numbers."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {p: version(p) for p in ("torch", "transformer-lens", "transformers")}
