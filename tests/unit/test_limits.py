"""Limits on what a class or a module holds, and on who assigns its attributes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.imports import Module, find_modules

MODULES = find_modules()
MAX_METHODS = 20
MAX_PARAMETERS = 10
MAX_PUBLIC_CLASSES = 3

ASSIGNED = {
    "fusecache.peers.transport.client -> buffer": "of a threading.local",
    "fusecache.store.object -> buffer": "of a threading.local",
}
"""Attributes that another object may assign after all, and why."""


def classes(module: Module) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef))


def methods(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]


def decorators(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Their last names: `dataclass` for `@dataclasses.dataclass(frozen=True)`."""
    calls = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
    return {ast.unparse(item).rpartition(".")[2] for item in calls}


def bases(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}


def is_exception(node: ast.ClassDef) -> bool:
    return any(name.endswith(("Error", "Exception", "Warning")) for name in {node.name} | bases(node))


def is_data(node: ast.ClassDef) -> bool:
    """A dataclass, a tuple or a table of constants: it holds values and works with nothing."""
    return "dataclass" in decorators(node) or bool(
        bases(node) & {"NamedTuple", "TypedDict", "Enum", "IntEnum", "IntFlag", "StrEnum", "SettingsModel"}
    )


def is_protocol(node: ast.ClassDef) -> bool:
    return "Protocol" in bases(node)


def test_no_class_has_more_methods_than_one_can_remember() -> None:
    found = {}
    for name, module in MODULES.items():
        for node in classes(module):
            defined = {method.name for method in methods(node) if "overload" not in decorators(method)}
            if len(defined) > MAX_METHODS and "Operations" not in bases(node):
                found[f"{name}.{node.name}"] = len(defined)
    assert not found, f"classes with more than {MAX_METHODS} methods"


def test_no_constructor_takes_more_than_one_can_pass_rightly() -> None:
    found = {}
    for name, module in MODULES.items():
        for node in classes(module):
            for method in methods(node):
                if method.name == "__init__":
                    given = method.args
                    count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - 1
                    if count > MAX_PARAMETERS:
                        found[f"{name}.{node.name}"] = count
    assert not found, f"constructors with more than {MAX_PARAMETERS} parameters"


def test_a_module_is_about_one_thing() -> None:
    found = {}
    for name, module in MODULES.items():
        public = [
            node
            for node in module.tree.body
            if isinstance(node, ast.ClassDef)
            and not node.name.startswith("_")
            and not (is_data(node) or is_exception(node))
        ]
        if len(public) > MAX_PUBLIC_CLASSES:
            found[name] = len(public)
    assert not found, f"modules with more than {MAX_PUBLIC_CLASSES} public classes"


def assigned_from_outside(module: Module) -> Iterator[str]:
    """`function: target` of each attribute that a function assigns to an object which it was given.

    Objects that the function made itself (by a call in the same function), its own `self` or `cls`, and what lies
    inside of them by subscript are its own.
    """

    def visit(node: ast.AST, scope: str, own: frozenset[str]) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{scope}{child.name}.", frozenset())
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child, f"{scope}{child.name}.", own | {"self", "cls"} | made_in(child))
            else:
                for target in targets(child):
                    if isinstance(target, ast.Attribute) and root(target) not in own:
                        yield f"{scope.rstrip('.')}: {ast.unparse(target)}"
                yield from visit(child, scope, own)

    yield from visit(module.tree, "", frozenset())


def targets(node: ast.AST) -> list[ast.expr]:
    """The targets of an assignment, tuples taken apart."""
    if isinstance(node, ast.Assign):
        found = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        found = [node.target]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and node.args:
        return [ast.Attribute(node.args[0], "setattr", lineno=node.lineno)]
    else:
        return []
    return [part for target in found for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


def root(target: ast.Attribute) -> str:
    """`self` for `self.x`, but `self.x` for `self.x.y`: what another object holds is not one's own."""
    return ast.unparse(target.value)


def made_in(function: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    """Names that this function binds to the result of a call."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            found |= {ast.unparse(target) for target in targets(node) if isinstance(target, ast.Name)}
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            found.add(ast.unparse(node.optional_vars))
    return frozenset(found)


def attributes(node: ast.ClassDef) -> set[str]:
    """Names that a class gives to its objects: fields, slots, properties, and what its methods assign to self."""
    found = {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
    for method in methods(node):
        if decorators(method) & {"property", "setter"}:
            found.add(method.name)
        for statement in ast.walk(method):
            found |= {
                target.attr
                for target in targets(statement)
                if isinstance(target, ast.Attribute) and root(target) == "self"
            }
    return found


def test_nothing_is_assigned_from_outside() -> None:
    """Values (dataclasses) are changed by the object that holds them, and a module's classes work together; what
    another class keeps is its own, so that it is complete when it is made, and its lock means something."""
    values = {
        name
        for module in MODULES.values()
        for node in classes(module)
        if is_data(node)
        for name in attributes(node)
    }
    own = {
        name: {attr for node in classes(module) if not is_data(node) for attr in attributes(node)}
        for name, module in MODULES.items()
    }
    found = set()
    for name, module in MODULES.items():
        others = {attr for other, attrs in own.items() if other != name for attr in attrs}
        for entry in assigned_from_outside(module):
            attr = entry.rpartition(".")[2]
            if attr == "setattr" or (attr in others and attr not in own[name] | values):
                found.add(f"{name} -> {attr}")
    assert found == set(ASSIGNED), "attributes that another object assigns"


TWINS = {
    r"\.intdigest\(\) or ": "fusecache.checksum",
    r"/proc/self/mountinfo": "fusecache.control.mountinfo",
    r"memfd_create\(": "fusecache.control.memfd",
    r"^class LineReader": "fusecache.control.client",
    r"popitem\(last=False\)": "fusecache.bounded",
    r"^EXIT_UPGRADE = ": "fusecache_mount.lifecycle.keeper_protocol",
    r"^class Opcode": "fusecache_mount.kernel.protocol",
    r"Tgid": "fusecache_mount.kernel.processes",
    r"pidfd_open\(": "fusecache_mount.kernel.syscalls",
}
"""Things that were written twice: what they look like, and the one module that may hold them."""


@pytest.mark.parametrize(("pattern", "home"), TWINS.items())
def test_what_was_written_twice_stands_once(pattern: str, home: str) -> None:
    assert home in MODULES
    found = {
        name
        for name, module in MODULES.items()
        if re.search(pattern, module.file.read_text("utf-8"), re.MULTILINE)
    }
    assert found <= {home}
