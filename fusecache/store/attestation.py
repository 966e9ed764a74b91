"""Which objects are sealed: whole or not, nobody is to be given their bytes before somebody vouched for all of them.

The store only keeps the outcome, in the object's header, so that it is asked for once per object version and not
once per start. Blocks are still verified by their checksums as ever. A mark made on another anchor's word counts
for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusecache.store.disk import files as fs
from fusecache.store.disk import format
from fusecache.store.disk.files import CacheDirectory, ObjectFiles
from fusecache.store.disk.format import AttestationRecord, AttestationState
from fusecache.store.disk.ledger import Ledger
from fusecache.types import ObjectVersion


@dataclass(frozen=True)
class AttestationPolicy:
    """Everything but what is `exempt` is sealed; `anchor` (8 bytes) names on whose word seals are broken."""

    anchor: bytes
    is_exempt: Callable[[ObjectVersion], bool]

    def read_attestation(
        self, version: ObjectVersion, files: ObjectFiles | None
    ) -> tuple[bool, bytes | None]:
        """Whether the object is sealed, and the sha256 for which it was put into quarantine."""
        if self.is_exempt(version):
            return False, None
        seal = AttestationRecord() if files is None else files.state.attestation
        attested = seal.state is AttestationState.ATTESTED and seal.anchor == self.anchor
        return not attested, seal.sha256 if seal.state is AttestationState.QUARANTINED else None


def quarantine_files(
    cache_directory: CacheDirectory,
    ledger: Ledger,
    version: ObjectVersion,
    files: ObjectFiles,
    attestation: AttestationRecord,
) -> None:
    """In the place of these files put some that have nothing but the mark; unless another process did, or made new
    ones. Who has the old ones open keeps them. Raises OSError."""
    with cache_directory.exclusive_lock() as locked:
        if not locked or not files.is_at(cache_directory.data_path(version.id)):
            return
        header, overhead = files.header, format.file_overhead(files.header)
        fs.unlink_object(cache_directory, version.id)
        ledger.count_evicted(files.present_bytes() + overhead)
        ledger.count_committed(overhead, 0)
        try:
            fs.create_object_files(cache_directory, version, header, bytes(16), attestation).close()
        except OSError:
            ledger.count_evicted(overhead)
            raise
        finally:
            ledger.clear_pending(overhead)
