"""The course of a flight through the cluster: each transition, and that it always ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecache.peers.exchange import policy
from fusecache.peers.exchange.breaker import CircuitBreaker, SpeedComparison
from fusecache.peers.exchange.hedger import Hedger
from fusecache.peers.exchange.misses import MissTable
from fusecache.peers.exchange.stripe_request import (
    Abandon,
    Action,
    Ask,
    Continue,
    Done,
    GiveUp,
    Hedge,
    PeerKnowledge,
    ReadOrigin,
    State,
    StripeRequest,
    SwitchTo,
    Wait,
)
from fusecache.peers.member import Member
from fusecache.types import ObjectId

OBJECT = ObjectId("ab" * 16)
MEMBERS = [Member(f"n{number}", f"http://10.0.0.{number}:1", 1 << 40) for number in range(6)]
N0, N1, N2, N3, N4, N5 = MEMBERS


class Cluster:
    """Six nodes as the node `own_name` knows them; a stripe's ranking is n0, n1, ..."""

    def __init__(self, own_name: str = "elsewhere") -> None:
        self.now = 1000.0
        self.is_cancelled = False
        self.is_idle = False
        self.slow: set[str] = set()
        self.own_name = own_name
        self.breaker = CircuitBreaker(self.clock, lambda low, high: 1.0)
        self.misses = MissTable(self.clock)
        speeds = SpeedComparison(self.clock)
        speeds.is_slow = lambda name: name in self.slow  # type: ignore[method-assign]
        self.rates = policy.ReceiverRates()
        self.hedger = Hedger(
            own_name,
            lambda: MEMBERS,
            speeds,
            self.rates,
            lambda: self.is_idle,
            clock=self.clock,
            sample=lambda found, count: list(found[-count:]),
        )

    def clock(self) -> float:
        return self.now

    def request(self, deadline: float = math.inf) -> StripeRequest:
        knowledge = PeerKnowledge(self.own_name, self.breaker, self.hedger, self.misses, self.clock)
        return StripeRequest(
            knowledge, OBJECT, MEMBERS, 6, deadline=deadline, cancelled=lambda: self.is_cancelled
        )


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def poll(request: StripeRequest, silent_seconds: float = 0.0, *, is_alive: bool = True) -> Action:
    return request.polled(silent_seconds, is_alive=is_alive)


def asked(action: Action) -> Ask:
    assert isinstance(action, Ask)
    return action


def test_all_blocks_come_from_the_first_node(cluster: Cluster) -> None:
    request = cluster.request()
    assert request.start() == Ask(N0)
    assert request.answered() == Continue()
    assert request.completed() == Done()
    assert request.state is State.ENDED


def test_nodes_that_give_nothing_are_followed_by_the_next_then_by_holders_then_by_the_origin(
    cluster: Cluster,
) -> None:
    request = cluster.request()
    assert request.start() == Ask(N0)
    assert request.failed("no answer") == Ask(N1, failed_nodes=("n0",))
    assert not cluster.breaker.may_admit("n0")
    assert request.missed() == Ask(N2, failed_nodes=("n0", "n1"))
    assert cluster.breaker.may_admit("n1")
    assert request.answered() == Continue()
    assert request.failed("broke off") == ReadOrigin(is_owner=False)
    assert request.state is State.RECEIVING_ORIGIN


def test_an_owner_asks_who_has_it_stored_and_remembers_who_has_not() -> None:
    cluster = Cluster("n0")
    request = cluster.request()
    assert request.start() == Ask(N1, stored_only=True)
    assert request.missed() == Ask(N2, stored_only=True)
    assert request.missed() == ReadOrigin(is_owner=True)
    assert cluster.request().start() == ReadOrigin(is_owner=True)
    cluster.now += policy.NOT_STORED_TTL + 1
    assert cluster.request().start() == Ask(N1, stored_only=True)


def test_a_busy_node_is_asked_again(cluster: Cluster) -> None:
    request = cluster.request()
    request.start()
    assert request.busy(2.0) == Wait(2.0)
    assert request.state is State.WAITING
    assert request.waited() == Ask(N0)
    assert request.busy(0.0) == Wait(policy.MIN_RETRY_WAIT)


def test_a_redirect_is_followed_and_leads_back_if_nothing_comes_of_it(cluster: Cluster) -> None:
    request = cluster.request()
    request.start()
    assert request.redirected(N4) == Ask(N4, hops=1)
    assert not request.counts_against_sender
    assert request.failed("broke off") == Ask(N0, no_redirect=True)
    assert cluster.breaker.may_admit("n4"), "it passed on what it got itself"
    assert request.counts_against_sender
    assert request.redirected(N4) == Ask(N1, failed_nodes=("n0",)), "it was told not to"


@pytest.mark.parametrize("target", [None, Member("elsewhere", "http://e:1", 1)])
def test_a_redirect_to_nobody_or_to_ourselves_is_refused(cluster: Cluster, target: Member | None) -> None:
    request = cluster.request()
    request.start()
    assert request.redirected(target) == Ask(N0, no_redirect=True)


def test_nobody_is_sent_on_for_ever(cluster: Cluster) -> None:
    request = cluster.request()
    request.start()
    for hops in range(1, policy.MAX_REDIRECTS + 1):
        assert request.redirected(N4 if hops % 2 else N5) == Ask(N4 if hops % 2 else N5, hops=hops)
    assert request.redirected(N4) == Ask(N0, no_redirect=True)


def test_a_connection_that_is_lost_is_tried_once_more(cluster: Cluster) -> None:
    request = cluster.request()
    request.start()
    assert request.connect_timed_out("no connection", is_alive=True) == Ask(N0, is_reconnect=True)
    assert request.connect_timed_out("no connection", is_alive=True) == Ask(N1, failed_nodes=("n0",))
    assert not cluster.breaker.may_admit("n0")
    assert request.connect_timed_out("no connection", is_alive=False) == Ask(N2, failed_nodes=("n0", "n1"))


def test_a_node_that_sends_wrong_bytes_is_avoided_for_long(cluster: Cluster) -> None:
    request = cluster.request()
    request.start()
    request.answered()
    assert request.sent_bad_block() == Ask(N1, failed_nodes=("n0",))
    cluster.now += 50
    assert not cluster.breaker.may_admit("n0")
    assert cluster.breaker.describe_node("n0") == ("sent wrong bytes", 1)


def test_a_node_that_is_dead_or_silent_is_abandoned(cluster: Cluster) -> None:
    request = cluster.request()
    request.start()
    assert poll(request) == Continue()
    assert poll(request, is_alive=False) == Abandon("the node is not alive")
    assert poll(request, policy.MAX_SILENCE + 1) == Abandon(f"nothing came for {policy.MAX_SILENCE:g} s")
    assert asked(request.failed("abandoned")).member is N1


def test_a_slow_node_is_hedged_with_holders_then_replaced(cluster: Cluster) -> None:
    request = cluster.request()
    request.start()
    request.answered()
    cluster.slow = {"n0"}
    assert poll(request) == Continue(), "it has just been asked"
    cluster.now += policy.HEDGE_EVERY
    first = Ask(N4, stored_only=True, no_redirect=True)
    assert poll(request) == Hedge(first)
    assert poll(request) == Continue()
    assert poll(request, is_alive=False) == Abandon("the node is not alive")
    assert request.hedge_failed() == Hedge(Ask(N5, stored_only=True, no_redirect=True))
    assert request.hedge_failed() == Continue()
    assert request.state is State.RECEIVING
    cluster.now += policy.SUBSTITUTE_AFTER
    assert poll(request) == Hedge(first)
    request.hedge_failed()
    assert request.hedge_failed() == Hedge(Ask(N1, no_redirect=True, failed_nodes=("n0",)))
    assert request.hedge_answered() == SwitchTo(N1, is_substitute=True)
    assert not cluster.breaker.may_admit("n0"), "it is slow"
    cluster.slow = {"n0", "n1"}
    cluster.now += 10 * policy.HEDGE_EVERY
    assert poll(request) == Continue(), "nobody is hedged twice"
    assert request.completed() == Done()


def test_a_holder_that_answers_goes_on_and_fails_on_its_own_account(cluster: Cluster) -> None:
    request = cluster.request()
    request.start()
    cluster.is_idle = True
    cluster.now += policy.HEDGE_EVERY
    assert isinstance(poll(request), Hedge)
    assert request.hedge_answered() == SwitchTo(N4, is_substitute=False)
    assert cluster.breaker.may_admit("n0")
    assert request.counts_against_sender
    assert request.failed("broke off") == Ask(N1, failed_nodes=("n0",))
    assert not cluster.breaker.may_admit("n4")
    assert cluster.breaker.may_admit("n0")


def test_a_node_with_a_link_like_the_others_is_given_more_time(cluster: Cluster) -> None:
    for number in range(policy.MIN_RATE_SAMPLES):
        cluster.rates.record_rate(f"n{number}", 1000)
    cluster.slow = {"n0"}
    request = cluster.request()
    request.start()
    for seconds, members in (
        (policy.SUBSTITUTE_AFTER, [N4, N5]),
        (policy.SUBSTITUTE_LOADED_AFTER, [N4, N5, N1, N2]),
    ):
        cluster.now += seconds + 1
        action, hedged = poll(request), []
        while isinstance(action, Hedge):
            hedged.append(action.ask.member)
            action = request.hedge_failed()
        assert hedged == members


def test_all_flights_together_search_twice_a_second(cluster: Cluster) -> None:
    cluster.is_idle = True
    requests = [cluster.request() for _ in range(3)]
    for request in requests:
        request.start()
    cluster.now += policy.HEDGE_EVERY
    assert [type(poll(request)) for request in requests] == [Hedge, Continue, Continue]
    cluster.now += policy.HEDGE_EVERY
    assert isinstance(poll(requests[1]), Hedge)


def test_a_node_that_has_nothing_stored_is_not_hedged() -> None:
    cluster = Cluster("n0")
    cluster.is_idle = True
    request = cluster.request()
    request.start()
    cluster.now += 10.0
    assert poll(request) == Continue()


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_flight_that_is_over_is_given_up(is_cancelled: bool) -> None:
    steps: list[Callable[[StripeRequest], Action]] = [
        lambda request: request.failed("no answer"),
        lambda request: poll(request),
        lambda request: request.redirected(N4),
    ]
    for step in steps:
        cluster = Cluster()
        request = cluster.request(deadline=cluster.now + 5)
        request.start()
        cluster.is_cancelled = is_cancelled
        cluster.now += 0 if is_cancelled else 5
        assert step(request) == GiveUp(is_cancelled)
        assert request.state is State.ENDED


def test_a_trial_that_another_request_began_is_not_begun_twice(cluster: Cluster) -> None:
    cluster.breaker.request_failed("n0", "no answer")
    assert cluster.request().start() == Ask(N1, failed_nodes=("n0",))
    cluster.now += 10
    assert cluster.request().start() == Ask(N0)
    assert cluster.request().start() == Ask(N1, failed_nodes=("n0",))


def test_an_event_that_can_not_be_is_an_error(cluster: Cluster) -> None:
    request = cluster.request()
    for event in (request.answered, request.waited, request.completed, request.hedge_failed):
        with pytest.raises(RuntimeError, match="NEW"):
            event()
    request.start()
    with pytest.raises(RuntimeError, match="ASKING"):
        request.completed()


EVENTS: dict[State, Sequence[str]] = {
    State.ASKING: ("answered", "busy", "redirected", "missed", "timeout", "failed", "polled"),
    State.RECEIVING: ("polled", "failed", "bad", "completed"),
    State.WAITING: ("waited",),
    State.HEDGING: ("polled", "hedge_answered", "hedge_failed"),
}


def report(request: StripeRequest, event: str, draw: Any) -> Action:
    match event:
        case "busy":
            return request.busy(draw(st.floats(0, 5)))
        case "redirected":
            return request.redirected(draw(st.sampled_from([None, *MEMBERS])))
        case "timeout":
            return request.connect_timed_out("no connection", is_alive=draw(st.booleans()))
        case "failed":
            return request.failed("no answer")
        case "bad":
            return request.sent_bad_block()
        case "polled":
            return poll(request, draw(st.sampled_from([0.0, 99.0])), is_alive=draw(st.booleans()))
    found: Action = getattr(request, event)()
    return found


@settings(deadline=None)
@given(st.data())
def test_whatever_happens_it_ends(data: st.DataObject) -> None:
    """After some dozens of answers, or at the deadline: with the origin, unless everything has arrived."""
    cluster = Cluster(data.draw(st.sampled_from(["elsewhere", "n0", "n2"])))
    cluster.slow = set(data.draw(st.lists(st.sampled_from(["n0", "n1", "n2", "n3"]))))
    cluster.is_idle = data.draw(st.booleans())
    request = cluster.request(deadline=cluster.now + 20)
    action, answers = request.start(), 0
    while request.state not in (State.ENDED, State.RECEIVING_ORIGIN):
        if isinstance(action, Wait):
            cluster.now += action.seconds
        event = data.draw(st.sampled_from(EVENTS[request.state]))
        if event == "polled":
            cluster.now += data.draw(st.floats(0.5, 9))
        else:
            answers += 1
        action = report(request, event, data.draw)
        if isinstance(action, Ask):
            assert action.member.name != cluster.own_name
            assert action.hops <= policy.MAX_REDIRECTS
        assert answers < 1000
    assert isinstance(action, Done | GiveUp | ReadOrigin)
    assert isinstance(action, ReadOrigin) == (request.state is State.RECEIVING_ORIGIN)
