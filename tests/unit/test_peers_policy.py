"""The rules of the exchange: whom to ask, whom to send where, whom to leave alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecache.peers.exchange import policy
from fusecache.peers.exchange.breaker import CircuitBreaker, SpeedComparison
from fusecache.peers.member import Member
from fusecache.peers.membership.placement import rank_members
from fusecache.types import ObjectId, ObjectVersion

OBJECT = ObjectId("ab" * 16)


def members(count: int) -> list[Member]:
    return [Member(f"n{number}", f"http://10.0.0.{number}:1", 1 << 40) for number in range(count)]


def names(found: list[Member]) -> list[str]:
    return [member.name for member in found]


def test_the_nodes_ahead_of_us_are_asked_and_no_others() -> None:
    order = members(5)
    asked, passed = policy.select_nodes_to_ask(order, "n2", lambda name: name != "n0", 5)
    assert names(asked) == ["n1"]
    assert passed == ["n0"]
    asked, passed = policy.select_nodes_to_ask(order, "elsewhere", lambda _: True, 5)
    assert names(asked) == ["n0", "n1", "n2"]
    assert policy.select_nodes_to_ask(order, "n0", lambda _: True, 5) == ([], [])


def test_a_stripe_is_ours_when_all_ahead_of_us_failed() -> None:
    order = members(4)
    assert policy.is_acting_owner(order, "n0", ())
    assert not policy.is_acting_owner(order, "n2", ("n0",))
    assert policy.is_acting_owner(order, "n2", ("n1", "n0"))
    assert not policy.is_acting_owner(order, "elsewhere", ("n0", "n1", "n2", "n3"))


def test_who_may_have_it_stored() -> None:
    assert names(policy.likely_holders(members(5), "n0")) == ["n1", "n2"]
    assert names(policy.likely_holders(members(5), "n1")) == ["n0", "n2"]
    assert policy.likely_holders(members(1), "n0") == []


def test_where_a_flight_looks_for_a_stripe() -> None:
    def found(me: str, *failing: str, full: str = "n1 n2 n3 n4") -> list[str]:
        failed: list[str] = []
        seen = []
        for turn in policy.source_steps(
            members(5), me, failed, lambda name: name != "n0", lambda member: member.name in full, 5
        ):
            if turn.member is None:
                seen.append("own" if turn.is_owner else "fallback")
                continue
            seen.append(turn.member.name + ("?" if turn.stored_only else ""))
            if turn.member.name in failing:
                failed.append(turn.member.name)
        assert "n0" in failed or me == "n0"
        return seen

    assert found("n0") == ["n1?", "n2?", "own"]
    assert found("n0", full="n2") == ["n2?", "own"]
    assert found("n2") == ["n1", "n1?", "fallback"]
    assert found("n2", "n1") == ["n1", "fallback"]
    assert found("elsewhere", "n2") == ["n1", "n2", "n1?", "fallback"]


def test_who_may_stand_in_is_who_comes_behind() -> None:
    turns = list(policy.source_steps(members(5), "n3", [], lambda _: True, lambda _: False, 5))
    assert [names(list(turn.substitutes)) for turn in turns] == [["n1", "n2"], ["n2"], [], []]


def test_who_was_sent_on_and_got_nothing_goes_back_for_good() -> None:
    owner, holder, other = members(3)
    asking = policy.RedirectState(owner, owner)
    assert asking.follow_redirect(holder, "me")
    assert (asking.target, asking.no_redirect, asking.hops, asking.is_redirected) == (holder, False, 1, True)
    asking.return_to_member()
    assert (asking.target, asking.no_redirect, asking.hops, asking.is_redirected) == (owner, True, 0, False)
    assert not asking.follow_redirect(other, "me")
    for nowhere in (None, holder):
        asking = policy.RedirectState(owner, owner)
        assert not asking.follow_redirect(nowhere, holder.name)
        assert asking.no_redirect


def test_who_was_sent_on_to_us_brings_us_nothing_to_fetch() -> None:
    order = members(4)
    assert policy.should_fetch(order, "n0", (), 0, 4)
    assert policy.should_fetch(order, "n0", (), 1, 4)
    assert policy.should_fetch(order, "n1", ("n0",), 0, 4)
    assert not policy.should_fetch(order, "n1", ("n0",), 1, 4)
    assert not policy.should_fetch(order, "n1", (), 0, 4)


def test_in_a_large_cluster_few_ask_the_owner() -> None:
    count = 400
    everybody = members(count)
    asked_by: dict[str, list[str]] = {}
    for stripe in range(30):
        order = rank_members(OBJECT, stripe, everybody, policy.ranking_length(count))
        ahead = {member.name: place for place, member in enumerate(order)}
        for member in everybody:
            asked, passed = policy.select_nodes_to_ask(order, member.name, lambda _: True, count)
            assert not passed
            assert (asked == []) == (member is order[0])
            assert all(ahead[other.name] < ahead.get(member.name, count) for other in asked)
            assert all(policy.should_fetch(order, other.name, (), 0, count) for other in asked[:1])
            if member is not order[0]:
                assert order[0] in asked
                asked_by.setdefault(asked[0].name + f"/{stripe}", []).append(member.name)
    assert max(map(len, asked_by.values())) < 3 * 400**0.5
    assert len(asked_by) == 30 * (1 + policy.sub_owner_count(count))


def test_in_a_small_cluster_all_ask_the_owner() -> None:
    for count in (2, policy.MAX_DIRECT_NODES):
        assert policy.sub_owner_count(count) == 0
        order = members(count)
        assert not any(policy.is_sub_owner(order, member.name, count) for member in order)
        assert policy.select_nodes_to_ask(order, "elsewhere", lambda _: True, count)[0][0] is order[0]


def test_a_deputy_that_does_not_answer_is_followed_by_another_then_the_owner() -> None:
    order = members(400)[: policy.ranking_length(400)]
    (first, second, third, *_), _ = policy.select_nodes_to_ask(order, "elsewhere", lambda _: True, 400)
    assert third is order[0]
    asked, passed = policy.select_nodes_to_ask(order, "elsewhere", lambda name: name != first.name, 400)
    assert (asked[:2], passed) == ([second, order[0]], [first.name])
    assert policy.is_sub_owner(order, first.name, 400)
    assert not policy.should_fetch(order, first.name, (), 1, 400)
    assert not policy.should_fetch(order, "elsewhere", (), 0, 400)


def test_budgets_are_shared_by_those_alive() -> None:
    assert [policy.origin_request_limit(16, count) for count in (1, 4, 8, 16, 100)] == [16, 16, 8, 4, 2]
    assert [policy.fallback_request_limit(8, count) for count in (1, 4, 8, 100)] == [8, 2, 1, 1]


def test_a_route_is_none_without_others_and_marks_whose_is_what() -> None:
    version = ObjectVersion("o", "k", "", 100 << 20, 0)
    assert policy.build_route(version, 1 << 20, 4 << 20, members(1), "n0") is None
    route = policy.build_route(version, 1 << 20, 4 << 20, members(4), "n0")
    assert route is not None
    assert route.stripe_blocks == 4
    assert sorted(route.prefetch_order) == list(range(25))
    assert len(route.remote_stripes) == 25
    assert not route.remote_stripes[route.prefetch_order[0]]
    assert not route.is_origin_ordered
    many = members(policy.CONCURRENT_OWNERS + 1)
    for keep in (True, False):
        large = policy.build_route(version, 1 << 20, 4 << 20, many, "n0", stores_remote=keep)
        assert large is not None
        assert large.is_origin_ordered is keep
    outside = policy.build_route(version, 1 << 20, 4 << 20, members(4), "elsewhere")
    assert outside is not None
    assert all(outside.remote_stripes)


@given(st.integers(2, 20), st.integers(0, 10_000))
def test_nobody_depends_on_itself_or_on_who_came_later(count: int, seed: int) -> None:
    chance = random.Random(seed)
    spread = policy.RelayTrees("me")
    others = {f"n{number}" for number in range(count)}
    came: dict[str, int] = {"me": -1}
    for number, asking in enumerate(chance.sample(sorted(others), count)):
        spread.record_unsent(asking, chance.randrange(1 << 24))
        parent = spread.assign_parent((OBJECT, 0), asking, others - {asking}, 1 << 20)
        assert came[parent] < number
        came[asking] = number
        assert spread.assign_parent((OBJECT, 0), asking, others, 1 << 20) == "me"


def test_who_owes_least_gives() -> None:
    spread = policy.RelayTrees("me")
    everybody = {"a", "b", "c"}
    assert spread.assign_parent((OBJECT, 0), "a", everybody, 10) == "me"
    spread.record_unsent("me", 1000)
    spread.record_unsent("a", 0)
    assert spread.assign_parent((OBJECT, 0), "b", everybody, 10) == "a"
    assert spread.assign_parent((OBJECT, 0), "c", everybody - {"a"}, 10) == "b"
    assert spread.assign_parent((OBJECT, 1), "c", everybody, 10, no_redirect=True) == "me"


def test_all_nodes_give_about_as_much_as_they_take() -> None:
    chance = random.Random(3)
    spread = policy.RelayTrees("n0")
    others = [f"n{number}" for number in range(1, 16)]
    given_by: dict[str, int] = {}
    for stripe in range(400):
        for asking in chance.sample(others, len(others)):
            parent = spread.assign_parent((OBJECT, stripe), asking, set(others), 1)
            given_by[parent] = given_by.get(parent, 0) + 1
    assert max(given_by.values()) < 1.3 * 400 * 15 / 16


def test_a_choice_among_thousands_looks_at_few_and_uses_all() -> None:
    class Usable(set[str]):
        looked_at = 0

        def __contains__(self, name: object) -> bool:
            self.looked_at += 1
            return super().__contains__(name)

    spread = policy.RelayTrees("me")
    everybody = Usable(f"n{number}" for number in range(2000))
    given_by: dict[str, int] = {}
    for asking in sorted(everybody):
        spread.record_unsent("me", 1 << 40)
        everybody.looked_at = 0
        parent = spread.assign_parent((OBJECT, 0), asking, everybody, 1)
        assert everybody.looked_at <= policy.RELAYS_COMPARED
        given_by[parent] = given_by.get(parent, 0) + 1
    assert max(given_by.values()) <= policy.FAN_OUT
    assert len(given_by) > 300


def test_a_node_with_a_slow_link_asks_for_less_at_a_time() -> None:
    paces = policy.ReceiverRates()
    assert paces.max_prefetch_flights(1e6, 64) == 64, "nothing is known of the others"
    for pace in [0, *[1000] * (policy.MIN_RATE_SAMPLES - 1)]:
        paces.record_rate("a", pace)
    assert paces.max_prefetch_flights(1.0, 64) == 64, "nor of enough of them"
    paces.record_rate("a", 900)
    assert paces.max_prefetch_flights(None, 64) == 64
    assert paces.max_prefetch_flights(1000.0, 64) == paces.max_prefetch_flights(600.0, 64) == 64
    assert paces.max_prefetch_flights(100.0, 64) == round(6.4 * policy.PREFETCH_HEADROOM)
    assert paces.max_prefetch_flights(1.0, 64) == policy.MIN_PREFETCH_FLIGHTS
    for _ in range(policy.RATE_SAMPLES_KEPT):
        paces.record_rate("a", 100)
    assert paces.max_prefetch_flights(100.0, 64) == 64


def test_a_node_with_a_link_like_the_others_is_loaded_and_not_slow() -> None:
    paces = policy.ReceiverRates()
    paces.record_rate("early", 1000)
    assert not paces.has_normal_link("early"), "nothing is known of what is usual"
    for number in range(policy.MIN_RATE_SAMPLES):
        paces.record_rate(f"node-{number}", 1000)
    paces.record_rate("slow", 1000 // policy.SLOW_LINK_FACTOR)
    assert paces.has_normal_link("early")
    assert not paces.has_normal_link("slow")
    assert not paces.has_normal_link("unknown")
    paces.record_rate("slow", 0)
    assert not paces.has_normal_link("slow"), "it knows no better"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_breaker_rests_tries_once_and_closes() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock)
    assert breaker.begin_trial("a")
    breaker.request_failed("a", "no answer")
    assert not breaker.may_admit("a")
    assert not breaker.begin_trial("a")
    assert breaker.describe_node("a")[0] == "no answer"
    clock.now += 1.3
    assert breaker.may_admit("a")
    assert breaker.may_admit("a"), "the question changes nothing"
    assert breaker.begin_trial("a")
    assert not breaker.may_admit("a")
    assert not breaker.begin_trial("a")
    breaker.request_failed("a", "no answer")
    clock.now += 1.3
    assert not breaker.may_admit("a")
    clock.now += 1.3
    assert breaker.begin_trial("a")
    breaker.request_undecided("a")
    assert breaker.begin_trial("a")
    breaker.request_succeeded("a")
    assert breaker.begin_trial("a")
    assert breaker.begin_trial("a")


def test_who_sends_wrong_bytes_is_avoided_for_long() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock)
    breaker.bad_block_received("a")
    clock.now += 40
    assert not breaker.may_admit("a")
    assert breaker.describe_node("a") == ("sent wrong bytes", 1)


@pytest.mark.parametrize("stored", [True, False])
def test_slow_is_who_is_much_slower_than_the_others_at_the_same(stored: bool) -> None:
    clock = Clock()
    speeds = SpeedComparison(clock)

    def pass_by(seconds: int, **rates: int) -> None:
        for _ in range(seconds):
            clock.now += 1
            for name, rate in rates.items():
                speeds.record_transfer(name, rate, 1.0, stored=stored)

    pass_by(3, a=100, b=10_000, c=12_000)
    assert not speeds.is_slow("a")
    pass_by(4, a=100, b=10_000, c=12_000)
    assert speeds.is_slow("a")
    assert not speeds.is_slow("b")
    pass_by(60, a=100, b=120, c=90)
    assert not speeds.is_slow("a")
