"""Sparse autoencoders on language models: architectures, losses, streams, training, metrics.

Names are imported when first used, so that `sae_utils.sweep` starts without torch.
"""

import importlib

_HOME = {
    "sae": ["SAE", "SAEOutput", "TopKSAE", "GradientSAE", "ReluSAE", "GatedSAE", "JumpReluSAE", "to_jumprelu"],
    "choice": ["MutualChoiceSAE", "FeatureChoiceSAE"],
    "lm": ["load_language_model", "resolve_device"],
    "data": ["tokens", "held_out"],
    "activations": ["ActivationStore"],
    "training": ["train"],
    "metrics": ["evaluate"],
    "store": ["save_sae", "load_sae"],
    "runs": ["start_run"],
    "execute": ["require"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sae_utils' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return __all__
