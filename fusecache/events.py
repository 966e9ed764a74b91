"""The event hub of a node: a part that is built later hears of an earlier one without being assigned to it.

A node's EventHub is built before everything else. `publish` runs in the thread of the part that tells, so:

- a part publishes while it holds no lock;
- a subscriber only takes note (it enqueues a job, sets a flag or an event) and never waits;
- a subscriber that raises is logged, and the others are still told.

Subscriptions are made while the node is built and last as long as the hub: there is no way to end one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, ParamSpec

from fusecache.types import NodeId, ObjectVersion

P = ParamSpec("P")

ChangedNames = Sequence[tuple[NodeId, bytes]]
"""Names whose entry changed or went away: (nodeid of the folder, name)."""

_log = logging.getLogger(__name__)


class Event(Generic[P]):
    """One kind of thing that happens, and the callbacks of the parts that want to know. Safe to use from any thread;
    `_lock` guards the tuple of subscribers, which `publish` reads without it, because a tuple never changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: tuple[Callable[P, object], ...] = ()

    def subscribe(self, callback: Callable[P, object]) -> None:
        """Have `callback` called at every `publish` from now on, in the order of subscription."""
        with self._lock:
            self._subscribers = (*self._subscribers, callback)

    def publish(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call every subscriber in this thread. Raises nothing; the caller holds no lock."""
        for callback in self._subscribers:
            try:
                callback(*args, **kwargs)
            except Exception:
                _log.exception("a subscriber failed")


@dataclass(frozen=True)
class EventHub:
    """The events of one node."""

    object_completed: Event[[ObjectVersion]] = field(default_factory=Event)
    """All blocks of an object are in the store and, with verify=manifest, attested: it may be read by the kernel."""
    object_gone: Event[[ObjectVersion]] = field(default_factory=Event)
    """The origin does not have this version any more."""
    names_changed: Event[[ChangedNames]] = field(default_factory=Event)
    """A listing differs from the one before."""
    members_changed: Event[[]] = field(default_factory=Event)
    """A node joined, left, or changed its state."""
