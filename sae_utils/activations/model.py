"""Language models: which one a name means, loaded and checked.

A model is a `TransformerBridge` of TransformerLens over raw Hugging Face weights (LayerNorm not folded, writing weights not
centred).
"""

import re
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ..device import resolve_device
from ..files import BUILTIN_MODEL as BUILTIN
from ..files import offline, read_json
from ..values import near
from .hooks import agree
from .model_files import MODEL_FILES, check_formats, conversion, find_model, model_files, no_model, verify

HUB_SECONDS = 5  # how long the hub may take to answer whether it has a model
FAMILIES = "GPT-2, Llama, Qwen, GPT-NeoX, Gemma or OPT"
DTYPES = ("float32", "bfloat16", "float16", "float64")


def resolve_dtype(dtype) -> torch.dtype:
    """A floating-point type of torch, given as such or by its name."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        guess = near(re.sub(r"^(fp|f|half)(?=\d|$)", "float", name).replace("bf16", "bfloat16"), DTYPES)
        allowed = ", ".join(map(repr, DTYPES))
        raise ValueError(f"dtype={dtype!r} is no type for a language model{guess}: allowed are {allowed}")
    return getattr(torch, name)


def model_path(model: str) -> str:
    """The directory of a model: the built-in one, a local one, or that in the hub's cache, where its files are fetched first.

    Raises FileNotFoundError, which says whether the directory, the hub's model or the network is missing.
    """
    if directory := find_model(model):
        return str(directory)
    from huggingface_hub import HfApi, errors, snapshot_download

    name, _, revision = str(model).partition("@")
    wanted, unreachable = {"repo_id": name, "revision": revision or None}, "HF_HUB_OFFLINE is set" if offline() else ""
    if not unreachable:
        try:
            files = HfApi().model_info(**wanted, timeout=HUB_SECONDS).siblings or []
            if not any(file.rfilename.startswith("model.safetensors") for file in files):
                none = "the hub has no safetensors of it, and nothing else is loaded"
                raise ValueError(f"model={model!r}: {none}. {conversion(name)}")
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            gated = "asks you to log in and accept its terms first (hf auth login)"
            reason = gated if isinstance(error, errors.GatedRepoError) else "does not have it, or it is private"
            raise no_model(model, f"no such directory, and the hub {reason}") from None
        except (OSError, errors.HTTPError) as error:
            unreachable = f"the hub cannot be reached ({type(error).__name__})"
    try:
        only = dict(allow_patterns=MODEL_FILES, ignore_patterns=["*/*", "consolidated*"])
        return snapshot_download(**wanted, **only, local_files_only=bool(unreachable))
    except errors.LocalEntryNotFoundError:
        reason = f"no such directory; {unreachable or 'the download broke off'}, and the hub cache does not hold it"
        raise no_model(model, reason) from None


def check_files(directory: Path) -> None:
    """Raise ValueError that names the file for a model directory that is incomplete or damaged; see `check_formats`, `verify`."""
    from safetensors import SafetensorError, safe_open

    check_formats(directory)
    files = {file.name: file for file in model_files(directory)}
    parsed = {name: read_json(file) for name, file in files.items() if file.suffix == ".json"}
    index = "model.safetensors.index.json"
    for name, found in parsed.items():
        if not isinstance(found, dict):
            raise ValueError(f"{files[name]} holds a {type(found).__name__} and no settings: it is damaged")
    if "transformers_weights" in parsed["config.json"]:
        raise ValueError(f"{files['config.json']} names weights of its own (transformers_weights): remove that entry")
    shards = {"model.safetensors": set()}
    if "model.safetensors" not in files:
        if index not in files:
            raise ValueError(f"{directory}: no model.safetensors, nor an index of shards; save the model there")
        shards, weight_map = {}, parsed[index].get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{files[index]} has no weight_map from tensors to files: fetch the model again")
        for tensor, shard in weight_map.items():
            shards.setdefault(shard, set()).add(tensor)
    for shard, tensors in shards.items():
        if shard not in files:
            raise ValueError(f"{directory / shard} is missing, and {index} names it: fetch the model again")
        try:
            with safe_open(files[shard], "pt") as file:
                lost = tensors - set(file.keys())
        except (SafetensorError, OSError) as error:
            wrong = f"is truncated or no safetensors file ({error}): fetch the model again"
            raise ValueError(f"{files[shard]} {wrong}") from None
        if lost:
            raise ValueError(f"{files[shard]} has no tensor {min(lost)!r}, which {index} says: it is another model's")
    verify(directory)


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
    names = sorted(f.name for f in model_files(directory) if ".safetensors" not in f.name and f.name != "config.json")
    found = f". What transformers makes of {', '.join(names)}: {reason}" if names else ""
    raise ValueError(f"no tokenizer in {directory}: save one there (tokenizer.save_pretrained){found}")


def brief(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first:.160}"


def load_language_model(model: str = BUILTIN, device: str = "auto", dtype="float32"):
    """A frozen TransformerBridge in eval mode, with its tokenizer as `.tokenizer`.

    model: `"python-lm"`, a local Hugging Face directory (no hub call is made), or a hub name, with `@revision` if wanted.
    dtype: "float32", "bfloat16", "float16" or "float64", or torch's own.

    Only safetensors are read, and no code of a model's. The built-in model, models in the hub cache and directories with a
    SHA256SUMS (`files.write_sums`) are verified. Another directory is only identified: its hash is in the identity of every run.

    Raises FileNotFoundError for a model that is not there, ValueError for a device or dtype that is not there, files that are
    damaged or missing, weights that do not fit, and a family that TransformerLens cannot run as transformers does.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    directory = model_path(model)
    check_files(Path(directory))
    from transformers.utils import logging

    logging.disable_progress_bar()  # no bars and no advice in notebooks; warnings and errors stay
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(Path(directory))
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    raw: list[Tensor] = []  # a few tokens, and the logits of transformers on them

    def load(name, **kwargs):
        """The Hugging Face model."""
        safely = dict(use_safetensors=True, local_files_only=True, ignore_mismatched_sizes=True)
        kwargs |= safely | {"output_loading_info": True}
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            reason = f"transformers cannot make a model of config.json ({brief(error)})"
            raise WrongWeights(f"{directory}: {reason}") from error
        check_weights(model, loading, directory)
        reference = model
        if getattr(model.config, "alibi", False):  # Falcon's eager attention, which hooks need, adds these biases twice
            usual = kwargs | {"attn_implementation": None, "config": None}
            reference, _ = AutoModelForCausalLM.from_pretrained(name, **usual)
        n = min(8, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 8)
        tokens = torch.arange(n, device=device)[None] % model.get_input_embeddings().num_embeddings
        with torch.no_grad():
            raw.extend([tokens, reference.eval().to(device)(tokens[:, :-1]).logits])
        return model

    try:
        source = SimpleNamespace(from_pretrained=load)
        lm = TransformerBridge.boot_transformers(directory, device=device, dtype=dtype, model_class=source)
        lm.eval().requires_grad_(False)
        with torch.no_grad():
            same = agree(lm(raw[0])[:, :-1], raw[1])
    except (WrongWeights, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the two libraries raise for a family or a file that they do not know
        family = read_json(Path(directory) / "config.json").get("model_type")
        other = "" if dtype == torch.float32 else "dtype='float32', or "
        raise ValueError(
            f"model={model!r}: TransformerLens {version('transformer-lens')} cannot run it (family {family!r}; "
            f"{brief(error)}). Use {other}another family, such as {FAMILIES}"
        ) from error
    if not same:
        raise ValueError(
            f"model={model!r}: on the same tokens, its logits in TransformerLens are not those of transformers, or they "
            f"depend on later tokens. Nothing can be measured on it: use another family, such as {FAMILIES}"
        )
    for name in ("eos_token", "bos_token"):  # TransformerLens invents those that a tokenizer does not have
        if getattr(tokenizer, name) is None:
            setattr(lm.tokenizer, name, None)
    return lm


class WrongWeights(ValueError):
    """Weights that do not fit the configuration, or are not finite, and a configuration of no model."""


def check_weights(model, loading: dict, directory: str) -> None:
    """Raise WrongWeights that names a tensor that is missing, of another shape, or not finite; warn of tensors that are not used."""
    wrong = [f"have no tensor {name}" for name in sorted(loading["missing_keys"])]
    for name, there, wanted in sorted(loading["mismatched_keys"]):
        wrong.append(f"do not fit config.json in {name}, {list(there)} and not {list(wanted)}")
    if wrong:
        raise WrongWeights(f"{directory}: the weights {wrong[0]} ({len(wrong)} such in all): they are another model's")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            found = f"{name} holds NaN or infinity as {str(parameter.dtype).removeprefix('torch.')}"
            raise WrongWeights(f"{directory}: {found}: the weights are damaged, or need another dtype")
    if unused := sorted(name for name in loading["unexpected_keys"] if name.endswith("weight")):  # not old masks
        found = f"{len(unused)} tensors of the weights have no place in config.json, such as {unused[0]}"
        warnings.warn(f"{directory}: {found}")
