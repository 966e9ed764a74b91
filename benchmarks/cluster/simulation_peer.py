"""The state of one simulated node that its receiving and its sending side share, and what goes between two nodes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from benchmarks.cluster.simulation_network import SimulatedStream
from benchmarks.cluster.simulation_world import SimulatedWorld
from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch
from fusecache.peers.exchange import policy
from fusecache.peers.exchange.dependencies import StripeDependencies, StripeId
from fusecache.peers.exchange.stripe_request import Ask, StripeRequest
from fusecache.peers.member import Member


class SimulatedStoredObject:
    """Stands for a file of the store: which blocks are there. A block becomes present once, and stays."""

    def __init__(self, block_count: int, block_size: int) -> None:
        self.block_count = block_count
        self.block_size = block_size
        self.missing_block_count = block_count
        self._present = bytearray(block_count)

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are there."""
        return not self.missing_block_count

    def is_present(self, block: int) -> bool:
        """Whether this block is there."""
        return self._present[block] != 0

    def is_unverified(self, block: int) -> bool:
        """Never: nothing is left of an earlier run."""
        return False

    def add_block(self, block: int) -> bool:
        """This block is there from now on; returns whether it was missing."""
        if self._present[block]:
            return False
        self._present[block] = 1
        self.missing_block_count -= 1
        return True

    def first_missing(self, blocks: range) -> int | None:
        """The first of these blocks that is not there; None: all are."""
        found = self._present.find(0, blocks.start, blocks.stop)
        return None if found < 0 else found


class PeerEvent(Enum):
    """The ways in which a request to another node ends."""

    MISSED = auto()
    BUSY = auto()
    REDIRECTED = auto()
    CONNECT_TIMED_OUT = auto()
    BROKE_OFF = auto()
    COMPLETED = auto()


@dataclass(eq=False)
class SimulatedTransfer:
    """One flight: what a thread holds on its stack."""

    plan: FlightPlan
    file: int
    stripe: int
    is_from_peer: bool
    demand_only: bool
    request: StripeRequest
    next_block: int
    sender: Member | None = None
    """The node that is waited for; None: the flight waits for the origin, or to ask a busy node again."""
    stored_only: bool = False
    all_stored: bool = False
    """The node had all blocks when it began to send."""
    reported_block: int = 0
    reported_at: float = 0.0
    stream: SimulatedStream | None = None
    reads_as_owner: bool = False
    awaiting: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """The stripe's dependency on the node that is waited for."""
    wait_number: int = 0
    """Grows with each thing that is waited for: what comes of an earlier one is not listened to."""

    @property
    def object_fetch(self) -> ObjectFetch:
        """The fetch that the flight is of."""
        return self.plan.object_fetch

    @property
    def remaining(self) -> range:
        """The blocks that have not arrived."""
        return range(self.next_block, self.plan.blocks.stop)


class RequestClient(Protocol):
    """The node that sent a request, as far as the node that answers it knows it."""

    name: str
    number: int

    def deliver(
        self, transfer: SimulatedTransfer, wait_number: int, event: PeerEvent, target: Member | None = None
    ) -> None:
        """This has come of the request that the transfer waited for with this number; `target`: where it is sent on
        to."""

    def stream_began(self, transfer: SimulatedTransfer, stream: SimulatedStream, *, all_stored: bool) -> None:
        """Blocks are on their way."""

    def blocks_arrived(self, stream: SimulatedStream, count: int) -> None:
        """So many further blocks of a stream are there."""

    def lose_transfer(self, transfer: SimulatedTransfer) -> None:
        """The node that sends breaks off."""


@dataclass(eq=False, slots=True)
class SimulatedRequest:
    """A request of a node to another."""

    client: RequestClient
    transfer: SimulatedTransfer
    wait_number: int
    ask: Ask
    blocks: range
    is_urgent: bool
    unsent_bytes: int
    receive_rate: int

    @property
    def is_abandoned(self) -> bool:
        """Whether the client does not listen to what comes of it any more."""
        return self.transfer.wait_number != self.wait_number


class SimulatedPeer:
    """One node: its name, the nodes that it takes for alive, and the blocks that it has.

    | What happens | Effect |
    |---|---|
    | `fetch_of` a file, for the first time | the fetch is made, with the routes of the members that are alive |
    | `notice_deaths` | the node knows a later view of the members, and all routes are made anew |
    | `lose_power` | the node is dead, for ever |
    """

    def __init__(self, world: SimulatedWorld, number: int) -> None:
        self.world = world
        self.number = number
        self.name = world.member_views[0][number].name
        self.is_dead = False
        self.dependencies = StripeDependencies()
        self.fetches: dict[int, ObjectFetch] = {}
        """By the numbers of files."""
        self._stored: dict[int, SimulatedStoredObject] = {}
        self._view_number = 0

    @property
    def members(self) -> tuple[Member, ...]:
        """The nodes that this one takes for alive."""
        return self.world.member_views[self._view_number]

    @property
    def live_names(self) -> frozenset[str]:
        """Their names."""
        return self.world.live_names(self._view_number)

    def ranking_of(self, file: int, stripe: int) -> list[Member]:
        """The nodes for one stripe, the owner first."""
        return self.world.ranking_of(self._view_number, file, stripe)

    def stripe_id(self, file: int, stripe: int) -> StripeId:
        """The stripe of this file with this number."""
        return self.world.files[file].id, stripe

    def fetch_of(self, file: int) -> ObjectFetch:
        """The fetch of this file, made at the first call."""
        object_fetch = self.fetches.get(file)
        if object_fetch is None:
            version, block = self.world.files[file], self.world.setting.block
            stored = self._stored[file] = SimulatedStoredObject(-(-version.size // block), block)
            object_fetch = self.fetches[file] = ObjectFetch(version, "", stored)  # type: ignore[arg-type]
            self._set_route(object_fetch)
        return object_fetch

    def stored_of(self, file: int) -> SimulatedStoredObject:
        """The blocks of this file that are there."""
        self.fetch_of(file)
        return self._stored[file]

    def _set_route(self, object_fetch: ObjectFetch) -> None:
        setting = self.world.setting
        object_fetch.set_route(
            policy.build_route(
                object_fetch.version,
                setting.block,
                setting.stripe,
                self.members,
                self.name,
                owners=self.world.stripe_owners,
            )
        )

    def notice_deaths(self, view_number: int) -> None:
        """The membership publishes this view of the members."""
        self._view_number = view_number
        for object_fetch in self.fetches.values():
            self._set_route(object_fetch)

    def lose_power(self) -> None:
        """The power fails."""
        self.is_dead = True
