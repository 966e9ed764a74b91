"""What a loader is given and asks for, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from fusecache.fetch.object_fetch import ObjectFetch
    from fusecache.origin.base import Origin


@dataclass(frozen=True)
class FetchSettings:
    """`range_bytes` per request to the origin, `deadline` in seconds for a waiter and a flight, `budget` in bytes
    of shards fetched ahead of the file being read; `concurrency` is the size of the crew. `learn`: take down in which
    order models are read, and follow it; `read_ahead` is what the kernel reads ahead then, in bytes."""

    concurrency: int = 16
    range_bytes: int = 16 << 20
    deadline: float = 60.0
    prefetch: bool = True
    prefetch_budget: int = 1 << 62
    learn: bool = True
    read_ahead: int = 1 << 20


class CatalogView(Protocol):
    """What the loader asks the catalog, and tells it. Called without a lock, from any thread."""

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """The files of the same folder, itself included."""

    def version_completed(self, version: ObjectVersion) -> None:
        """All of it is in the store, verified."""

    def version_gone(self, version: ObjectVersion) -> None:
        """The origin does not have this version any more."""


class Shelf(Protocol):
    """Where recordings are kept on this node, by the ids of models. Thread-safe; fails silently."""

    def load_profile(self, name: str) -> bytes | None:
        """What was saved under this name."""
        ...

    def save_profile(self, name: str, data: bytes) -> None:
        """Keep it, instead of what was there."""
        ...


class PeerProfiles(Protocol):
    """What other nodes may know. Thread-safe."""

    def find_profile(self, name: str) -> bytes | None:
        """The recording of this name that one of them has; takes a second at most."""
        ...

    def offer_profile(self, name: str) -> None:
        """Let them know that it is here; takes a second at most."""
        ...


class Inspector(Protocol):
    """Who vouches for sealed objects (see store.seals), or does not."""

    def request_inspection(self, object_fetch: ObjectFetch) -> None:
        """More of a sealed object landed. Quick; `Loader.looked` is called once for it, later, from another thread."""


@dataclass
class FetchStats:
    """Counters since the start, guarded by the loader's lock."""

    flights: int = 0
    flights_failed: int = 0
    bytes_uncached: int = 0
    """Fetched, and handed over without being stored."""


@dataclass(frozen=True)
class Route:
    """Where the stripes of one object come from. A stripe is `stripe` blocks, the last one may be shorter; flights do
    not cross its ends. `remote` has a byte per stripe, 1: from another node. `order` is that of fetching ahead. `keep`:
    what comes from other nodes is stored; otherwise it is only handed to who waits for it. `lanes` names the owner of
    each stripe; of one owner's, `window` are fetched ahead at a time. `in_order`: what comes from the origin is not
    fetched ahead before what comes from other nodes and is in front of it. `owners`: how many others own any."""

    stripe_blocks: int
    remote_stripes: bytes
    prefetch_order: Sequence[int]
    stores_remote: bool = True
    stripe_owners: Sequence[str] = ()
    prefetch_window: int = 1 << 30
    is_origin_ordered: bool = False
    owner_count: int = 0

    def owner_of_stripe(self, stripe: int) -> str | None:
        """Whose window this stripe takes room in; None: nobody's."""
        return self.stripe_owners[stripe] if self.stripe_owners else None


class ExpectedChecksum:
    """What the bytes of the next block hash to, says who sends them; `bad` is set when they did not. Then the same
    block has to come again."""

    def __init__(self, checksum: int) -> None:
        self.checksum = checksum
        self.is_mismatch = False


class BlockRestart:
    """The bytes of the current block so far are void: it comes again from its start."""


class BlockSource(Protocol):
    """Where the bytes of flights come from. Thread-safe."""

    peer_workers: int
    """Threads that may wait for other nodes; 0: there are none."""

    def max_prefetch_flights(self) -> int:
        """How many of them may do so, for what nobody waits for yet, at a time. Quick."""
        ...

    def route_of(self, version: ObjectVersion, block_size: int) -> Route | None:
        """Where the stripes of this object come from; None: all from its origin. May take milliseconds."""
        ...

    def send_blocks(
        self,
        version: ObjectVersion,
        source: str,
        blocks: range,
        block_size: int,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
        urgent: bool,
    ) -> Iterator[Buffer | ExpectedChecksum | BlockRestart]:
        """The bytes of these blocks in order, in chunks that are valid until the next is asked for. `deadline` is a
        time.monotonic(); `urgent`: a reader waits for them. Raises what Origin.read_range raises."""
        ...


class OriginBlockSource:
    """Everything from the origins, by source name."""

    peer_workers = 0

    def max_prefetch_flights(self) -> int:
        """See Supplier."""
        return 0

    def __init__(self, origins: Mapping[str, Origin]) -> None:
        self._origins = origins

    def route_of(self, version: ObjectVersion, block_size: int) -> Route | None:
        """See Supplier."""
        return None

    def send_blocks(
        self,
        version: ObjectVersion,
        source: str,
        blocks: range,
        block_size: int,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
        urgent: bool,
    ) -> Iterator[Buffer | ExpectedChecksum | BlockRestart]:
        """See Supplier."""
        offset = blocks.start * block_size
        length = min(blocks.stop * block_size, version.size) - offset
        return self._origins[source].read_range(
            version, offset, length, deadline=deadline, cancelled=cancelled
        )
