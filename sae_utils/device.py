"""What is computed with: the device that a name means, what its hardware is good at, versions."""

import functools
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def resolve_device(device: str = "auto") -> str:
    """`"auto"` is CUDA, then MPS, then CPU; a device that is not there is a ValueError.

    >>> resolve_device("cpu")
    'cpu'
    """
    n_gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        wanted = torch.device("meta")  # which is never allowed
    if not {"cpu": True, "mps": mps, "cuda": (wanted.index or 0) < n_gpus}.get(wanted.type):
        allowed = "'auto', 'cpu'" + ", 'cuda'" * bool(n_gpus) + ", 'mps'" * mps
        sees = f"this torch sees {n_gpus or 'no'} CUDA GPU{'s' * (n_gpus > 1)} and {'an' if mps else 'no'} Apple GPU"
        raise ValueError(f"device={device!r}: {sees}. Allowed here: {allowed}.")
    return str(wanted)


@functools.cache
def bf16_is_fast(device_type: str) -> bool:
    """Whether the hardware multiplies bfloat16 matrices well faster than fp32 ones."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    asked = [getattr(torch.cpu, f"_is_{what}_supported", None) for what in ("amx_tile", "avx512_bf16")]
    if device_type != "cpu" or all(asked):
        return device_type == "cpu" and any(ask() for ask in asked)
    about = Path("/proc/cpuinfo")  # where this torch cannot be asked
    return about.exists() and any(f" {what}" in about.read_text() for what in ("amx_bf16", "avx512_bf16"))


def versions() -> dict[str, str]:
    """Versions a reader needs to compare numbers."""
    return {"python": sys.version.split()[0]} | {p: version(p) for p in ("torch", "transformer-lens", "transformers")}
