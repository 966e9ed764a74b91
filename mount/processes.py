"""Which process a thread belongs to: a READ names the thread that asks."""

from __future__ import annotations

_KNOWN = 4096


class Processes:
    """Looks each thread up once. Thread-safe: single dict operations. A number that the kernel gives to another thread
    later on is taken for the old one, which costs no more than a rank that is told wrongly."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}

    def of(self, thread: int) -> int:
        """The process of this thread; the thread itself, if it is gone, or in a namespace that can't be seen."""
        found = self._of.get(thread)
        if found is None:
            if len(self._of) >= _KNOWN:
                self._of.clear()
            found = self._of[thread] = _look_up(thread)
        return found


def _look_up(thread: int) -> int:
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Tgid:"):
                    return int(line[5:])
    except (OSError, ValueError):
        pass
    return thread
