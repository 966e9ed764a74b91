"""S3-FIFO: who goes first."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from fusecache.store.eviction import S3Fifo
from fusecache.types import ObjectId


def oid(text: object) -> ObjectId:
    return ObjectId(str(text))


class Cache:
    """The policy at work on a cache of `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.policy = S3Fifo()
        self.sizes: dict[ObjectId, int] = {}

    def read(self, name: object, size: int = 1) -> bool:
        object_id = oid(name)
        if object_id in self.sizes:
            self.policy.count_use(object_id)
            return True
        need = sum(self.sizes.values()) + size - self.capacity
        if need > 0:
            for victim in self.policy.victims(lambda _: True):
                need -= self.sizes.pop(victim)
                self.policy.remove(victim, was_evicted=True)
                if need <= 0:
                    break
        self.sizes[object_id] = size
        self.policy.add(object_id, size)
        return False


def test_a_scan_leaves_what_is_used_alone() -> None:
    cache = Cache(100)
    for _ in range(3):
        for hot in range(80):
            cache.read(f"hot{hot}")
    for cold in range(1000):
        cache.read(f"cold{cold}")
    assert all(oid(f"hot{hot}") in cache.sizes for hot in range(80))
    # a plain LRU or FIFO would hold nothing but the scan now


def test_a_scan_of_one_large_object_at_a_time_is_weighted_by_bytes() -> None:
    cache = Cache(100)
    for _ in range(2):
        for hot in range(8):
            cache.read(f"hot{hot}", 10)
    for cold in range(50):
        cache.read(f"cold{cold}", 10)
    assert sum(oid(f"hot{hot}") in cache.sizes for hot in range(8)) == 8


def test_an_object_that_comes_back_soon_is_kept() -> None:
    cache = Cache(10)
    for first in range(10):
        cache.read(first)
    cache.read("new")  # evicts 0
    assert oid(0) not in cache.sizes
    cache.read(0)
    assert cache.policy.is_in_main(oid(0))


def test_the_first_in_goes_first_without_further_use() -> None:
    policy = S3Fifo()
    for i in range(5):
        policy.add(oid(i), 1)
    assert list(policy.victims(lambda _: True)) == [oid(i) for i in range(5)]


def test_uses_in_main_buy_rounds() -> None:
    policy = S3Fifo()
    for name in ("a", "b", "c"):
        policy.add(oid(name), 1, is_in_main=True)
    policy.count_use(oid("a"))
    policy.count_use(oid("b"))
    policy.count_use(oid("b"))
    assert [str(x) for x in policy.victims(lambda _: True)] == ["c", "a", "b"]


def test_what_is_not_evictable_is_not_offered_and_keeps_its_uses() -> None:
    policy = S3Fifo()
    policy.add(oid("pinned"), 5)
    policy.count_use(oid("pinned"))
    policy.add(oid("other"), 5)
    assert list(policy.victims(lambda x: x != "pinned")) == [oid("other")]
    assert policy.use_count(oid("pinned")) == 1


def test_removal_during_the_walk_is_seen() -> None:
    policy = S3Fifo()
    for i in range(4):
        policy.add(oid(i), 1)
    walk = policy.victims(lambda _: True)
    assert next(walk) == oid(0)
    policy.remove(oid(1))
    assert next(walk) == oid(2)


def test_the_ghost_queue_is_bounded_by_the_bytes_stored() -> None:
    cache = Cache(10)
    for i in range(1000):
        cache.read(i)
    assert sum(size for _, size in cache.policy.ghosts()) <= 10


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "use", "resize", "remove", "evict"]), st.integers(0, 12)),
        max_size=80,
    ),
    st.randoms(use_true_random=False),
)
def test_a_walk_offers_each_object_once_whatever_happened_before(
    steps: list[tuple[str, int]], rng: random.Random
) -> None:
    policy = S3Fifo()
    model: dict[ObjectId, int] = {}
    for step, number in steps:
        object_id, size = oid(number), rng.randrange(100)
        if step == "add":
            policy.add(object_id, size, uses=rng.randrange(5), is_in_main=rng.random() < 0.3)
            model[object_id] = size
        elif step == "resize":
            policy.resize(object_id, size)
            model = {key: size if key == object_id else old for key, old in model.items()}
        elif step == "use":
            policy.count_use(object_id)
        else:
            policy.remove(object_id, was_evicted=step == "evict")
            model.pop(object_id, None)
    assert set(policy.eviction_order()) == set(model)
    assert policy._small_bytes + policy._main_bytes == sum(model.values())
    offered = list(policy.victims(lambda _: True))
    assert sorted(offered) == sorted(model)


def test_a_walk_looks_at_no_more_than_it_needs() -> None:
    policy = S3Fifo()
    for name in range(10_000):
        policy.add(oid(name), 1)
    asked = []
    walk = policy.victims(lambda name: not asked.append(name))
    first = [next(walk) for _ in range(3)]
    assert first == [oid(0), oid(1), oid(2)]
    assert len(asked) < 20


def test_what_becomes_used_during_a_walk_stays() -> None:
    policy = S3Fifo()
    for name in range(4):
        policy.add(oid(name), 1)
    used: set[ObjectId] = set()
    walk = policy.victims(lambda name: name not in used)
    assert next(walk) == oid(0)
    policy.remove(oid(0))
    used.add(oid(1))
    assert next(walk) == oid(2)
