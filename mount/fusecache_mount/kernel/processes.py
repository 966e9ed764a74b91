"""Which process a thread belongs to: a request names the thread that asks. The standard library only."""

from __future__ import annotations

_MAX_THREADS = 4096


def read_tgid(tid: int) -> int:
    """The process of this thread, from /proc. Raises OSError for a thread that is gone, or that lives in a pid
    namespace that this process can't see, and ValueError for a status without a process."""
    with open(f"/proc/{tid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"Tgid:"):
                return int(line[5:])
    raise ValueError(tid)


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
            try:
                found = read_tgid(tid)
            except (OSError, ValueError):
                found = tid
            self._process_ids[tid] = found
        return found
