"""Figures: arrays in, matplotlib figure out. One message each, one fixed colour per method in every notebook."""

import html
import numbers

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
AS_IT_IS = 'class="tex2jax_ignore mathjax_ignore"'  # else a browser takes what stands between two $ for a formula


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


def pareto(curves: dict, points: dict, *, title: str, hollow=()):
    """CE lost and FVU against L0, both axes logarithmic: lower is better, and equal steps are equal ratios.

    curves {method: [n, 3]} are sweeps and points {method: [3]} single SAEs, of (L0, 1 − CE recovered, FVU). Methods in `hollow`,
    for which more training would still have helped, have hollow points.
    """
    figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.8), layout="constrained")
    for ax, column, ylabel in zip(axes, (1, 2), ("1 − CE recovered", "FVU")):
        for method, curve in curves.items():
            colour, style = COLOURS.get(method, "0.5"), "none" if method in hollow else "full"
            ax.plot(curve[:, 0], curve[:, column], color=colour, linewidth=1)
            place = points[method][0], points[method][column]
            ax.plot(*place, "o", color=colour, label=method, markersize=7, fillstyle=style)
        ax.set(xscale="log", yscale="log", xlabel="L0 (hollow: undertrained)", ylabel=ylabel, xlim=(1.5, 64))
        ax.set_xticks(ticks := [2, 4, 8, 16, 32], ticks)
        ax.set_yticks(ticks := [0.05, 0.1, 0.2, 0.5, 1], ticks)
        ax.minorticks_off()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def highlighted(pieces, values, peak: float | None = None) -> str:
    """Tokens as HTML, each shaded by its value relative to `peak` (default the largest); the value shows on hover."""
    peak = peak or max([*values, 1e-9])
    spans = []
    for piece, value in zip(pieces, values, strict=True):
        text = escaped(piece).replace("\n", "↵").replace(" ", "&nbsp;")
        share = min(max(value / peak, 0), 1)
        style = f' style="background:rgba(230,120,20,{share:.2f})" title="{value:.2f}"' if value > 0 else ""
        spans.append(f"<span{style}>{text}</span>")
    return "".join(spans)


def show_contexts(blocks: dict):
    """Tokens in their contexts, for display: under each title a line per context, shaded relative to the title's largest value.

    blocks: {title: [(pieces, values), ...]}, the tokens' texts and a number for each. A notebook shows token text by this or by
    `show_table`, which escape it: a token may well be `<img>`.
    """
    from IPython.display import HTML

    page = ""
    for title, lines in blocks.items():
        peak = max((value for _, values in lines for value in values), default=0.0)
        shown = [f"<b>{escaped(title)}</b>"] if title else []
        shown += [f"<code>{highlighted(pieces, values, peak)}</code>" for pieces, values in lines]
        page += f"<p {AS_IT_IS}>{'<br>'.join(shown)}</p>"
    return HTML(page)


def show_table(frame, shaded=(), precision: int = 3):
    """A DataFrame for display with its text escaped, names of rows and columns included; missing values stay empty.

    shaded: columns of numbers from 0 to 1 to shade. precision: decimals.
    """
    frame = frame.map(escaped).rename(index=escaped, columns=escaped).rename_axis(index=escaped, columns=escaped)
    style = frame.style.format(precision=precision, na_rep="").set_table_attributes(AS_IT_IS)
    return style.background_gradient("Oranges", subset=[escaped(name) for name in shaded], vmin=0, vmax=1)


def escaped(value):
    """Text, and what is shown as text, with nothing in it that HTML would take for markup; numbers and None as they are."""
    return value if value is None or isinstance(value, (numbers.Number, np.generic)) else html.escape(str(value))
