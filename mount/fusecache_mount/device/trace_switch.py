"""Whether somebody traces the mount, and what is told of its requests meanwhile."""

from __future__ import annotations

from typing import Protocol


class RequestObserver(Protocol):
    """Is told of every request and of every answer, in the channel's threads: it never waits, and never raises."""

    def request_received(self, header: tuple[int, ...], request: memoryview) -> None:
        """A request was read from the device: the fields of its fuse_in_header, and all of it. `request` is valid
        during the call only."""

    def request_answered(self, unique: int, status: int, reply: bytes | bytearray = b"") -> None:
        """A request was answered; `status` is 0 or an errno (of either sign). `reply` is the whole reply where somebody
        may want to look into it."""


class TraceSwitch:
    """On or off; while it is on, `observer` is told of every request, new opens are served by the daemon, which sees
    their reads, and the kernel is given no names and pages to keep.

    | From | By | To |
    |---|---|---|
    | off (`observer` is None) | `turn_on(observer)` | on |
    | on | `turn_off()` | off |

    Thread-safe without a lock: the state is one reference. A thread that works with `observer` looks at it once per
    request, and may tell an observer of one more request after it was turned off.
    """

    def __init__(self) -> None:
        self.observer: RequestObserver | None = None

    @property
    def is_on(self) -> bool:
        """Whether somebody traces."""
        return self.observer is not None

    def turn_on(self, observer: RequestObserver) -> None:
        """Tell `observer` of the requests from now on."""
        self.observer = observer

    def turn_off(self) -> None:
        """Tell nobody, and serve as before."""
        self.observer = None
