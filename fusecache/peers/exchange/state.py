"""The tables that the receiving and the sending side of one node share."""

from __future__ import annotations

from dataclasses import dataclass

from fusecache.peers.exchange.breaker import CircuitBreaker, SpeedComparison
from fusecache.peers.exchange.dependencies import StripeDependencies
from fusecache.peers.exchange.policy import ReceiverRates
from fusecache.peers.exchange.rankings import RankingCache
from fusecache.peers.exchange.traffic import PeerTraffic
from fusecache.peers.membership.table import MembershipTable
from fusecache.peers.outgoing import OutgoingBytes


@dataclass(frozen=True)
class ExchangeState:
    """The tables of one node's exchange. Each is thread-safe with a leaf lock of its own (`ReceiverRates` has one
    writer, the event loop's thread, and no lock); no two of these locks are ever held together."""

    own_name: str
    members: MembershipTable
    rankings: RankingCache
    dependencies: StripeDependencies
    traffic: PeerTraffic
    outgoing: OutgoingBytes
    breaker: CircuitBreaker
    speeds: SpeedComparison
    receiver_rates: ReceiverRates


def make_exchange_state(
    own_name: str, members: MembershipTable, outgoing: OutgoingBytes, *, stripe_bytes: int
) -> ExchangeState:
    """Empty tables of a node of this name, in a cluster whose stripes have so many bytes."""
    return ExchangeState(
        own_name,
        members,
        rankings=RankingCache(members, stripe_bytes),
        dependencies=StripeDependencies(),
        traffic=PeerTraffic(),
        outgoing=outgoing,
        breaker=CircuitBreaker(),
        speeds=SpeedComparison(),
        receiver_rates=ReceiverRates(),
    )
