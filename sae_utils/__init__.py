"""Sparse autoencoders on language models: architectures, losses, streams, training, metrics.

Names are imported when first used, so that `sae_utils.sweep` starts without torch.
"""

import importlib

_HOME = {
    "saes.base": ["SAE", "SAEOutput"],
    "saes.topk": ["TopKSAE"],
    "saes.gradient": ["GradientSAE"],
    "saes.relu": ["ReluSAE"],
    "saes.gated": ["GatedSAE"],
    "saes.jumprelu": ["JumpReluSAE", "to_jumprelu"],
    "saes.choice": ["MutualChoiceSAE", "FeatureChoiceSAE"],
    "saes.baselines": ["frozen", "random_like"],
    "saes.files": ["save_sae", "load_sae"],
    "activations.model": ["load_language_model"],
    "device": ["resolve_device"],
    "activations.text": ["tokens", "held_out"],
    "activations.store": ["ActivationStore"],
    "training.loop": ["train"],
    "analysis.metrics": ["evaluate"],
    "lab.runs": ["start_run"],
    "lab.execute": ["require"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sae_utils' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return __all__
