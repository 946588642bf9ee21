"""The files of a language model: which of them determine its results, and whether they are whole.

Imports no torch, so that a run's identity needs no model.
"""

import functools
import os
import re
from pathlib import Path

from ..files import ASSETS, BUILTIN_MODEL, digest, file_hash, read_table, replacing
from ..values import near

MODEL_FILES = ["config.json", "*.safetensors", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
MODEL_FILES += ["*.safetensors.index.json", "added_tokens.json", "vocab.*", "*.model", "*.tiktoken"]
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf"}
HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?(@.+)?"
ANEW = (
    "If you trust them, load the model and its tokenizer with transformers, and save_pretrained both in a new directory"
)


def model_hash(model: str) -> str:
    """What identifies a language model: a hash of its weights, configuration and tokenizer if it is `"python-lm"` or a
    local directory, else its hub name (`name` or `name@revision`). Raises as `find_model` and `check_formats` do."""
    directory = find_model(model)
    if not directory:
        return str(model)
    check_formats(directory)
    return digest([(file.name, file_hash(file)) for file in model_files(directory)])


def find_model(model: str) -> Path | None:
    """The directory of the built-in or a local model, or None for a name that only the hub can know; no network is asked.

    Raises FileNotFoundError for a directory that is not there or holds no model, for a name that no hub model can have, and
    for one close to the built-in name or a directory here.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise ValueError(f"model={model!r}: it has to be {BUILTIN_MODEL!r}, a directory, or a hub name")
    path = ASSETS / model if model == BUILTIN_MODEL else Path(os.path.expanduser(model))
    if model == BUILTIN_MODEL or os.path.exists(path):
        if not (path / "config.json").is_file():
            raise no_model(model, f"no config.json in {path}; it has to be a Hugging Face directory")
        return path.resolve()
    beside = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    guess = near(path.name, beside + [BUILTIN_MODEL] * (str(model) == path.name), 0.8)
    if guess and "@" not in path.name or not re.fullmatch(HUB_NAME, str(model)):
        raise no_model(model, f"no such directory{guess}")
    return None


def no_model(model, reason: str) -> FileNotFoundError:
    allowed = f"{BUILTIN_MODEL!r}, a Hugging Face directory, or a hub name such as 'openai-community/gpt2'"
    return FileNotFoundError(f"model={model!r}: {reason}. Allowed: {allowed}.")


def model_files(directory: Path) -> list[Path]:
    """The files of a model directory on which its results depend."""
    files = [file for pattern in MODEL_FILES for file in sorted(directory.glob(pattern)) if file.is_file()]
    return list(dict.fromkeys(files))


def check_formats(directory: Path) -> None:
    """Raise ValueError for a model directory whose weights are not safetensors, or which holds code or an adapter of its own.

    Nothing else is ever read: other formats can run code, and no hash covers what code and adapters do.
    """
    if code := sorted(directory.glob("*.py")):
        remedy = "Remove it if transformers itself has this family; otherwise the model cannot be used here"
        raise ValueError(f"{directory} holds code ({code[0].name}), which is never run. {remedy}")
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} holds an adapter. Merge it into its model first (PEFT's merge_and_unload)")
    other = sorted(file.name for file in directory.iterdir() if file.suffix in OTHER_WEIGHTS)
    if other and not any(directory.glob("model.safetensors*")):
        raise ValueError(
            f"{directory}: its weights ({other[0]}) are not safetensors, and nothing else is loaded. {ANEW}"
        )


def check_files(directory: Path) -> None:
    """Raise ValueError that names the file for a model directory that is incomplete or damaged; see `check_formats`, `verify`."""
    from safetensors import SafetensorError, safe_open

    check_formats(directory)
    files = {file.name: file for file in model_files(directory)}
    settings = {name: read_table(file) for name, file in files.items() if file.suffix == ".json"}
    if "transformers_weights" in settings["config.json"]:
        raise ValueError(f"{files['config.json']} names weights of its own (transformers_weights): remove that entry")
    index, shards = "model.safetensors.index.json", ["model.safetensors"]
    if not files.keys() & {index, *shards}:
        raise ValueError(
            f"{directory}: no model.safetensors, nor an index of shards, and nothing else is loaded. {ANEW}"
        )
    if "model.safetensors" not in files:
        weight_map = settings[index].get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{files[index]} has no weight_map from tensors to files: fetch the model again")
        shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard not in files:
            raise ValueError(f"{directory / shard} is missing, and {index} names it: fetch the model again")
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
    where large files are named by their hash. A directory without either is not verified. Once per process and file."""
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
        if not file.is_file() or hash_now(file, file.stat().st_mtime_ns, file.stat().st_size) != sha256:
            wrong = "damaged: its bytes are not those" if file.is_file() else "missing: it is one"
            names = sums if sums.exists() else "its name in the hub cache"
            raise ValueError(f"{file} is {wrong} that {names} names. Delete the model and fetch it again")


@functools.cache
def hash_now(file: Path, changed: int, size: int) -> str:
    """`file_hash` of a file as it is now, computed once."""
    return file_hash(file)
