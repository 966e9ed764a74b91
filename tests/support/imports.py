"""The modules of the project and what each imports, read from the source: no module is imported for it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"fusecache": ROOT / "fusecache", "fusecache_mount": ROOT / "mount" / "fusecache_mount"}
"""Import name of each package of the project, and its folder."""


@dataclass(frozen=True)
class Module:
    """One file of the project."""

    name: str
    """Dotted, without `__init__`."""
    file: Path
    is_package: bool

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.file.read_text("utf-8"), str(self.file))

    @property
    def path(self) -> str:
        """The file, relative to the root of the project."""
        return str(self.file.relative_to(ROOT))


def find_modules(packages: Mapping[str, Path] = PACKAGES) -> dict[str, Module]:
    """Every module of these packages by its name, in the order of the names."""
    found = {}
    for package, folder in packages.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join((package, *(parts[:-1] if is_package else parts)))
            found[name] = Module(name, file, is_package)
    return dict(sorted(found.items()))


def imported_names(module: Module, known: Set[str]) -> Iterator[str]:
    """Absolute names of the modules that a module imports, wherever in it: in functions and for type checking, too.

    `from package import name` counts as an import of `package.name` where that is among the `known` modules. Raises
    ValueError for a relative import.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{module.path}:{node.lineno}: relative import")
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def import_graph(modules: Mapping[str, Module]) -> dict[str, frozenset[str]]:
    """Module -> names that it imports, its own excepted; those outside of the project included."""
    known = modules.keys()
    return {name: frozenset(imported_names(module, known)) - {name} for name, module in modules.items()}


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other (Tarjan's strongly connected components of two and more), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in graph:
                continue
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def closure(start: Iterable[str], graph: Mapping[str, Iterable[str]]) -> set[str]:
    """All that an import of these modules imports, directly or not, packages that hold them included."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting += graph.get(name, ())
        parent = name.rpartition(".")[0]
        if parent:
            waiting.append(parent)
    return found
