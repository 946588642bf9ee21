"""Figures: arrays in, matplotlib figure out. One message each, one fixed colour per method in every notebook."""

import html

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.ticker import NullLocator

_PALETTE = sns.color_palette("colorblind")
COLOURS = {  # colour-blind safe, the same everywhere
    "TopK": _PALETTE[0],
    "Gated": _PALETTE[1],
    "ReLU": _PALETTE[7],
    "e2e": _PALETTE[2],
    "e2e+ds": _PALETTE[8],
    "fine-tuned": _PALETTE[6],
    "g-SAE": _PALETTE[3],
    "Mutual Choice": _PALETTE[4],
    "Feature Choice": _PALETTE[5],
    "JumpReLU": _PALETTE[9],
    "PCA": "0.45",
}


def use_style() -> None:
    """The house style; a notebook calls it once."""
    sns.set_theme(
        style="whitegrid", context="notebook", rc={"figure.figsize": (6.4, 3.8), "figure.dpi": 72, "axes.titlesize": 12}
    )


def lines(x, curves: dict, *, title: str, xlabel: str, ylabel: str, logx=False, logy=False, colours=None, ax=None):
    """Curves over one axis: `curves` maps a label to y values, or to (y, error) with a symmetric error bar."""
    ax = ax or plt.subplots(layout="constrained")[1]
    for label, y in curves.items():
        y, error = y if isinstance(y, tuple) else (y, None)
        colour = (colours or COLOURS).get(label)
        ax.errorbar(x, y, yerr=error, label=label, color=colour, marker="o" if len(x) <= 12 else None, capsize=3)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if logx:
        ax.set_xscale("log", base=2 if len(x) <= 12 else 10)
        if len(x) <= 12:
            ax.set_xticks(x, [f"{v:g}" for v in x], minor=False)
            ax.xaxis.set_minor_locator(NullLocator())
    if logy:
        ax.set_yscale("log")
    if len(curves) > 1:
        ax.legend(frameon=False)
    return ax.figure


def density_histogram(densities: dict, *, title: str, ax=None):
    """How often latents fire: log₁₀ of the share of tokens, one histogram per SAE; latents that never fire are counted apart."""
    ax = ax or plt.subplots(layout="constrained")[1]
    bins = np.linspace(-6, 0, 49)
    for label, density in densities.items():
        density = np.asarray(density)
        fired = density[density > 0]
        name = f"{label} ({len(density) - len(fired)} never fire)"
        ax.hist(np.log10(fired), bins=bins, histtype="step", linewidth=1.8, label=name, color=COLOURS.get(label))
    ax.set(title=title, xlabel="log₁₀ of the share of tokens on which a latent fires", ylabel="latents")
    ax.legend(frameon=False)
    return ax.figure


def highlighted(pieces, values, peak: float | None = None) -> str:
    """Tokens as HTML, each shaded by its value relative to `peak` (default the largest); the value shows on hover."""
    peak = peak or max(max(values), 1e-9)
    spans = []
    for piece, value in zip(pieces, values):
        text = html.escape(piece).replace("\n", "↵").replace(" ", "&nbsp;")
        share = min(max(value / peak, 0), 1)
        style = f' style="background:rgba(230,120,20,{share:.2f})" title="{value:.2f}"' if value > 0 else ""
        spans.append(f"<span{style}>{text}</span>")
    return "".join(spans)
