"""Checkpoints of a training: everything that resuming it bit for bit needs."""

import json
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..code import source_hashes
from ..files import disk_errors, replacing, tensors_hash

CODE = ("training/", "saes/", "sparse/", "activations/")  # the rooms whose code trains


def place_of(checkpoint) -> Path:
    """The path of a checkpoint; raises now what would be raised when it is first written there."""
    if not isinstance(checkpoint, (str, os.PathLike)) or os.path.isdir(path := Path(checkpoint).expanduser()):
        raise ValueError(f"checkpoint={checkpoint!r}: it has to be the path of a file, or None")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path


def save_checkpoint(path, jobs, optimizers, parts: dict, step: int, history: list[dict]) -> None:
    if Path(path).exists():
        refuse_another(path, read_checkpoint(path)[0], parts)  # begun there in the meantime
    tensors = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for name, (sae, _) in jobs.items():
        tensors |= {f"{name}/{key}": value for key, value in sae.state_dict().items()}
        tensors |= {f"{name}/adam/{key}": value for key, value in optimizers[name].state().items()}
    kind, key, *rest = np.random.get_state()
    about = {"parts": parts, "step": step, "history": history}
    about |= {"numpy_rng": [kind, key.tolist(), *rest], "python_rng": random.getstate()}
    used = {name.removeprefix("sae_utils.").replace(".", "/") + ".py" for name in sys.modules}  # or may have been
    about["sources"] = {k: v for k, v in source_hashes().items() if k.startswith(CODE) and k in used}
    about["dead_after"] = {name: sae.dead_after for name, (sae, _) in jobs.items()}
    tensors, text = {key: value.contiguous() for key, value in tensors.items()}, json.dumps(about)
    with replacing(path, len(text) + sum(value.nbytes for value in tensors.values())) as new:
        save_file(tensors, new, {"training": text, "sha256": tensors_hash(tensors, text)})


def read_checkpoint(path, whole: bool = False) -> tuple[dict, dict]:
    """What a checkpoint says, and its tensors where the `whole` of it is asked for."""
    with open(path, "rb"):  # an error of the disk says nothing about the file
        pass
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata["training"])
            tensors = {key: file.get_tensor(key) for key in file.keys()} if whole else {}
        if whole and metadata["sha256"] != tensors_hash(tensors, metadata["training"]):
            raise ValueError("its checksum is wrong")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint of ours ({error}): delete it to train from the start"
        ) from None
    return about, tensors


def refuse_another(path, about: dict, parts: dict) -> None:
    """ValueError that says what differs if a checkpoint is that of another training."""
    there = about.get("parts") or {}  # none: of older sources
    different = [part for part in {**there, **parts} if there.get(part) != parts.get(part)]
    if there and different:
        hint = "; make the SAE anew from the seed of the first start" if "initial weights" in str(different) else ""
        raise ValueError(
            f"{path} is the checkpoint of another training. Different: {', '.join(different[:6])}{hint}. Give this training a "
            f"path of its own, or delete the file"
        )


def load_checkpoint(path, jobs, optimizers, parts: dict) -> tuple[int, list[dict], dict]:
    """Restore SAEs and optimizers in place; return the step, the history and the random states for `set_random`.

    A checkpoint of older `sae_utils` sources is passed over.
    """
    about, tensors = read_checkpoint(path, whole=True)
    refuse_another(path, about, parts)
    now = source_hashes()
    if not about.get("parts") or any(now.get(file) != value for file, value in about["sources"].items()):
        warnings.warn(f"{path} was made by other sae_utils sources: training starts anew")
        return 0, [], {}
    for name, (sae, _) in jobs.items():
        sae.dead_after = about["dead_after"][name]
        sae.load_state_dict({key: tensors[f"{name}/{key}"] for key in sae.state_dict()})
        prefix = f"{name}/adam/"
        optimizers[name].load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return about["step"], about["history"], {key: value for key, value in (about | tensors).items() if "rng" in key}


def set_random(states: dict) -> None:
    """Set the random states that a checkpoint holds: of torch, NumPy and Python."""
    torch.set_rng_state(states["rng"])
    np.random.set_state(states["numpy_rng"])
    version, numbers, gauss = states["python_rng"]
    random.setstate((version, tuple(numbers), gauss))
    if "rng_cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["rng_cuda"])
