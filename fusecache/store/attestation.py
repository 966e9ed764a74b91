"""Which objects are unattested: nobody is given their bytes, complete or not, before the inspector has vouched for all
of them.

The store only keeps the outcome, in the object's header, so that an object version is inspected once and not once per
start. Blocks are verified by their checksums all the same. Pure: the file work is in disk/files.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusecache.store.disk.format import AttestationRecord, AttestationState
from fusecache.types import ObjectVersion


@dataclass(frozen=True)
class AttestationPolicy:
    """Every object has to be attested but those that `is_exempt` names. `anchor` (8 bytes) stands for the keys that are
    believed: what was attested by another anchor counts for nothing."""

    anchor: bytes
    is_exempt: Callable[[ObjectVersion], bool]

    def judge(self, version: ObjectVersion, record: AttestationRecord) -> tuple[bool, bytes | None]:
        """The meaning of the record in an object's header: whether it is unattested, and the sha256 for which it
        is in quarantine, if it is."""
        if self.is_exempt(version):
            return False, None
        is_attested = record.state is AttestationState.ATTESTED and record.anchor == self.anchor
        return not is_attested, record.sha256 if record.state is AttestationState.QUARANTINED else None
