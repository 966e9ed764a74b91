"""GLOSSARY.md's verbs are those of the functions, and the other way round."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.support.imports import ROOT, find_modules

PREDICATES = {
    "allows",
    "are",
    "belongs",
    "can",
    "has",
    "is",
    "matches",
    "may",
    "needs",
    "should",
    "supports",
    "uses",
}
EVENTS = ("begun", "gone", "read", "sent", "waiting")
"""Participles that don't end in -ed."""
BANNED = {"again", "do", "hear", "land", "look", "tell"}
"""Verbs that say nothing without their object, or nothing at all."""
PROTOCOLS = {"feed", "filter", "main", "makefile", "sendfile", "umount2"}
"""Names that another library calls, or every program has."""


def verbs() -> set[str]:
    """The first column of the table of verbs."""
    section = (ROOT / "GLOSSARY.md").read_text("utf-8").partition("\n## Verbs\n")[2]
    cells = re.findall(r"^\| ([a-z, ]+) \|", section, re.MULTILINE)
    return {verb for cell in cells for verb in cell.split(", ")}


def defined_in(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods; those inside of a function are its own business."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif not isinstance(node, ast.expr):
            yield from defined_in(node)


def functions() -> Iterator[tuple[str, str, str]]:
    """(module, name without underscores around, annotation of the result) of each function that we name ourselves."""
    for module_name, module in find_modules().items():
        foreign = {
            item
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef)
            and any("Operations" in ast.unparse(base) for base in node.bases)
            for item in node.body
        }
        for node in defined_in(module.tree):
            if node in foreign:
                continue
            decorators = " ".join(ast.unparse(item) for item in node.decorator_list)
            if node.name.startswith("__") or re.search(
                r"property|setter|command|group|validator", decorators
            ):
                continue
            returns = "None" if node.returns is None else ast.unparse(node.returns)
            yield module_name, node.name.strip("_").removesuffix("_locked"), returns


def is_event(name: str) -> bool:
    words = name.split("_")
    return any(word.endswith("ed") or word in EVENTS for word in words)


def test_every_verb_is_used() -> None:
    used = {name.split("_")[0] for _, name, _ in functions()}
    assert len(verbs()) > 100
    assert verbs() <= used, f"no function begins with {sorted(verbs() - used)}"


def test_functions_begin_with_these_verbs() -> None:
    found = set()
    for module, name, returns in functions():
        first = name.split("_")[0]
        is_fine = (
            first in verbs()
            or not {first, name}.isdisjoint(PROTOCOLS)
            or (first in PREDICATES and returns == "bool")
        )
        is_fine = is_fine or is_event(name) or (returns not in ("None", "NoReturn") and first not in BANNED)
        if not is_fine:
            found.add(f"{module}: {name}")
    assert not found, "functions that begin with no verb of GLOSSARY.md"
