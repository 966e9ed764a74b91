"""Which objects are sealed: whole or not, nobody is to be given their bytes before somebody vouched for all of them.

The store only keeps the outcome, in the object's header, so that it is asked for once per object version and not
once per start. Blocks are still verified by their checksums as ever. A mark made on another anchor's word counts
for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusecache.store import files as fs
from fusecache.store import format
from fusecache.store.files import Layout, ObjectFiles
from fusecache.store.format import Mark, Seal
from fusecache.store.ledger import Ledger
from fusecache.types import ObjectVersion


@dataclass(frozen=True)
class Seals:
    """Everything but what is `exempt` is sealed; `anchor` (8 bytes) names on whose word seals are broken."""

    anchor: bytes
    exempt: Callable[[ObjectVersion], bool]

    def state(self, version: ObjectVersion, files: ObjectFiles | None) -> tuple[bool, bytes | None]:
        """Whether the object is sealed, and the sha256 for which it was put into quarantine."""
        if self.exempt(version):
            return False, None
        seal = Seal() if files is None else files.state.seal
        attested = seal.mark is Mark.ATTESTED and seal.anchor == self.anchor
        return not attested, seal.sha256 if seal.mark is Mark.QUARANTINED else None


def put_into_quarantine(
    layout: Layout, ledger: Ledger, version: ObjectVersion, files: ObjectFiles, seal: Seal
) -> None:
    """In the place of these files put some that have nothing but the mark; unless another process did, or made new
    ones. Who has the old ones open keeps them. Raises OSError."""
    with layout.exclusive() as locked:
        if not locked or not files.at(layout.data_path(version.id)):
            return
        header, overhead = files.header, format.overhead(files.header)
        fs.discard(layout, version.id)
        ledger.evict(files.present_bytes() + overhead)
        ledger.commit(overhead, 0)
        try:
            fs.create(layout, version, header, bytes(16), seal).close()
        except OSError:
            ledger.evict(overhead)
            raise
        finally:
            ledger.marked(overhead)
