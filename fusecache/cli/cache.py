"""`fusecache ls`, `evict`, `pin`, `unpin`: what the cache holds, and what it has to keep or let go.

They ask the daemon of a mount, or, given `--cache-dir`, look into the directory themselves: the store may be
shared by any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from fusecache import mounts
from fusecache.cli import target
from fusecache.cli.output import ago, complain, print_json, print_table, progress, table
from fusecache.config.model import default_cache_dir
from fusecache.config.units import format_size
from fusecache.errors import ControlError, DaemonUnreachableError, MountError, StoreError
from fusecache.store.format import parse_format
from fusecache.store.info import ObjectInfo
from fusecache.store.store import Store
from fusecache.types import ObjectId

_SCAN_WAIT = 30.0
_F = TypeVar("_F", bound=Callable[..., Any])


class Cache(Protocol):
    """One cache, through a daemon or directly. An object is a dict as the control operation `ls` has it:
    path or key, source, bytes, size, complete, pinned, last_use (epoch seconds), id, mark (none, attested or
    quarantined)."""

    name: str

    def objects(self) -> list[dict[str, Any]]:
        """All objects. Raises FusecacheError."""

    def evict(self, item: dict[str, Any]) -> int:
        """Bytes freed. Raises ControlError or StoreError when it is pinned or in use."""

    def pin(self, item: dict[str, Any], on: bool) -> None:
        """Pin or unpin it. Raises ControlError or StoreError."""

    def close(self) -> None:
        """Let it go."""


class MountedCache:
    """The cache of a mount, through its daemon."""

    def __init__(self, mount: mounts.Mount) -> None:
        self._mount = mount
        self.name = str(mount.mountpoint)

    def objects(self) -> list[dict[str, Any]]:
        """See Cache."""
        found = target.ask(self._mount, "ls", timeout=60.0)
        return list(found)

    def evict(self, item: dict[str, Any]) -> int:
        """See Cache."""
        return int(target.ask(self._mount, "evict", id=item["id"])["freed"])

    def pin(self, item: dict[str, Any], on: bool) -> None:
        """See Cache."""
        target.ask(self._mount, "pin", id=item["id"], path=path_of(item), on=on)

    def close(self) -> None:
        """See Cache."""


class DirectCache:
    """A cache directory, without a daemon. Raises StoreError when `directory` is none."""

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        try:
            block_size = parse_format((directory / "format").read_bytes())
        except FileNotFoundError:
            raise StoreError(f"{directory} is not a cache directory of fusecache") from None
        except OSError as error:
            raise StoreError(f"{directory}: {error.strerror}") from None
        if block_size is None:
            raise StoreError(f"{directory} was made by another version of fusecache")
        # Nothing is written through this store, so its limits make no room.
        self._store = Store(directory, limit=1 << 62, free_floor=0, block_size=block_size)
        self._store.wait_scanned(_SCAN_WAIT)

    def objects(self) -> list[dict[str, Any]]:
        """See Cache."""
        return [_item(info) for info in self._store.objects()]

    def evict(self, item: dict[str, Any]) -> int:
        """See Cache."""
        return self._store.evict(ObjectId(item["id"]))

    def pin(self, item: dict[str, Any], on: bool) -> None:
        """See Cache."""
        self._store.pin(ObjectId(item["id"]), on)

    def close(self) -> None:
        """See Cache."""
        self._store.close()


def _item(info: ObjectInfo) -> dict[str, Any]:
    return {
        "key": info.version.key,
        "source": info.version.origin,
        "bytes": info.present_bytes,
        "size": info.version.size,
        "complete": info.complete,
        "pinned": info.pinned,
        "last_use": info.last_use,
        "id": info.id,
        "mark": info.mark.name.lower(),
    }


def path_of(item: dict[str, Any]) -> str:
    """The path below the mountpoint, or the key where there is no mount."""
    return str(item.get("path") or item.get("key") or item["id"])


def matches(item: dict[str, Any], wanted: str) -> bool:
    """Whether `wanted` names this object or a folder that it is in: a path, a key, a URL, or an id."""
    wanted = wanted.rstrip("/")
    names = [path_of(item), f"{item.get('source', '')}/{item.get('key') or path_of(item)}", str(item["id"])]
    return not wanted or any(name == wanted or name.startswith(wanted + "/") for name in names)


def _caches(cache_dir: Path | None, mountpoint: str | None) -> list[Cache]:
    """The cache that the user means: the directory, the mount, or all there are."""
    if cache_dir is not None:
        return [DirectCache(cache_dir)]
    if mountpoint is not None:
        return [MountedCache(target.mounted(mountpoint))]
    found: list[Cache] = [MountedCache(mount) for mount in mounts.list_mounts()]
    if not found and (default_cache_dir() / "format").exists():
        found = [DirectCache(default_cache_dir())]
    if not found:
        raise MountError("nothing is mounted: name the cache with --cache-dir")
    return found


def _selected(cache_dir: Path | None, paths: Sequence[str]) -> list[tuple[Cache, list[tuple[str, str]]]]:
    """Per cache, (path as the user wrote it, path in the cache)."""
    if cache_dir is None and not mounts.list_mounts() and (default_cache_dir() / "format").exists():
        cache_dir = default_cache_dir()
    if cache_dir is not None:
        return [(DirectCache(cache_dir), [(path, path) for path in paths])]
    grouped: dict[mounts.Mount, list[tuple[str, str]]] = {}
    for path in paths:
        mount, below = target.around(path)
        grouped.setdefault(mount, []).append((path, below))
    return [(MountedCache(mount), wanted) for mount, wanted in grouped.items()]


def _everything(cache_dir: Path | None) -> list[tuple[Cache, list[tuple[str, str]]]]:
    return [(cache, [("", "")]) for cache in _caches(cache_dir, None)]


def _cache_dir_option(command: _F) -> _F:
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Work on this cache directory, without a mount; paths are keys or URLs then.",
    )(command)


@click.command("ls")
@click.argument("mountpoint", required=False)
@_cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def ls_command(mountpoint: str | None, cache_dir: Path | None, as_json: bool) -> int:
    """List what the cache holds."""
    items: list[dict[str, Any]] = []
    for cache in _caches(cache_dir, mountpoint):
        try:
            items += cache.objects()
        finally:
            cache.close()
    unique = {item["id"]: item for item in items}  # mounts may share a cache
    items = sorted(unique.values(), key=lambda item: (str(item.get("source", "")), path_of(item)))
    if as_json:
        print_json(items)
        return 0
    marked = any(item.get("mark", "none") != "none" for item in items)
    names = ("PATH", "SIZE", "CACHED", "PINNED", *(("MANIFEST",) if marked else ()), "USED", "SOURCE")
    made = table(*names, right=("SIZE", "CACHED"))
    for item in items:
        share = item["bytes"] / item["size"] if item["size"] else 1.0
        made.add_row(
            path_of(item),
            format_size(item["size"]),
            # Never 100 % of what is not complete: engines wait for the last block too.
            "100%" if item["complete"] else f"{min(int(share * 100), 99)}%",
            "pinned" if item["pinned"] else "",
            *(("" if item["mark"] == "none" else item["mark"],) if marked else ()),
            ago(item["last_use"]),
            str(item.get("source", "")),
        )
    print_table(made)
    return 0


@click.command("evict")
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@_cache_dir_option
@click.option("--all", "everything", is_flag=True, help="Evict all that is neither pinned nor in use.")
def evict_command(paths: tuple[str, ...], cache_dir: Path | None, everything: bool) -> int:
    """Evict files or folders from the cache. What is pinned or in use stays."""
    if everything == bool(paths):
        raise click.UsageError("give either paths or --all", click.get_current_context())
    chosen = _everything(cache_dir) if everything else _selected(cache_dir, paths)
    freed = count = 0
    failures: list[str] = []
    for cache, wanted in chosen:
        try:
            items, missing = _find(cache, wanted)
            if not everything:
                failures += [f"{path} is not in the cache" for path in missing]
            with progress("evicting", len(items), unit="objects") as bar:
                for number, item in enumerate(items):
                    bar.at(number)
                    if everything and item["pinned"]:
                        continue
                    try:
                        freed += cache.evict(item)
                        count += 1
                    except DaemonUnreachableError:
                        raise
                    except (ControlError, StoreError) as error:
                        if not everything:
                            failures.append(str(error))
        finally:
            cache.close()
    print(f"evicted {count} objects, {format_size(freed)}")
    for failure in failures:
        complain(failure)
    return 1 if failures else 0


def _find(cache: Cache, wanted: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects that the paths name, each once, and the paths that name none."""
    items = cache.objects()
    found: dict[str, dict[str, Any]] = {}
    missing = []
    for path, below in wanted:
        these = {item["id"]: item for item in items if matches(item, below)}
        found |= these
        if not these:
            missing.append(path)
    return list(found.values()), missing


def _pin(paths: Sequence[str], cache_dir: Path | None, on: bool) -> int:
    count = 0
    failures: list[str] = []
    for cache, wanted in _selected(cache_dir, paths):
        try:
            items, missing = _find(cache, wanted)
            hint = ": read or fetch it first" if on else ""
            failures += [f"{path} is not in the cache{hint}" for path in missing]
            with progress("pinning" if on else "unpinning", len(items), unit="objects") as bar:
                for number, item in enumerate(items):
                    bar.at(number)
                    try:
                        cache.pin(item, on)
                        count += 1
                    except DaemonUnreachableError:
                        raise
                    except (ControlError, StoreError) as error:
                        failures.append(str(error))
        finally:
            cache.close()
    print(f"{'pinned' if on else 'unpinned'} {count} objects")
    for failure in failures:
        complain(failure)
    return 1 if failures else 0


@click.command("pin")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@_cache_dir_option
def pin_command(paths: tuple[str, ...], cache_dir: Path | None) -> int:
    """Keep files or folders in the cache until they are unpinned."""
    return _pin(paths, cache_dir, True)


@click.command("unpin")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@_cache_dir_option
def unpin_command(paths: tuple[str, ...], cache_dir: Path | None) -> int:
    """Let pinned files or folders be evicted again."""
    return _pin(paths, cache_dir, False)
