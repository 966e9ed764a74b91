"""A node that is put together: what each role has, and that verify=manifest counts without a mount, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from fusecache.assemble import Node, build_node, read_whole_object
from fusecache.config.model import MountConfig, SourceConfig
from fusecache.errors import AttestationError, ConfigError
from fusecache.store.disk.format import AttestationState
from fusecache.types import ObjectVersion
from tests.support.content import content
from tests.support.signed import sums

SIZE = 300_000
GOOD, BAD, UNKNOWN = "model/good.bin", "model/tampered.bin", "model/unknown.bin"


def config(work: Path, **changes: Any) -> MountConfig:
    (work / "source").mkdir(exist_ok=True)
    return MountConfig.model_validate(
        {
            "sources": (SourceConfig.model_validate({"url": f"file://{work}/source"}),),
            "mountpoint": work / "mnt",
            "cache_dir": work / "cache",
            "runtime_dir": work / "run",
            "cache_size": "1GiB",
            "peers": {"listen": "127.0.0.1:0", "advertise": "http://127.0.0.1:1"},
            **changes,
        }
    )


def put(work: Path, key: str, data: bytes) -> None:
    path = work / "source" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


async def wait_for(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110  threads do the work
            await trio.sleep(0.01)


def version_of(node: Node, key: str) -> ObjectVersion:
    return node.origins[""].stat_object(key)


async def test_a_node_that_serves_has_no_catalog(tmp_path: Path) -> None:
    put(tmp_path, GOOD, b"data")
    async with build_node(config(tmp_path), "serve", dict) as node:
        assert node.catalog is None
        assert node.inspector is None
        assert node.peer_node is not None
        assert read_whole_object(node.fetch_service, version_of(node, GOOD), "") == b"data"


async def test_a_node_of_a_mount_tells_of_its_objects_and_names(tmp_path: Path) -> None:
    put(tmp_path, GOOD, b"data")
    async with build_node(config(tmp_path, peers={}), "mount", dict) as node:
        assert node.peer_node is None
        completed: list[ObjectVersion] = []
        changed: list[object] = []
        node.events.object_completed.subscribe(completed.append)
        node.events.names_changed.subscribe(changed.append)
        entry = node.mounted_catalog.index.entry_by_path(GOOD)
        assert entry is not None
        assert entry.version is not None
        assert node.source_names.tree_path(entry.version) == GOOD
        version = entry.version
        read = await trio.to_thread.run_sync(lambda: read_whole_object(node.fetch_service, version, ""))
        assert read == b"data"
        await wait_for(lambda: completed == [version])
        put(tmp_path, BAD, b"more")
        await node.mounted_catalog.listings.refresh()
        assert changed


async def test_without_a_mount_objects_are_attested_too(tmp_path: Path) -> None:
    for key in (GOOD, BAD, UNKNOWN):
        put(tmp_path, key, content(key, 1, 0, SIZE))
    said = {"good.bin": content(GOOD, 1, 0, SIZE), "tampered.bin": b"something else"}
    put(tmp_path, "model/SHA256SUMS", sums(said))
    async with build_node(config(tmp_path, verify="manifest"), "serve", dict) as node:
        versions = {key: version_of(node, key) for key in (GOOD, BAD, UNKNOWN)}

        def states() -> dict[str, AttestationState]:
            found = {info.id: info.attestation_state for info in node.store.objects()}
            return {key: found[version.id] for key, version in versions.items() if version.id in found}

        fetches = [node.fetch_service.open_object(version, "") for version in versions.values()]
        for fetch in fetches:
            node.fetch_service.request_bytes(fetch, 0, SIZE, lambda waiter: None)
        assert node.inspector is not None
        stats = node.inspector.stats
        await wait_for(lambda: stats.attested == 1 and stats.quarantined == 1)
        await wait_for(lambda: states().get(BAD) is AttestationState.QUARANTINED)
        assert states()[GOOD] is AttestationState.ATTESTED
        assert states()[UNKNOWN] is AttestationState.NONE
        for fetch in fetches:
            node.fetch_service.release_fetch(fetch)
        with pytest.raises(AttestationError, match="quarantine"):
            read_whole_object(node.fetch_service, versions[BAD], "")


async def test_a_wrong_manifest_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    with pytest.raises(ConfigError, match="manifest_key"):
        async with build_node(
            config(tmp_path, verify="manifest", manifest_key=tmp_path / "key"), "serve", dict
        ):
            pass
