"""`fusecache ls`, `evict`, `pin`, `unpin`: list the objects of a cache, and say which of them it keeps or drops.

The commands ask the daemon of a mount, or, given `--cache-dir`, open the directory themselves: any number of processes
may share one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from fusecache.cli import target
from fusecache.cli.output import format_age, make_table, print_error, print_json, print_table, show_progress
from fusecache.config.model import default_cache_dir
from fusecache.config.units import format_size
from fusecache.control import mounts
from fusecache.errors import ControlError, DaemonUnreachableError, MountError, StoreError
from fusecache.store.disk.format import parse_format
from fusecache.store.object_item import object_item
from fusecache.store.store import Store
from fusecache.types import ObjectId

_SCAN_TIMEOUT = 30.0
_F = TypeVar("_F", bound=Callable[..., Any])


class CacheAccess(Protocol):
    """One cache, through a daemon or directly. An object is a dictionary as the control operation `ls` has it
    (object_item), with a "path" where there is a mount."""

    name: str

    def list_items(self) -> list[dict[str, Any]]:
        """All objects. Raises FusecacheError."""

    def evict_item(self, item: dict[str, Any]) -> int:
        """Bytes freed. Raises ControlError or StoreError when it is pinned or in use."""

    def set_item_pinned(self, item: dict[str, Any], on: bool) -> None:
        """Pin or unpin it. Raises ControlError or StoreError."""

    def close(self) -> None:
        """Release the cache; it is not used afterwards."""


class MountedCache:
    """The cache of a mount, through its daemon."""

    def __init__(self, mount: mounts.Mount) -> None:
        self._mount = mount
        self.name = str(mount.mountpoint)

    def list_items(self) -> list[dict[str, Any]]:
        """The objects that the daemon lists. Raises ControlError."""
        found = target.call_mount_daemon(self._mount, "ls", timeout=60.0)
        return list(found)

    def evict_item(self, item: dict[str, Any]) -> int:
        """Have the daemon evict it. Raises ControlError."""
        return int(target.call_mount_daemon(self._mount, "evict", id=item["id"])["freed"])

    def set_item_pinned(self, item: dict[str, Any], on: bool) -> None:
        """Have the daemon pin or unpin it. Raises ControlError."""
        target.call_mount_daemon(self._mount, "pin", id=item["id"], path=display_path(item), on=on)

    def close(self) -> None:
        """Nothing is held."""


class DirectCache:
    """A cache directory, opened by this process. Raises StoreError when `directory` is no cache directory."""

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
        self._store.wait_for_scan(_SCAN_TIMEOUT)

    def list_items(self) -> list[dict[str, Any]]:
        """The objects that the store found in the directory."""
        return [object_item(info) for info in self._store.objects()]

    def evict_item(self, item: dict[str, Any]) -> int:
        """Evict it. Raises StoreError."""
        return self._store.evict(ObjectId(item["id"]))

    def set_item_pinned(self, item: dict[str, Any], on: bool) -> None:
        """Pin or unpin it. Raises StoreError."""
        self._store.set_pinned(ObjectId(item["id"]), on)

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def display_path(item: dict[str, Any]) -> str:
    """The item's path below the mountpoint, or its key where there is no mount."""
    return str(item.get("path") or item.get("key") or item["id"])


def is_named_by(item: dict[str, Any], name: str) -> bool:
    """Whether `name` is a path, a key, a URL or an id of this object, or of a folder that it is in."""
    name = name.rstrip("/")
    own_names = [
        display_path(item),
        f"{item.get('source', '')}/{item.get('key') or display_path(item)}",
        str(item["id"]),
    ]
    return not name or any(own == name or own.startswith(name + "/") for own in own_names)


def _open_caches(cache_dir: Path | None, mountpoint: str | None) -> list[CacheAccess]:
    """The caches that a command is about: the directory, that of the mount, or those of all mounts. Raises
    MountError."""
    if cache_dir is not None:
        return [DirectCache(cache_dir)]
    if mountpoint is not None:
        return [MountedCache(target.require_mount(mountpoint))]
    found: list[CacheAccess] = [MountedCache(mount) for mount in mounts.list_mounts()]
    if not found and (default_cache_dir() / "format").exists():
        found = [DirectCache(default_cache_dir())]
    if not found:
        raise MountError("nothing is mounted: name the cache with --cache-dir")
    return found


def _group_paths_by_cache(
    cache_dir: Path | None, paths: Sequence[str]
) -> list[tuple[CacheAccess, list[tuple[str, str]]]]:
    """For each cache, the paths that lie in it: (as the user wrote it, in the cache)."""
    if cache_dir is None and not mounts.list_mounts() and (default_cache_dir() / "format").exists():
        cache_dir = default_cache_dir()
    if cache_dir is not None:
        return [(DirectCache(cache_dir), [(path, path) for path in paths])]
    grouped: dict[mounts.Mount, list[tuple[str, str]]] = {}
    for path in paths:
        mount, below = target.require_containing_mount(path)
        grouped.setdefault(mount, []).append((path, below))
    return [(MountedCache(mount), wanted) for mount, wanted in grouped.items()]


def _select_everything(cache_dir: Path | None) -> list[tuple[CacheAccess, list[tuple[str, str]]]]:
    return [(cache, [("", "")]) for cache in _open_caches(cache_dir, None)]


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
    for cache in _open_caches(cache_dir, mountpoint):
        try:
            items += cache.list_items()
        finally:
            cache.close()
    unique = {item["id"]: item for item in items}  # mounts may share a cache
    items = sorted(unique.values(), key=lambda item: (str(item.get("source", "")), display_path(item)))
    if as_json:
        print_json(items)
        return 0
    marked = any(item.get("mark", "none") != "none" for item in items)
    names = ("PATH", "SIZE", "CACHED", "PINNED", *(("MANIFEST",) if marked else ()), "USED", "SOURCE")
    made = make_table(*names, right=("SIZE", "CACHED"))
    for item in items:
        share = item["bytes"] / item["size"] if item["size"] else 1.0
        made.add_row(
            display_path(item),
            format_size(item["size"]),
            # Never 100 % of what is not complete: engines wait for the last block too.
            "100%" if item["complete"] else f"{min(int(share * 100), 99)}%",
            "pinned" if item["pinned"] else "",
            *(("" if item["mark"] == "none" else item["mark"],) if marked else ()),
            format_age(item["last_use"]),
            str(item.get("source", "")),
        )
    print_table(made)
    return 0


@click.command("evict")
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@_cache_dir_option
@click.option("--all", "everything", is_flag=True, help="Evict all that is neither pinned nor in use.")
def evict_command(paths: tuple[str, ...], cache_dir: Path | None, everything: bool) -> int:
    """Evict files or folders from the cache. Files that are pinned or in use stay."""
    if everything == bool(paths):
        raise click.UsageError("give either paths or --all", click.get_current_context())
    chosen = _select_everything(cache_dir) if everything else _group_paths_by_cache(cache_dir, paths)
    freed = count = 0
    failures: list[str] = []
    for cache, wanted in chosen:
        try:
            items, missing = _find_items(cache, wanted)
            if not everything:
                failures += [f"{path} is not in the cache" for path in missing]
            with show_progress("evicting", len(items), unit="objects") as bar:
                for number, item in enumerate(items):
                    bar.move_to(number)
                    if everything and item["pinned"]:
                        continue
                    try:
                        freed += cache.evict_item(item)
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
        print_error(failure)
    return 1 if failures else 0


def _find_items(
    cache: CacheAccess, paths: Sequence[tuple[str, str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects that the paths name, each once, and the paths that name none."""
    items = cache.list_items()
    found: dict[str, dict[str, Any]] = {}
    missing = []
    for path, below in paths:
        these = {item["id"]: item for item in items if is_named_by(item, below)}
        found |= these
        if not these:
            missing.append(path)
    return list(found.values()), missing


def _set_pinned(paths: Sequence[str], cache_dir: Path | None, on: bool) -> int:
    count = 0
    failures: list[str] = []
    for cache, wanted in _group_paths_by_cache(cache_dir, paths):
        try:
            items, missing = _find_items(cache, wanted)
            hint = ": read or fetch it first" if on else ""
            failures += [f"{path} is not in the cache{hint}" for path in missing]
            with show_progress("pinning" if on else "unpinning", len(items), unit="objects") as bar:
                for number, item in enumerate(items):
                    bar.move_to(number)
                    try:
                        cache.set_item_pinned(item, on)
                        count += 1
                    except DaemonUnreachableError:
                        raise
                    except (ControlError, StoreError) as error:
                        failures.append(str(error))
        finally:
            cache.close()
    print(f"{'pinned' if on else 'unpinned'} {count} objects")
    for failure in failures:
        print_error(failure)
    return 1 if failures else 0


@click.command("pin")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@_cache_dir_option
def pin_command(paths: tuple[str, ...], cache_dir: Path | None) -> int:
    """Keep files or folders in the cache until they are unpinned."""
    return _set_pinned(paths, cache_dir, True)


@click.command("unpin")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@_cache_dir_option
def unpin_command(paths: tuple[str, ...], cache_dir: Path | None) -> int:
    """Let pinned files or folders be evicted again."""
    return _set_pinned(paths, cache_dir, False)
