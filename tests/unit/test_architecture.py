"""The arrows between the rooms of ARCHITECTURE.md's table, by the imports in the source."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys

import pytest

from tests.support.imports import (
    PACKAGES,
    ROOT,
    circles,
    closure,
    find_modules,
    import_graph,
)

MODULES = find_modules()
GRAPH = import_graph(MODULES)
_ROW = re.compile(r"^\| (`[^|]+) \| [^|]* \|([^|]*)\|$", re.MULTILINE)

PURE = (
    "fusecache.types",
    "fusecache.errors",
    "fusecache.blocks",
    "fusecache.bounded",
    "fusecache.checksum",
    "fusecache.events",
    "fusecache.locking",
    "fusecache.semaphore",
    "fusecache.config",
    "fusecache.store.disk.format",
    "fusecache.store.eviction",
    "fusecache.throughput",
    "fusecache.store.tier_placement",
    "fusecache.prefetch.models.companions",
    "fusecache.prefetch.models.shard_order",
    "fusecache.prefetch.models.tensor_formats",
    "fusecache.prefetch.profiles.access_profile",
    "fusecache.prefetch.profiles.recorder",
    "fusecache.attest.manifests",
    "fusecache.attest.signing",
    "fusecache.attest.sums",
    "fusecache.peers.member",
    "fusecache.peers.exchange.policy",
    "fusecache.peers.membership.placement",
    "fusecache.peers.membership.table",
    "fusecache.peers.outgoing",
    "fusecache.peers.transport.wire",
    "fusecache.telemetry.trace_summary",
    "fusecache_mount.kernel",
    "fusecache_mount.tracing.requests",
)
"""Modules, and packages with all that is in them, that neither they nor anything they import does I/O by a library:
one can read and test them without an event loop, an object store or a kernel."""
PURE_LIBRARIES = {"cryptography", "pydantic", "pydantic_core", "typing_extensions", "xxhash"}
"""Libraries that pure modules may import: they compute, and do no I/O."""
IMPURE_STANDARD = {"asyncio", "http", "selectors", "socket", "socketserver", "ssl", "subprocess"}
STORAGE_LIBRARIES = {"aiobotocore", "botocore", "fsspec", "gcsfs", "obstore", "s3fs"}


def top(name: str) -> str:
    """The package of a module: what an import of it needs to have installed."""
    return name.partition(".")[0]


@functools.cache
def table() -> tuple[tuple[frozenset[str], frozenset[str]], ...]:
    """(names in the room, names of rooms that it may import) of each row, as import names."""
    section = (ROOT / "ARCHITECTURE.md").read_text("utf-8").partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rows = [(_ROW.findall(line)) for line in section.splitlines()]
    found = [(names_in(row[0][0]), row[0][1]) for row in rows if row]
    ground = found[0][0]
    return tuple(
        (names, names_in(arrows) | (ground if re.search(r"\bground\b", arrows) else set()))
        for names, arrows in found
    )


def names_in(cell: str) -> frozenset[str]:
    """The import names in a cell of the table."""
    return frozenset(
        f"fusecache_mount.{name.removeprefix('mount.')}" if name.startswith("mount.") else f"fusecache.{name}"
        for name in re.findall(r"`([\w.]+)`", cell)
    )


def row_of(module: str) -> int | None:
    """The row with the longest name that a module has or lies in."""
    best = max(
        (
            (len(name), row)
            for row, (names, _) in enumerate(table())
            for name in names
            if lies_in(module, name)
        ),
        default=None,
    )
    return None if best is None else best[1]


def lies_in(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def room(row: int) -> str:
    return " / ".join(sorted(table()[row][0]))


def test_every_module_stands_in_a_room() -> None:
    assert len(table()) > 20
    homeless = [name for name, module in MODULES.items() if not module.is_package and row_of(name) is None]
    assert not homeless, f"ARCHITECTURE.md's table of rooms has no row for {homeless}"


def test_every_room_of_the_table_exists() -> None:
    names = [name for names, _ in table() for name in names]
    assert len(names) == len(set(names)), "a module in two rooms"
    missing = {name for _, arrows in table() for name in arrows} - set(names)
    assert not missing, f"arrows to what is no room: {missing}"
    homes = {row_of(module) for module in MODULES}
    empty = [room(row) for row in range(len(table())) if row not in homes]
    assert not empty, f"rooms without modules: {empty}"


def test_the_table_has_no_circle() -> None:
    arrows = {
        room(row): {room(to) for name in allowed if (to := row_of(name)) is not None and to != row}
        for row, (_, allowed) in enumerate(table())
    }
    assert circles(arrows) == []


def test_arrows_point_one_way() -> None:
    found = set()
    for name, imports in GRAPH.items():
        row = row_of(name)
        if row is None or MODULES[name].is_package:
            continue
        allowed = {to for room in table()[row][1] if (to := row_of(room)) is not None} | {row}
        for other in imports:
            to = row_of(other)
            if top(other) in PACKAGES and other not in PACKAGES and to not in allowed:
                found.add(f"{name} -> {other}")
    assert not found, "imports that ARCHITECTURE.md's table of rooms does not allow"


def test_no_module_is_in_a_circle_of_imports() -> None:
    found = {" <-> ".join(group) for group in circles(GRAPH)}
    assert not found, "modules that import each other"


@pytest.mark.parametrize("name", [name for name, module in MODULES.items() if module.is_package])
def test_packages_re_export_nothing(name: str) -> None:
    kinds = {type(node) for node in MODULES[name].tree.body}
    assert kinds <= {ast.Expr, ast.Assign}, f"{name}/__init__.py holds more than a docstring and constants"


def test_rooms_do_not_reach_what_they_must_not_know() -> None:
    found = set()
    for inner, outer in (
        ("fusecache", "fusecache_mount"),
        ("fusecache.fetch", "fusecache.prefetch"),
        ("fusecache.fetch", "fusecache.peers"),
        ("fusecache.peers.transport", "fusecache.fetch"),
        ("fusecache.peers.transport", "fusecache.peers.exchange"),
        ("fusecache.store", "fusecache.origin"),
    ):
        inside = [name for name in MODULES if lies_in(name, inner)]
        assert inside
        if any(lies_in(name, outer) for name in closure(inside, GRAPH)):
            found.add(f"{inner} -> {outer}")
    assert not found, "rooms that reach, over others, what they must not know"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_reach_no_library_that_does_io(name: str) -> None:
    inside = [module for module in MODULES if lies_in(module, name)]
    assert inside, f"{name} is no module"
    reached = {top(other) for other in closure(inside, GRAPH)} - PACKAGES.keys()
    foreign = {other for other in reached if other not in sys.stdlib_module_names} - PURE_LIBRARIES
    found = {f"{name} -> {other}" for other in foreign | (reached & IMPURE_STANDARD)}
    assert not found


def test_object_storage_libraries_stay_in_origin() -> None:
    found = {
        f"{name} -> {other}"
        for name, imports in GRAPH.items()
        for other in imports
        if top(other) in STORAGE_LIBRARIES and not lies_in(name, "fusecache.origin")
    }
    assert not found, "object-storage libraries outside of origin"


def test_the_keeper_loads_the_standard_library_only() -> None:
    look = (
        "import sys; before = set(sys.modules); import fusecache_mount.lifecycle.keeper; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "fusecache_mount.lifecycle.keeper" in loaded
    foreign = {name for name in loaded if top(name) not in sys.stdlib_module_names | PACKAGES.keys()}
    assert not foreign


def test_every_package_is_installed() -> None:
    configured = (ROOT / "setup.cfg").read_text().split("packages =")[1].split("package_dir")[0].split()
    assert set(configured) == {name for name, module in MODULES.items() if module.is_package}
