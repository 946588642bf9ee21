"""Python code, hashed by what it does: docstrings, comments and layout play no part."""

import ast
import functools

from .files import PACKAGE, digest


def code_hash(*sources: str, length: int = 16) -> str:
    """Hash of what Python code does: of its syntax trees without docstrings, comments and layout.

    Notebook magics and shell commands (`%time f()`, `!ls`) become the calls that IPython makes of them. Code that is not
    valid Python either way, or too deeply nested for it, counts as it is written.
    """
    return digest([meaning(source) for source in sources], length)


@functools.cache
def meaning(source: str) -> str:
    """Python code written anew from its syntax tree without docstrings: equal for two sources that do the same by the same steps."""
    try:
        tree = parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
        return ast.unparse(tree)
    except (SyntaxError, RecursionError):
        return source


def parse(source: str) -> ast.Module:
    """The syntax tree of a module or of a notebook's cell, which may hold magics, and `await` outside of a function."""
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        return compile(source, "cell", "exec", flags, dont_inherit=True)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager  # only where there are magics: it takes a while

        return compile(TransformerManager().transform_cell(source), "cell", "exec", flags, dont_inherit=True)


@functools.cache
def source_hashes() -> dict[str, str]:
    """`code_hash` of each `sae_utils` source file, as it is on disk when first asked for."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): code_hash(file.read_text(encoding="utf-8")) for file in files}
