"""Save and load SAEs, as a directory that SAELens 6 opens too: cfg.json and sae_weights.safetensors.

The weights are exactly the tensors SAELens expects of the architecture. What it has no place for (our counters and flags) is in
`sae_utils_state.safetensors`, and `metadata.sae_utils` in cfg.json names the class and its arguments, so that `load_sae` gives
the very class back, bit for bit. It also holds a checksum of each file. No pickle is read or written.
"""

import contextlib
import inspect
import json
import os
import time
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import sae_utils

from ..device import resolve_device
from ..files import JOURNAL, UNFINISHED, current, digest, read_json, replacing, settle, tensors_hash
from .base import SAE, check_parameters

WEIGHTS = {  # by SAELens architecture; an SAE of any other architecture is saved with all its parameters, and SAELens refuses it
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
}
FOREIGN = {"topk": "TopKSAE", "standard": "ReluSAE", "jumprelu": "JumpReluSAE", "gated": "GatedSAE"}
CFG, TENSORS, STATE = "cfg.json", "sae_weights.safetensors", "sae_utils_state.safetensors"
SAELENS_VERSION = "6.54.0"  # the format written


def save_sae(sae, path, metadata: dict | None = None) -> Path:
    """Write the SAE to directory `path`, replacing an SAE that is there. Other files in the directory stay.

    A kill at any moment leaves the old or the new SAE for `load_sae`. SAELens, which reads the files one by one, may find them
    mixed until the next `load_sae` or `save_sae` has put the last of them in its place.

    metadata: JSON values about its making; SAELens reads model_name, hook_name, context_size, prepend_bos and dataset_path.

    Raises ValueError if `path` is no name of a directory, or something that is no SAE is there; if a parameter is not finite; if
    `sae.arguments` do not make the SAE again; if metadata are no JSON values. OSError if the disk cannot hold it.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = save_sae(TopKSAE(8, 32), directory, {"model_name": "python-lm"})
    ...     sorted(os.listdir(directory))
    ['cfg.json', 'sae_utils_state.safetensors', 'sae_weights.safetensors']
    """
    if not isinstance(sae, SAE):
        raise ValueError(f"sae is a {type(sae).__name__}: it has to be an SAE, not a module around one")
    check_parameters(sae)
    check_arguments(sae)
    path = Path(path).expanduser()
    if not path.name:
        raise ValueError(f"path={str(path)!r} is no name of a directory for an SAE")
    is_sae = all((path / JOURNAL / name).exists() or (path / name).exists() for name in (CFG, TENSORS))
    empty = path.is_dir() and all(p.name.endswith((UNFINISHED, JOURNAL)) for p in path.iterdir())
    if path.exists() and not is_sae and not empty:
        raise ValueError(f"{path} exists and is no SAE directory: it is not overwritten")
    if not isinstance(metadata or {}, dict):
        raise ValueError(f"metadata={metadata!r:.100}: it has to be a dictionary of JSON values")
    metadata = metadata or {}
    names = WEIGHTS.get(sae.architecture) or [name for name, _ in sae.named_parameters()]
    state = {key: value.detach().cpu().contiguous() for key, value in sae.state_dict().items()}
    cfg = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        # [..., head, d_head] there, flat here
        "reshape_activations": "hook_z" if str(metadata.get("hook_name", "")).endswith("hook_z") else "none",
    }
    if sae.architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    files = {TENSORS: {key: state[key] for key in names}, STATE: {k: v for k, v in state.items() if k not in names}}
    ours = {"class": type(sae).__name__, "arguments": sae.arguments, "dead_after": sae.dead_after}
    ours |= {"frozen": sae.frozen} if sae.frozen else {}
    if not type(sae).__module__.startswith("sae_utils."):
        ours["module"] = type(sae).__module__
    cfg["metadata"] = {"sae_lens_version": SAELENS_VERSION, "prepend_bos": False, **metadata, "sae_utils": ours}
    ours["sha256"] = {CFG: cfg_hash(cfg)} | {name: tensors_hash(tensors) for name, tensors in files.items()}
    try:
        text = json.dumps(cfg, indent=1, sort_keys=True) + "\n"
    except TypeError as error:
        raise TypeError(f"metadata={metadata!r:.100}: it has to be a dictionary of JSON values, and {error}") from None
    with replacing(path, len(text) + sum(value.nbytes for value in state.values())) as new:
        new.mkdir()
        for name, tensors in files.items():
            save_file(tensors, new / name)
        (new / CFG).write_text(text)
    return path


def load_sae(path, device: str = "cpu"):
    """The SAE saved in directory `path`, in eval mode; what SAELens itself wrote is read as the class here with equal outputs.

    Of two SAEs that other processes save there meanwhile, it is one or the other, whole. SAELens writes no checksums, so a
    changed value in a directory of its own is not noticed.

    Raises FileNotFoundError if there is no SAE; ValueError (with the path) if a file is truncated, foreign, damaged or does
    not fit, if the SAE has an option that no class here can express, or if there is no such device.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     load_sae(save_sae(TopKSAE(8, 32, k=2), directory))
    TopKSAE(d_in=8, d_sae=32, k=2)
    """
    path, device, seen = Path(path).expanduser(), resolve_device(device), None
    with contextlib.suppress(OSError):
        settle(path)
    while True:
        try:
            return read_sae(path).to(device).eval()
        except (ValueError, OSError):  # if another process saves there at this moment, the files did not fit together
            if not path.is_dir() or seen == (seen := os.stat(path).st_mtime_ns):
                raise
            time.sleep(0.02)


def read_sae(path: Path):
    """The SAE in a directory; the errors of `load_sae`, also where files are exchanged while they are read."""
    if not (cfg_file := current(path, CFG)).exists() or not (weights := current(path, TENSORS)).exists():
        raise FileNotFoundError(f"{path} holds no SAE: {CFG} and {TENSORS} are looked for there")
    cfg = read_json(cfg_file)
    try:
        tensors = {TENSORS: load_tensors(weights)}
        metadata = cfg.get("metadata", {})
        by_saelens = "sae_lens_training_version" in metadata  # a key that SAELens adds
        if (extra := current(path, STATE)).exists():
            tensors[STATE] = load_tensors(extra)
        ours = None if by_saelens else metadata.get("sae_utils")
        if ours:
            if STATE not in tensors:
                raise ValueError(f"{STATE} is missing")
            if "sha256" in ours:
                check_hashes(path, cfg, tensors)
            sae = class_named(ours["class"], ours.get("module"))(**ours["arguments"])
            sae.dead_after = ours.get("dead_after", sae.dead_after)
            for part, cosine in ours.get("frozen", {}).items():
                sae_utils.frozen(sae, part, cosine)
            state = tensors[TENSORS] | tensors[STATE]
            for key, value in sae.state_dict(keep_vars=True).items():
                value.data = value.data.to(state[key].dtype)
        elif STATE in tensors and not by_saelens:
            raise ValueError(f"{CFG} names no class, so it is damaged; if SAELens wrote it, delete {STATE} beside it")
        else:
            sae, state = foreign(cfg), tensors[TENSORS]
            if set(state) != set(names := WEIGHTS[cfg["architecture"]]):
                raise ValueError(f"it holds the tensors {', '.join(sorted(state))}, not {', '.join(names)}")
            state = dict(sae.state_dict(), **fold(cfg, state), initialised=torch.tensor(True))
            sae.to(getattr(torch, cfg["dtype"].removeprefix("torch.")))
        sae.load_state_dict(state)
    except KeyError as error:
        raise ValueError(
            f"{path} is not a whole SAE directory: {error} is missing. If an earlier version saved it, train it anew"
        ) from None
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole SAE directory: {error}") from None
    if ours and "sha256" not in ours:
        warnings.warn(f"{path} was saved without checksums, by an earlier version: save the SAE anew to have them")
    return sae


def load_tensors(file: Path) -> dict:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated, damaged or no file of safetensors ({error})") from None


def check_hashes(path: Path, cfg: dict, tensors: dict) -> None:
    """ValueError naming the file that differs from the one saved."""
    saved = cfg["metadata"]["sae_utils"]["sha256"]
    found = {CFG: cfg_hash(cfg)} | {name: tensors_hash(values) for name, values in tensors.items()}
    if wrong := [name for name in found if saved.get(name) != found[name]]:
        raise ValueError(f"{path / wrong[0]} was damaged or edited, as its checksum is wrong: save the SAE anew")


def cfg_hash(cfg: dict) -> str:
    """Hash of what determines an SAE in cfg.json: all but the metadata that a user may edit, and the checksums."""
    ours = {key: value for key, value in cfg["metadata"]["sae_utils"].items() if key != "sha256"}
    return digest([cfg | {"metadata": None}, ours], 64)


def check_arguments(sae) -> None:
    """ValueError if the class could not be made again from `sae.arguments`, or would be another SAE."""
    signature, arguments = inspect.signature(type(sae)), sae.arguments
    named = [name for name, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    wrong = [f"{name!r} is missing" for name in named if name not in arguments]
    try:
        signature.bind(**arguments)
    except TypeError as error:
        wrong.append(str(error))
    for name, value in arguments.items():
        with contextlib.suppress(TypeError, ValueError):
            if json.loads(json.dumps(value)) == value:
                continue
        wrong.append(f"{name}={value!r:.100} does not come back from JSON as it is")
    if wrong:
        about = "has to hold what the class is called with, so that load_sae can make it again"
        raise ValueError(f"{type(sae).__name__}.arguments {about}: {wrong[0]}")


def class_named(name: str, module: str | None) -> type:
    """The SAE class of this name: ours without a module, else that of the module, else the one defined last anywhere."""
    if module is None and name in sae_utils.__all__:
        return getattr(sae_utils, name)
    classes = [SAE]
    for cls in classes:
        classes += cls.__subclasses__()
    found = [cls for cls in classes if cls.__name__ == name]
    if not found:
        raise ValueError(f"it was saved by the class {name}: import the module that defines it first")
    return ([cls for cls in found if cls.__module__ == module] or found)[-1]


def foreign(cfg: dict):
    """An SAE of ours for a configuration that SAELens wrote; ValueError if there is none with its outputs."""
    if cfg["architecture"] not in FOREIGN:
        raise ValueError(f"architecture={cfg['architecture']!r}: {', '.join(FOREIGN)} can be loaded")
    if (scaling := cfg.get("normalize_activations", "none")) != "none":
        fixed = scaling in ("expected_average_only_in", "covariance_whitening")
        way = (
            "fold it into the weights in SAELens, then save" if fixed else "x is rescaled by token, as no SAE here does"
        )
        raise ValueError(f"normalize_activations={scaling!r}: {way}; only 'none' can be loaded")
    for key in ("activation_fn", "activation_fn_str"):  # of SAELens before 6
        if cfg.get(key, "relu") != "relu":
            raise ValueError(
                f"{key}={cfg[key]!r}, an option of SAELens before 6: open it with SAELens 6 and save it anew"
            )
    k = [cfg.get("k", 100)] if cfg["architecture"] == "topk" else []
    return getattr(sae_utils, FOREIGN[cfg["architecture"]])(cfg["d_in"], cfg["d_sae"], *k)


def fold(cfg: dict, state: dict) -> dict:
    """SAELens' weights, as exact weights of an SAE that centres its input by b_dec and takes its latents as they are."""
    if not cfg.get("apply_b_dec_to_input", True):  # relu(x W + b) = relu((x − b_dec) W + (b + b_dec W))
        shift = state["b_dec"] @ state["W_enc"]
        scales = {"b_enc": 1, "b_gate": 1, "b_mag": state["r_mag"].exp() if "r_mag" in state else 1}
        state |= {key: state[key] + scale * shift for key, scale in scales.items() if key in state}
    if cfg["architecture"] == "topk" and cfg.get("rescale_acts_by_decoder_norm", False):
        norm = state["W_dec"].norm(dim=1)  # latents are chosen by size × norm of their decoder row
        state |= {key: state[key] * norm for key in ("W_enc", "b_enc")} | {"W_dec": state["W_dec"] / norm[:, None]}
    if "threshold" in state:  # SAELens takes relu first, so a threshold below 0 does what 0 does
        state["threshold"] = state["threshold"].clamp_min(0)
    return state
