"""The last listing of a source on disk, so that a mount made during an outage of the origin has its tree.

Format 1: gzip of JSON lines. The first is {"format": "fusecache-listing", "version": 1, "identity": ..., "origin": ...,
"objects": n, "listed_at": seconds since the epoch}; each other one is an array of up to 1000 [key, etag, size,
mtime_ns]. The file is named by the hash of the source's identity and replaced whole; a file that is torn, foreign or
of another format counts as absent. Blocking: for worker threads.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
import zlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import xxhash

from fusecache.files import replace_file
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)

LISTING_FORMAT = "fusecache-listing"
LISTING_FORMAT_VERSION = 1
_OBJECTS_PER_LINE = 1000


def saved_path(directory: Path, identity: str) -> Path:
    """The file that holds the listing of this source."""
    return directory / f"{xxhash.xxh3_128_hexdigest(identity.encode())}.listing.gz"


def save_listing(directory: Path, identity: str, versions: Sequence[ObjectVersion]) -> None:
    """Replace the saved listing of this source. Blocks on the disk; raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = saved_path(directory, identity)
    origin = versions[0].origin if versions else identity
    header = {
        "format": LISTING_FORMAT,
        "version": LISTING_FORMAT_VERSION,
        "identity": identity,
        "origin": origin,
        "objects": len(versions),
        "listed_at": time.time(),
    }
    with (
        replace_file(path) as temporary,
        gzip.open(temporary, "wt", compresslevel=1, encoding="utf-8", newline="\n") as file,
    ):
        file.write(json.dumps(header) + "\n")
        for rows in _iterate_rows(versions):
            file.write(json.dumps(rows) + "\n")


def _iterate_rows(versions: Iterable[ObjectVersion]) -> Iterable[list[tuple[str, str, int, int]]]:
    rest = iter(versions)
    while rows := [
        (each.key, each.etag, each.size, each.mtime_ns) for each in islice(rest, _OBJECTS_PER_LINE)
    ]:
        yield rows


def load_listing(directory: Path, identity: str) -> list[ObjectVersion] | None:
    """The saved listing of this source; None when there is none, or none that can be used. Blocks on the disk."""
    path = saved_path(directory, identity)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            header = json.loads(file.readline())
            if (header["format"], header["version"], header["identity"]) != (
                LISTING_FORMAT,
                LISTING_FORMAT_VERSION,
                identity,
            ):
                return None
            origin = str(header["origin"])
            versions = [
                ObjectVersion(origin, str(key), str(etag), int(size), int(mtime_ns))
                for line in file
                for key, etag, size, mtime_ns in json.loads(line)
            ]
            if len(versions) != header["objects"]:
                raise ValueError("objects are missing")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        _log.warning("the saved listing %s can't be used: %s", path.name, error)
        return None
    return versions
