"""Docstrings and comments: a sentence has an actor, and says what it has to say itself."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.support.imports import ROOT

FOLDERS = ("fusecache", "mount", "tests", "benchmarks", "scripts")
_HEADLESS = re.compile(r"(?:^|[.:;] )(?:Who|Whoever|What|Whatever)\b(?![^.?!]*\?)")


def files() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def prose(file: Path) -> tuple[str, ...]:
    """Each docstring (of modules, classes, functions and attributes) and each block of comments, on one line."""
    source = file.read_text("utf-8")
    return tuple(docstrings(ast.parse(source))) + tuple(comments(source))


def docstrings(node: ast.AST) -> Iterator[str]:
    """Those of a module, class or function, and of all that is in it."""
    for statement in ast.iter_child_nodes(node):
        if not isinstance(statement, ast.expr):
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield " ".join(value.value.split())
            yield from docstrings(statement)


def comments(source: str) -> Iterator[str]:
    """Each run of comment lines, as one."""
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and block:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("# ").strip())
            last = token.start[0]
    if block:
        yield " ".join(block)


def texts_with(pattern: re.Pattern[str]) -> list[str]:
    """`file: text` of each docstring and comment in which the pattern is found."""
    return [
        f"{file.relative_to(ROOT)}: {text}"
        for file in files()
        for text in prose(file)
        if pattern.search(text)
    ]


def test_no_text_points_elsewhere_instead_of_answering() -> None:
    assert not texts_with(re.compile(r"^See\b|[.:;] See [A-Z]"))


def test_a_sentence_names_its_actor() -> None:
    assert not texts_with(_HEADLESS)


def test_questions_are_no_headless_sentences() -> None:
    assert not _HEADLESS.findall("What does it cost? It costs nothing.")
    assert len(_HEADLESS.findall("Who waits gets it. What is left goes: Whatever comes next.")) == 3
