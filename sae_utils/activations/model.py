"""Language models: which one a name means, loaded and checked."""

import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from ..device import resolve_device
from ..files import BUILTIN_MODEL, offline
from ..values import one_of
from .hooks import agree
from .model_files import MODEL_FILES, check_files, find_model, no_model

DTYPES = ("float32", "bfloat16", "float16", "float64")


def model_path(model: str) -> str:
    """The directory of a model: the built-in one, a local one, or that in the hub's cache, where its files are fetched first.
    FileNotFoundError says whether the directory, the hub's model or the network is missing."""
    if directory := find_model(model):
        return str(directory)
    from huggingface_hub import errors, snapshot_download

    name, _, revision = str(model).partition("@")
    only = dict(allow_patterns=MODEL_FILES, ignore_patterns=["*/*", "consolidated*"])
    try:
        return snapshot_download(name, revision=revision or None, **only)
    except errors.GatedRepoError:
        reason = "the hub asks you to log in and accept its terms first (hf auth login)"
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        reason = "the hub does not have it, or it is private"
    except errors.LocalEntryNotFoundError:
        unreachable = "HF_HUB_OFFLINE is set" if offline() else "the hub cannot be reached"
        reason = f"{unreachable}, and the hub cache does not hold it"
    raise no_model(model, f"no such directory, and {reason}")


def load_tokenizer(directory: Path):
    """A model directory's own tokenizer; ValueError if it has none that can be loaded, or one without a vocabulary."""
    from transformers import AutoTokenizer

    reason = "it is empty"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if set(tokenizer.get_vocab()) > set(tokenizer.all_special_tokens):
            return tokenizer
    except Exception as error:  # whatever the two libraries raise for a file that they do not know
        reason = brief(error)
    found = f"What transformers makes of the files there: {reason}"
    raise ValueError(f"no tokenizer in {directory}: save one there (tokenizer.save_pretrained). {found}")


def brief(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first:.160}"


def load_language_model(model: str = BUILTIN_MODEL, device: str = "auto", dtype="float32"):
    """A frozen TransformerBridge of TransformerLens in eval mode, with its tokenizer as `.tokenizer`.

    It runs on the raw Hugging Face weights: LayerNorm is not folded, and writing weights are not centred.

    model: `"python-lm"`, a local Hugging Face directory (no hub call is made), or a hub name, with `@revision` if wanted.
    dtype: "float32", "bfloat16", "float16" or "float64", or torch's own.

    Only safetensors are read, and no code of a model's. The built-in model, models in the hub cache and directories with a
    SHA256SUMS (`model_files.write_sums`) are verified. Another directory is only identified: its hash is in the identity of
    every run.

    Raises FileNotFoundError for a model that is not there, ValueError for a device or dtype that is not there, files that are
    damaged or missing, weights that do not fit, and a family that TransformerLens cannot run as transformers does.

    >>> lm = load_language_model("python-lm", device="cpu")
    >>> lm.cfg.n_layers, lm.cfg.d_model
    (6, 128)
    """
    device = resolve_device(device)
    dtype = getattr(torch, one_of("dtype", str(dtype).removeprefix("torch."), DTYPES))
    directory = Path(model_path(model))
    check_files(directory)
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging

    logging.disable_progress_bar()  # no bars and no advice in notebooks; warnings and errors stay
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(directory)
    raw = load_weights(directory, dtype).eval().to(device)
    config, families = raw.config, "another family, such as GPT-2, Llama, Qwen, GPT-NeoX, Gemma or OPT"
    try:
        n = min(8, getattr(config.get_text_config(), "max_position_embeddings", None) or 8)
        tokens = torch.arange(n, device=device)[None] % raw.get_input_embeddings().num_embeddings
        with torch.no_grad():
            expected = raw(tokens[:, :-1]).logits
            lm = TransformerBridge.boot_transformers(str(directory), device=device, dtype=dtype, hf_model=raw)
            lm.eval().requires_grad_(False)
            same = agree(lm(tokens)[:, :-1], expected)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the two libraries raise for a family that they do not know
        other = "" if dtype == torch.float32 else "dtype='float32', or "
        why = f"cannot run it (family {config.model_type!r}; {brief(error)}). Use {other}{families}"
        raise ValueError(f"model={model!r}: TransformerLens {version('transformer-lens')} {why}") from error
    # Falcon's eager attention, which hooks need, adds the biases of ALiBi twice
    if not same or getattr(config, "alibi", False):
        why = "its logits in TransformerLens are not those of transformers, or they depend on later tokens"
        raise ValueError(f"model={model!r}: on the same tokens, {why}. Nothing can be measured on it: use {families}")
    for name in ("eos_token", "bos_token"):  # TransformerLens invents those that a tokenizer does not have
        if getattr(tokenizer, name) is None:
            setattr(lm.tokenizer, name, None)
    return lm


def load_weights(directory: Path, dtype: torch.dtype):
    """The Hugging Face model. ValueError names a tensor that is missing, of another shape, or not finite, and a warning tensors
    that are not used."""
    from transformers import AutoConfig, AutoModelForCausalLM

    safely = dict(local_files_only=True, trust_remote_code=False)
    needed = dict(output_attentions=True, attn_implementation="eager")  # by hooks
    known = dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    try:
        config = AutoConfig.from_pretrained(directory, **needed, **safely)
        model, loading = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype, **known, **safely)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{directory}: transformers cannot make a model of config.json ({brief(error)})") from error
    wrong = [f"have no tensor {name}" for name in sorted(loading["missing_keys"])]
    for name, there, wanted in sorted(loading["mismatched_keys"]):
        wrong.append(f"do not fit config.json in {name}, {list(there)} and not {list(wanted)}")
    if wrong:
        raise ValueError(f"{directory}: the weights {wrong[0]} ({len(wrong)} such in all): they are another model's")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            found = f"{name} holds NaN or infinity as {str(parameter.dtype).removeprefix('torch.')}"
            raise ValueError(f"{directory}: {found}: the weights are damaged, or need another dtype")
    if unused := sorted(name for name in loading["unexpected_keys"] if name.endswith("weight")):  # not old masks
        found = f"{len(unused)} tensors of the weights have no place in config.json, such as {unused[0]}"
        warnings.warn(f"{directory}: {found}")
    return model
