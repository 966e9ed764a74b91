"""Lists of what does not yet hold: they only become shorter."""

from __future__ import annotations

from collections.abc import Collection, Mapping

STALE_ENTRIES_FAIL = False
"""Whether an entry that no longer holds fails its test, so that the list is shortened at once."""


def assert_only_known(found: Collection[str], known: Collection[str], rule: str) -> None:
    """Fails for each violation of `rule` that is not `known`, and for each known one that is no more."""
    fresh = sorted(set(found) - set(known))
    assert not fresh, f"{rule}:\n" + "\n".join(fresh)
    gone = sorted(set(known) - set(found))
    assert not (STALE_ENTRIES_FAIL and gone), "no longer so; take these out of the list:\n" + "\n".join(gone)


def assert_counts_known(found: Mapping[str, int], known: Mapping[str, int], rule: str) -> None:
    """The same for counts of violations per name: none may be higher, and none lower, than its entry."""
    fresh = [
        f"{name}: {count}, not {known.get(name, 0)}"
        for name, count in found.items()
        if count > known.get(name, 0)
    ]
    assert not fresh, f"{rule}:\n" + "\n".join(sorted(fresh))
    gone = [
        f"{name}: {found.get(name, 0)}, not {count}"
        for name, count in known.items()
        if found.get(name, 0) < count
    ]
    assert not (STALE_ENTRIES_FAIL and gone), "fewer by now; correct the list:\n" + "\n".join(sorted(gone))
