"""What enters HTML is escaped: token text shows as it is, and is never obeyed."""

import ast
import html.parser
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest

from sae_utils.files import ROOT, read_json
from sae_utils.lab import parameters
from sae_utils.show.plots import AS_IT_IS, highlighted, pareto, show_contexts, show_table

matplotlib.use("agg")
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</code><script>",
    "&lt;b&gt;",
    "\"' onmouseover='x",
    "`|`\n\n| a |",
    "a & b",
]
OURS = {"p", "b", "br", "code", "span", "style", "table", "thead", "tbody", "tr", "th", "td", "div"}
ATTRIBUTES = {"style", "title", "id", "class", "type", "colspan", "rowspan", "border", "scoped"}


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its tags, attributes and text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def check_page(page: str):
    """Nothing but our own tags, and each hostile string shown as it is written."""
    seen = Page(page)
    assert seen.tags <= OURS and seen.attributes <= ATTRIBUTES, seen.tags | seen.attributes
    text = seen.text.replace("\xa0", " ").replace("↵", "\n")
    assert all(
        piece in text or piece.replace("\n", "\\n") in text for piece in HOSTILE
    )  # pandas shows a line's end as \\n


@pytest.mark.parametrize("values", [np.ones(len(HOSTILE)), np.zeros(len(HOSTILE)), -np.ones(len(HOSTILE))])
def test_highlighted_tokens_show_their_text(values):
    check_page(highlighted(HOSTILE, values))


def test_contexts_show_titles_and_tokens():
    page = show_contexts({"".join(HOSTILE[:2]): [(HOSTILE, range(6)), (HOSTILE, [0.0] * 6)], "": [(["x"], [3.0])]}).data
    check_page(page)
    shares = re.findall(r'rgba\(230,120,20,([\d.]+)\)" title="([\d.]+)"', page)
    assert ("1.00", "5.00") in shares and ("0.20", "1.00") in shares, "relative to the title's largest value"
    assert page.count("<b>") == 1 and page.count("<code>") == 3
    assert show_contexts({"nothing": []}).data == f"<p {AS_IT_IS}><b>nothing</b></p>"
    with pytest.raises(ValueError, match="zip"):
        highlighted(["two", "tokens"], [1.0])


@pytest.mark.parametrize("show", [show_table, lambda frame: frame], ids=["show_table", "a bare DataFrame"])
def test_tables_show_their_text(show):
    """In cells, also within lists, and as the names of rows, columns and both."""
    one, several = (
        pd.DataFrame({"token": HOSTILE, "p": 0.5}),
        pd.DataFrame({HOSTILE[0]: [HOSTILE, None], "x": 1}, HOSTILE[:2]),
    )
    named = pd.DataFrame(0.5, HOSTILE, HOSTILE).rename_axis(index=HOSTILE[0], columns=HOSTILE[1])
    levels = pd.DataFrame(0.5, pd.MultiIndex.from_product([HOSTILE, [1]], names=HOSTILE[:2]), ["p"])
    with pd.option_context("display.max_colwidth", None):
        for frame in (one, named, levels):
            check_page(show(frame)._repr_html_())
        assert Page(show(several)._repr_html_()).tags <= OURS


def test_a_table_is_shaded_and_leaves_empty_what_is_missing():
    frame = pd.DataFrame({"<b>": [0.0, 1.0], "x": [0.12345, None]}, index=["a", "b"])
    page = show_table(frame, shaded=["<b>"])._repr_html_()
    assert "background-color: #fff5eb" in page and "background-color: #7f2704" in page
    assert ">0.123</td>" in page and "nan" not in page
    assert frame.columns[0] == "<b>", "the caller's table stays as it is"


def test_pareto_draws_each_sweep_and_its_point_and_leaves_undertrained_ones_hollow():
    curves = {"TopK": np.array([[4, 0.3, 0.5], [16, 0.1, 0.3]]), "new": np.empty((0, 3))}
    points = {"TopK": (8, 0.2, 0.4), "new": (9, 0.25, 0.45)}
    axes = pareto(curves, points, title="a title", hollow={"new"}).axes
    for ax, column in zip(axes, (1, 2), strict=True):
        sweep, point, _, other = ax.lines
        assert sweep.get_xydata().tolist() == curves["TopK"][:, [0, column]].tolist()
        assert point.get_xydata().tolist() == [[8, points["TopK"][column]]] and point.get_fillstyle() == "full"
        assert other.get_xydata().tolist() == [[9, points["new"][column]]] and other.get_fillstyle() == "none"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_make_html_by_these_helpers_alone(path):
    """In cells and in the solutions of exercises. The one Markdown is the table of claims, which holds no text of tokens."""
    folded = ["".join(cell["source"]) for cell in read_json(path)["cells"] if cell["cell_type"] == "markdown"]
    sources = [source for _, source in parameters.code_cells(path)]
    sources += [code for text in folded for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    for source in sources:
        tree = ast.parse(source.replace("\n%", "\n# %"))
        called = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        made = {
            name
            for name in called
            if re.match(r"(.*\.)?(HTML|SVG|Markdown|Javascript|to_html|to_markdown|highlighted)\(", name)
        }
        styled = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"style", "_repr_html_"}
        assert not styled and made <= {"Markdown(said.stdout)"}, (styled, made)
