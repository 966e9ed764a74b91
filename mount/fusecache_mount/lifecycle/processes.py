"""Which process a thread belongs to: a READ names the thread that asks."""

from __future__ import annotations

_MAX_THREADS = 4096


class ProcessLookup:
    """Looks each thread up once. Thread-safe: single dict operations. A number that the kernel gives to another thread
    later on is taken for the old one, which costs no more than a rank that is told wrongly."""

    def __init__(self) -> None:
        self._process_ids: dict[int, int] = {}

    def process_id_of(self, tid: int) -> int:
        """The process of this thread; the thread itself, if it is gone, or in a namespace that can't be seen."""
        found = self._process_ids.get(tid)
        if found is None:
            if len(self._process_ids) >= _MAX_THREADS:
                self._process_ids.clear()
            found = self._process_ids[tid] = _read_tgid(tid)
        return found


def _read_tgid(tid: int) -> int:
    try:
        with open(f"/proc/{tid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Tgid:"):
                    return int(line[5:])
    except (OSError, ValueError):
        pass
    return tid
