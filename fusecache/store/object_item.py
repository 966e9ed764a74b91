"""An object of the cache as the operation `ls` tells it, by a daemon or by the command that opened the cache itself."""

from __future__ import annotations

from typing import Any

from fusecache.store.info import ObjectInfo


def object_item(info: ObjectInfo, **more: object) -> dict[str, Any]:
    """A plain dictionary for JSON, with the fields of `more`, such as the path in the mount. "bytes" are present of
    "size", "last_use" is in seconds since the epoch, "mark" is none, attested or quarantined."""
    return {
        "key": info.version.key,
        **more,
        "source": info.version.origin,
        "bytes": info.present_bytes,
        "size": info.version.size,
        "complete": info.is_complete,
        "pinned": info.is_pinned,
        "last_use": info.last_use,
        "id": info.id,
        "mark": info.attestation_state.name.lower(),
    }
