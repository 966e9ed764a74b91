"""A dictionary that forgets its oldest entries. Standard library only."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedDict(MutableMapping[K, V], Generic[K, V]):
    """Keeps at most `maximum` entries, or with `weigh` so many entries that the sum of `weigh(value)` is at most
    `maximum`. Iteration goes from the entry that was assigned the longest time ago to the one assigned last; reading
    moves nothing. Not thread-safe.

    | What happens | Entry |
    |---|---|
    | its key is assigned, for the first time or again | is the newest |
    | another assignment makes the sum exceed `maximum` | is dropped if it is the oldest, until the sum fits |
    | `max_age` seconds have passed since it was assigned | is absent |

    The newest entry always stays, also when it alone weighs more than `maximum`. The weight of a value must not change
    while it is in here.
    """

    def __init__(
        self,
        maximum: int,
        *,
        weigh: Callable[[V], int] | None = None,
        max_age: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._maximum = maximum
        self._weigh = weigh
        self._max_age = max_age
        self._clock = clock
        self._weight = 0
        """Counted only when there is a `weigh`."""
        self._values: OrderedDict[K, V] = OrderedDict()
        self._expires_at: dict[object, float] = {}
        """Filled only when there is a `max_age`."""

    @property
    def weight(self) -> int:
        """The sum of the weights; without `weigh` the number of entries."""
        self._drop_expired()
        return self._present_weight()

    def set_maximum(self, maximum: int) -> None:
        """From now on keep so much; drops the oldest entries beyond it at once."""
        self._maximum = maximum
        self._trim()

    def __setitem__(self, key: K, value: V) -> None:
        if self._weigh is not None:
            if key in self._values:
                self._weight -= self._weigh(self._values[key])
            self._weight += self._weigh(value)
        self._values[key] = value
        self._values.move_to_end(key)
        if self._max_age is not None:
            self._expires_at[key] = self._clock() + self._max_age
        self._trim()

    def __getitem__(self, key: K) -> V:
        if self._is_expired(key):
            raise KeyError(key)
        return self._values[key]

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        self._remove(key)

    def __contains__(self, key: object) -> bool:
        return key in self._values and not self._is_expired(key)

    def __iter__(self) -> Iterator[K]:
        self._drop_expired()
        return iter(self._values)

    def __len__(self) -> int:
        self._drop_expired()
        return len(self._values)

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()
        self._expires_at.clear()
        self._weight = 0

    def _present_weight(self) -> int:
        return len(self._values) if self._weigh is None else self._weight

    def _is_expired(self, key: object) -> bool:
        if self._max_age is None:
            return False
        return self._expires_at.get(key, float("inf")) <= self._clock()

    def _remove(self, key: K) -> None:
        value = self._values.pop(key)
        if self._weigh is not None:
            self._weight -= self._weigh(value)
        self._expires_at.pop(key, None)

    def _trim(self) -> None:
        self._drop_expired()
        while self._present_weight() > self._maximum and len(self._values) > 1:
            self._remove(next(iter(self._values)))

    def _drop_expired(self) -> None:
        if self._max_age is None:
            return
        now = self._clock()
        while self._values:
            oldest = next(iter(self._values))
            if self._expires_at[oldest] > now:
                return
            self._remove(oldest)
