"""Code hashed by its meaning."""

import pytest

from sae_utils.files import code_hash, meaning

FUNCTION = '''
def f(x, n=2):
    """What it does."""
    # why
    return x * n
'''


@pytest.mark.parametrize(
    "same",
    [
        FUNCTION.replace("What it does.", "Other words.\n\n    And more of them."),
        FUNCTION.replace('    """What it does."""\n', ""),
        FUNCTION.replace("# why", "# because"),
        '"""A module\'s docstring."""\n' + FUNCTION,
        FUNCTION.replace("x * n", "(x *\n            n)  # over two lines"),
    ],
)
def test_docstrings_comments_and_layout_have_no_meaning(same):
    assert same != FUNCTION and code_hash(same) == code_hash(FUNCTION)


@pytest.mark.parametrize("change", [("x * n", "x + n"), ("n=2", "n=3"), ("def f", "def g"), ("return", "print")])
def test_what_code_does_has_meaning(change):
    assert code_hash(FUNCTION.replace(*change)) != code_hash(FUNCTION)


def test_a_string_that_is_no_docstring_has_meaning():
    assert code_hash("def f():\n    return 'a'") != code_hash("def f():\n    return 'b'")
    assert meaning("def f():\n    'only a docstring'") == meaning("def f():\n    pass")


@pytest.mark.parametrize(
    "one, other", [("%time f(1)", "%time f(2)"), ("!ls a", "!ls b"), ("%%bash\nls", "%%bash\npwd")]
)
def test_magics_are_transformed_before_they_are_compared(one, other):
    assert code_hash(one) != code_hash(other) and "get_ipython()" in meaning(one)
    assert code_hash(f"{one}\n") == code_hash(one)
    assert code_hash("%time f(1)\nx = 1  # one") == code_hash("%time f(1)\n\nx = 1")


def test_cells_may_await_and_broken_code_counts_as_it_is_written():
    assert code_hash("await f()  # now") == code_hash("await f()")
    assert code_hash("x = (") != code_hash("x = ((") and meaning("x = (") == "x = ("


def test_cells_are_told_apart():
    assert code_hash("a = 1", "b = 2") != code_hash("a = 1\nb = 2") != code_hash("b = 2", "a = 1")
