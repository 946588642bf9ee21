"""The files of a language model: which of them determine its results, and whether they are whole.

Imports no torch, so that a run's identity needs no model.
"""

import os
import re
from pathlib import Path

from ..files import ASSETS, BUILTIN_MODEL, digest, file_hash, read_table, replacing
from ..values import near

MODEL_FILES = ["config.json", "*.safetensors", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
MODEL_FILES += ["*.safetensors.index.json", "added_tokens.json", "vocab.*", "*.model", "*.tiktoken"]
HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?(@.+)?"


def model_hash(model: str) -> str:
    """What identifies a language model: a hash of its weights, configuration and tokenizer if it is `"python-lm"` or a
    local directory, else its hub name (`name` or `name@revision`). Raises as `find_model` does."""
    directory = find_model(model)
    return digest([(file.name, file_hash(file)) for file in model_files(directory)]) if directory else str(model)


def find_model(model: str) -> Path | None:
    """The directory of the built-in or a local model, or None for a name that only the hub can know; no network is asked.

    Raises FileNotFoundError for a directory that is not there or holds no model, for a name that no hub model can have, and
    for one close to the built-in name or a directory here. ValueError for a model with an adapter, which no hash covers.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise ValueError(f"model={model!r}: it has to be {BUILTIN_MODEL!r}, a directory, or a hub name")
    path = ASSETS / model if model == BUILTIN_MODEL else Path(os.path.expanduser(model))
    if model == BUILTIN_MODEL or os.path.exists(path):
        if path.is_file():
            raise no_model(model, "it is a file, not a directory")
        if not (path / "config.json").is_file():
            raise no_model(model, f"no config.json in {path}; it has to be a Hugging Face directory")
        if (path / "adapter_config.json").exists():
            raise ValueError(f"{path} holds an adapter. Merge it into its model first (PEFT's merge_and_unload)")
        return path.resolve()
    beside = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    guess = near(path.name, beside + [BUILTIN_MODEL] * (str(model) == path.name), 0.8)
    impossible = not re.fullmatch(HUB_NAME, str(model))
    if impossible or guess and "@" not in path.name:
        also = ", and no hub model can have this name" if impossible and not str(model).startswith((".", "/")) else ""
        raise no_model(model, f"no such directory{guess}{also}")
    return None


def no_model(model, reason: str) -> FileNotFoundError:
    allowed = f"{BUILTIN_MODEL!r}, a Hugging Face directory, or a hub name such as 'openai-community/gpt2'"
    return FileNotFoundError(f"model={model!r}: {reason}. Allowed: {allowed}.")


def model_files(directory: Path) -> list[Path]:
    """The files of a model directory on which its results depend."""
    files = [file for pattern in MODEL_FILES for file in sorted(directory.glob(pattern)) if file.is_file()]
    return list(dict.fromkeys(files))


def check_files(directory: Path) -> None:
    """Raise ValueError that names the file for a model directory whose weights are not there, not safetensors or damaged; see
    `verify`. Nothing else is ever read: other formats can run code."""
    from safetensors import SafetensorError, safe_open

    read_table(directory / "config.json")
    index, shards = directory / "model.safetensors.index.json", ["model.safetensors"]
    if not (directory / shards[0]).exists() and index.exists():
        try:
            shards = sorted(set(read_table(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} has no weight_map from tensors to files: fetch the model again") from None
    files = {file.name: file for file in model_files(directory)}
    for shard in shards:
        if shard not in files:
            anew = "load the model and its tokenizer with transformers, and save_pretrained both in a new directory"
            missing = f"{directory}/{shard} is missing, and only safetensors are loaded: fetch the model again"
            raise ValueError(f"{missing}. If you trust weights of another kind, {anew}")
        try:
            with safe_open(files[shard], "pt"):
                pass
        except (SafetensorError, OSError) as error:
            wrong = f"is truncated or no safetensors file ({error}): fetch the model again"
            raise ValueError(f"{files[shard]} {wrong}") from None
    verify(directory)


def write_sums(directory) -> None:
    """Write SHA256SUMS, as `sha256sum` does, for a model directory's files: they are verified whenever the model is loaded."""
    directory = Path(directory)
    lines = [f"{file_hash(file)}  {file.name}\n" for file in model_files(directory)]
    with replacing(directory / "SHA256SUMS") as new:
        new.write_text("".join(lines))


def verify(directory: Path) -> None:
    """Raise ValueError for a damaged model file: one with another hash than SHA256SUMS of its directory has, or the hub's cache,
    where large files are named by their hash. A directory without either is not verified."""
    sums, files = directory / "SHA256SUMS", model_files(directory)
    if sums.exists():
        lines = [line.partition(" ") for line in sums.read_text(errors="replace").splitlines()]
        wanted = {name.lstrip(" *").removeprefix("./"): sha256 for sha256, _, name in lines}
        wanted.pop(sums.name, None)
        if unknown := [file.name for file in files if file.suffix == ".safetensors" and file.name not in wanted]:
            raise ValueError(f"{sums} has no line for {unknown[0]}: write it anew with sha256sum, or delete it")
    else:
        blobs = {file.name: file.resolve().name for file in files if file.is_symlink()}
        wanted = {name: blob for name, blob in blobs.items() if re.fullmatch("[0-9a-f]{64}", blob)}
    for name, sha256 in wanted.items():
        file = directory / name
        if not file.is_file() or file_hash(file) != sha256:
            wrong = "damaged: its bytes are not those" if file.is_file() else "missing: it is one"
            names = sums if sums.exists() else "its name in the hub cache"
            raise ValueError(f"{file} is {wrong} that {names} names. Delete the model and fetch it again")
