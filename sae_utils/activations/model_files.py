"""The files of a language model: which of them determine its results, and whether they are whole.

Imports no torch, so that a run's identity needs no model.
"""

import functools
import re
from pathlib import Path

from ..files import ASSETS, BUILTIN_MODEL, digest, file_hash, replacing
from ..values import near

MODEL_FILES = ["config.json", "*.safetensors", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
MODEL_FILES += ["*.safetensors.index.json", "added_tokens.json", "vocab.*", "*.model", "*.tiktoken"]
OTHER_WEIGHTS = ["pytorch_model*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf"]


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

    Raises FileNotFoundError for a path that is not there, for a name that no hub model can have, and for a bare word close to
    the built-in name or a directory here.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise ValueError(f"model={model!r}: it has to be {BUILTIN_MODEL!r}, a directory, or a hub name")
    try:
        path = ASSETS / BUILTIN_MODEL if model == BUILTIN_MODEL else Path(model).expanduser()
        there = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission, no home
        raise no_model(f"{model}"[:80], str(getattr(error, "strerror", error))) from None
    if model == BUILTIN_MODEL or path.is_dir():
        if not (path / "config.json").is_file():
            raise no_model(model, f"no config.json in {path}; it has to be a Hugging Face directory")
        return path.resolve()
    if there:
        raise no_model(model, "it is a file, not a directory")
    beside = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    bare = str(model) == path.name
    guess = near(path.name, beside + [BUILTIN_MODEL] * bare, 0.8)
    if path.is_absolute() or str(model).startswith(".") or len(path.parts) > 2 or guess and not bare:
        raise no_model(model, f"no such directory{guess}")
    if guess and "@" not in path.name:
        raise no_model(model, f"no such directory{guess}; if you mean a model of the hub, name its organisation too")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(str(model).partition("@")[0])
    except HFValidationError:
        raise no_model(model, f"no such directory{guess}, and no hub model can have this name") from None
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
    if any(directory.glob("model.safetensors*")):  # one file, or an index
        return
    other = [file for pattern in OTHER_WEIGHTS for file in sorted(directory.glob(pattern))]
    if other:
        torchs = other[0].name.startswith("pytorch_model")
        again = conversion(directory) if torchs else "Save it anew with the code that wrote it (save_pretrained)"
        found = f"its weights ({other[0].name}) are not safetensors, and nothing else is loaded"
        raise ValueError(f"{directory}: {found}. {again}")


def conversion(model) -> str:
    """The command that writes a model anew as safetensors."""
    new = Path(str(model).partition("@")[0]).name + "-safetensors"
    return (
        'If you trust the file, convert it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"old, new = {str(model)!r}, {new!r}; M.from_pretrained(old).save_pretrained(new); "
        f'T.from_pretrained(old).save_pretrained(new)" and use {new!r}'
    )


def write_sums(directory) -> None:
    """Write SHA256SUMS, as `sha256sum` does, for a model directory's files: they are verified whenever the model is loaded."""
    directory = Path(directory)
    lines = [f"{file_hash(file)}  {file.name}\n" for file in model_files(directory)]
    with replacing(directory / "SHA256SUMS") as new:
        new.write_text("".join(lines))


def verify(directory: Path) -> None:
    """Raise ValueError for a damaged model file: one with another hash than SHA256SUMS of its directory has, or the hub's cache,
    where large files are named by their hash. A directory without either is not verified. Once per process and file."""
    sums = directory / "SHA256SUMS"
    if sums.exists():
        text = sums.read_text(errors="replace")
        lines = [re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line) for line in text.splitlines()]
        if not all(lines):
            raise ValueError(f"{sums} has a line that sha256sum does not write: write it anew, or delete it")
        wanted = {line[2]: line[1] for line in lines if line[2] != sums.name}
        if unknown := [f.name for f in model_files(directory) if f.suffix == ".safetensors" and f.name not in wanted]:
            raise ValueError(f"{sums} has no line for {unknown[0]}: write it anew with sha256sum, or delete it")
    else:
        blobs = {file.name: file.resolve().name for file in model_files(directory) if file.is_symlink()}
        wanted = {name: blob for name, blob in blobs.items() if re.fullmatch("[0-9a-f]{64}", blob)}
    for name, sha in wanted.items():
        file = directory / name
        if not file.exists() or hash_now(file, file.stat().st_mtime_ns, file.stat().st_size) != sha:
            wrong = "damaged: its bytes are not those" if file.exists() else "missing: it is one"
            names = sums if sums.exists() else "its name in the hub cache"
            raise ValueError(f"{file} is {wrong} that {names} names. Delete the model and fetch it again")


@functools.cache
def hash_now(file: Path, changed: int, size: int) -> str:
    """`file_hash` of a file as it is now, computed once."""
    return file_hash(file)
