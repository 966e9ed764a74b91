"""The arrows between the rooms, by the imports in the source (of functions and type checking, too)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GROUND = {"types", "errors", "blocks", "bounded", "semaphore", "events", "locking", "config", ""}
ALLOWED: dict[str, set[str]] = {
    "types": {""},
    "errors": {""},
    "blocks": {""},
    "bounded": {""},
    "semaphore": {"errors", ""},
    "events": {"types", ""},
    "locking": {""},
    "config": {"errors", ""},
    "control": GROUND,
    "telemetry": GROUND,
    "store": GROUND,
    "origin": GROUND,
    "catalog": GROUND,
    "fetch": GROUND | {"store", "origin", "catalog", "prefetch"},
    "prefetch": GROUND | {"store", "origin", "catalog", "fetch"},
    "attest": GROUND | {"store", "fetch"},
    "peers": GROUND | {"store", "origin", "fetch", "prefetch"},
    "cli": GROUND
    | {"control", "telemetry", "store", "origin", "catalog", "fetch", "prefetch", "attest", "peers"},
    "mount": GROUND
    | {"control", "telemetry", "store", "origin", "catalog", "fetch", "prefetch", "attest", "peers"},
}
"""Room -> rooms that it may import, besides itself. '' is the package itself, which holds the version only."""

PURE = (
    "fusecache/types.py",
    "fusecache/errors.py",
    "fusecache/blocks.py",
    "fusecache/bounded.py",
    "fusecache/semaphore.py",
    "fusecache/events.py",
    "fusecache/config",
    "fusecache/store/disk/format.py",
    "fusecache/store/eviction.py",
    "fusecache/store/throughput.py",
    "fusecache/store/tier_placement.py",
    "fusecache/prefetch/models/companions.py",
    "fusecache/prefetch/models/tensor_formats.py",
    "fusecache/prefetch/models/shard_order.py",
    "fusecache/prefetch/profiles/recorder.py",
    "fusecache/prefetch/profiles/access_profile.py",
    "fusecache/attest/sums.py",
    "fusecache/attest/signing.py",
    "fusecache/attest/manifests.py",
    "fusecache/peers/membership/placement.py",
    "fusecache/telemetry/trace_summary.py",
    "mount/fusecache_mount/kernel/nodeids.py",
    "mount/fusecache_mount/kernel/protocol.py",
    "mount/fusecache_mount/tracing/requests.py",
)
IMPURE_LIBRARIES = {"trio", "fsspec", "pyfuse3", "obstore", "s3fs", "gcsfs"}


def modules() -> Iterator[tuple[Path, str]]:
    """(file, room) of every module."""
    for file in sorted((ROOT / "fusecache").rglob("*.py")):
        parts = file.relative_to(ROOT / "fusecache").parts
        yield file, "" if parts == ("__init__.py",) else parts[0].removesuffix(".py")
    for file in sorted((ROOT / "mount").rglob("*.py")):
        yield file, "mount"


def imported(file: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            if node.module == "fusecache":
                yield from (f"fusecache.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def room_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] == "fusecache_mount":
        return "mount"
    if parts[0] != "fusecache":
        return None
    return parts[1] if len(parts) > 1 else ""


MODULES = list(modules())
IDS = [str(file.relative_to(ROOT)) for file, _ in MODULES]


@pytest.mark.parametrize(("file", "room"), MODULES, ids=IDS)
def test_arrows_point_one_way(file: Path, room: str) -> None:
    allowed = ALLOWED.get(room, set()) | {room}
    wrong = {name for name in imported(file) if (to := room_of(name)) is not None and to not in allowed}
    assert not wrong, f"{room or 'fusecache'} may not know {wrong}"
    assert room in ALLOWED or room == "", f"{room} is a new room: say here whom it may know"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_io_library(name: str) -> None:
    path = ROOT / name
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    assert all(file.exists() for file in files)
    for file in files:
        assert not {name.split(".")[0] for name in imported(file)} & IMPURE_LIBRARIES, file


@pytest.mark.parametrize(("file", "room"), MODULES, ids=IDS)
def test_object_storage_libraries_stay_in_origin(file: Path, room: str) -> None:
    if room != "origin":
        assert not {name.split(".")[0] for name in imported(file)} & (IMPURE_LIBRARIES - {"trio", "pyfuse3"})


def test_every_package_is_installed() -> None:
    configured = (ROOT / "setup.cfg").read_text().split("packages =")[1].split("package_dir")[0].split()
    found = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "fusecache").rglob("__init__.py")
    }
    found |= {
        ".".join(file.parent.relative_to(ROOT / "mount").parts)
        for file in (ROOT / "mount").rglob("__init__.py")
    }
    assert set(configured) == found
