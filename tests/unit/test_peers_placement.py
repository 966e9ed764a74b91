"""Which node has which stripe."""

from __future__ import annotations

import math
import statistics

import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecache.peers.member import Member
from fusecache.peers.membership.placement import fetch_order, find_stripe_owners, rank_members, stripe_count
from fusecache.types import ObjectId

OBJECT = ObjectId("0123456789abcdef" * 2)


def cluster(count: int, weight: int = 1 << 40) -> list[Member]:
    return [Member(f"node-{number}", f"http://10.0.0.{number}:7070", weight) for number in range(count)]


def test_each_node_has_its_share() -> None:
    found = find_stripe_owners(OBJECT, 20_000, cluster(10))
    shares = [found.count(number) for number in range(10)]
    assert min(shares) > 1800
    assert max(shares) < 2200


def test_shares_are_by_weight() -> None:
    members = [Member("small", "http://a:1", 1 << 30), Member("large", "http://b:1", 3 << 30)]
    found = find_stripe_owners(OBJECT, 20_000, members)
    assert 0.73 < found.count(1) / 20_000 < 0.77


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 11))
def test_who_leaves_gives_away_its_own_stripes_only(count: int, leaver: int) -> None:
    members = cluster(count)
    leaver %= count
    left = [member for member in members if member is not members[leaver]]
    before = [members[at].name for at in find_stripe_owners(OBJECT, 400, members)]
    after = [left[at].name for at in find_stripe_owners(OBJECT, 400, left)]
    gone = members[leaver].name
    assert all(was == now for was, now in zip(before, after, strict=True) if was != gone)
    assert gone not in after


def test_what_a_leaver_had_goes_to_all_the_others() -> None:
    members = cluster(8)
    before = find_stripe_owners(OBJECT, 8000, members)
    after = find_stripe_owners(OBJECT, 8000, members[:-1])
    heirs = [after[stripe] for stripe, owner in enumerate(before) if owner == 7]
    assert statistics.pstdev(heirs.count(at) for at in range(7)) < 30


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 500))
def test_the_ranking_begins_with_the_owner_and_loses_no_order_without_it(count: int, stripe: int) -> None:
    members = cluster(count)
    order = rank_members(OBJECT, stripe, members)
    assert sorted(order) == sorted(members)
    assert members[find_stripe_owners(OBJECT, stripe + 1, members)[stripe]] == order[0]
    assert rank_members(OBJECT, stripe, order[1:]) == order[1:]
    assert rank_members(OBJECT, stripe, members, limit=2) == order[:2]


def score(member: Member, stripe: int) -> float:
    """As the formula says."""
    seed = xxhash.xxh3_64_intdigest(member.name.encode())
    digest = xxhash.xxh3_64_intdigest(f"{OBJECT}/{stripe}".encode(), seed)
    return -member.weight / math.log(((digest >> 12) + 0.5) / 2.0**52)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=40), st.integers(0, 1000), st.integers(1, 50))
def test_the_short_cuts_lead_to_what_the_formula_says(weights: list[int], stripe: int, limit: int) -> None:
    members = [Member(f"n{at}", f"http://n{at}:1", weight << 40) for at, weight in enumerate(weights)]
    expected = sorted(members, key=lambda member: score(member, stripe), reverse=True)
    assert rank_members(OBJECT, stripe, members) == expected
    assert rank_members(OBJECT, stripe, members, limit) == expected[:limit]
    assert members[find_stripe_owners(OBJECT, stripe + 1, members)[stripe]] == expected[0]


def test_all_nodes_agree_whatever_the_order_they_know_the_others_in() -> None:
    members = cluster(9)
    assert all(
        rank_members(OBJECT, stripe, members) == rank_members(OBJECT, stripe, members[::-1])
        for stripe in range(50)
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=60), st.one_of(st.none(), st.integers(0, 6)))
def test_a_node_fetches_every_stripe_once_its_own_first(owned_by: list[int], me: int | None) -> None:
    order = fetch_order(owned_by, 7, me)
    assert sorted(order) == list(range(len(owned_by)))
    if me is not None and me in owned_by:
        assert owned_by[order[0]] == me
    for owner in range(7):
        mine = [stripe for stripe in order if owned_by[stripe] == owner]
        assert mine == sorted(mine)


def test_nodes_begin_at_different_owners() -> None:
    owned_by = find_stripe_owners(OBJECT, 800, cluster(8))
    second = {owned_by[fetch_order(owned_by, 8, me)[1]] for me in range(8)}
    assert len(second) == 8


def test_many_owners_are_fetched_from_in_groups_that_are_the_same_for_all() -> None:
    owned_by = find_stripe_owners(OBJECT, 900, cluster(90))
    orders = [fetch_order(owned_by, 90, me, 32) for me in range(90)]
    first = {frozenset(owned_by[stripe] // 30 for stripe in order[:20]) for order in orders}
    assert first == {frozenset([0])}
    assert len({order[0] for order in orders}) == 30
    assert all(sorted(order) == list(range(900)) for order in orders)
    # in a cluster of one group nothing changes
    few = find_stripe_owners(OBJECT, 300, cluster(30))
    assert fetch_order(few, 30, 7, 32) == fetch_order(few, 30, 7)


def test_the_number_of_stripes() -> None:
    assert [stripe_count(size, 10) for size in (0, 1, 10, 11)] == [0, 1, 1, 2]
