"""Whether the bytes of one open object version may be given to anybody, as a whole."""

from __future__ import annotations

from fusecache.store.block_map import BlockMap
from fusecache.store.context import StoreContext
from fusecache.store.disk import files as fs
from fusecache.store.disk.format import AttestationRecord, AttestationState
from fusecache.store.files_holder import FilesHolder
from fusecache.store.records import record_from_summary
from fusecache.types import ObjectVersion


class ObjectAttestation:
    """The knowledge of one object version as a whole.

    | State | is_unattested | quarantine_sha256 | How it gets there |
    |---|---|---|---|
    | exempt | False | None | the store has no policy, or the policy exempts the version: for ever |
    | unattested | True | None | first state otherwise; a block was found bad; `lift_quarantine` |
    | attested | False | None | `mark_attested`; or the header says so, by the policy's anchor |
    | quarantined | True | the sha256 | `enter_quarantine`; or the header says so |

    Questions take no lock. The lock of the object (FilesHolder) guards the changes.
    """

    def __init__(
        self, version: ObjectVersion, context: StoreContext, *, blocks: BlockMap, holder: FilesHolder
    ) -> None:
        self._version = version
        self._context = context
        self._policy = context.attestation_policy
        self._blocks = blocks
        self._holder = holder
        self._lock = holder.lock
        self.is_unattested = self._policy is not None and not self._policy.is_exempt(version)
        """Nobody may be given its bytes yet. A plain attribute, since it is read for each READ."""
        self.quarantine_sha256: bytes | None = None
        """The sha256 that the whole object was found to have, against its manifest; None: not in quarantine."""

    def adopt_locked(self) -> None:
        """The files were opened or made: what their header says counts from now on."""
        self._lock.assert_held()
        files = self._holder.files
        if self._policy is not None and files is not None:
            self.is_unattested, self.quarantine_sha256 = self._policy.judge(
                self._version, files.state.attestation
            )

    def withdraw_locked(self) -> None:
        """A block was found bad: what was said of the whole object is void."""
        self._lock.assert_held()
        if self._policy is not None:
            self.is_unattested = self._policy.judge(self._version, AttestationRecord())[0]

    def mark_attested(self, sha256: bytes) -> None:
        """The inspector vouches for all bytes of the object, which are present: they may be given to anybody. Does
        nothing for an object that is incomplete or in quarantine. Blocks for a write to the header."""
        policy, holder = self._policy, self._holder
        with self._lock:
            if policy is None or not self._blocks.is_complete or self.quarantine_sha256 is not None:
                return
            self.is_unattested = False
            if holder.files is not None and not holder.is_retired:
                try:
                    holder.files.set_attestation(
                        AttestationRecord(AttestationState.ATTESTED, sha256, policy.anchor)
                    )
                except OSError as error:  # the object is inspected again after the next start
                    self._context.health.report_failure(error)
        holder.record_summary()

    def enter_quarantine(self, sha256: bytes) -> None:
        """The bytes, whose hash is `sha256`, are not what the manifest says: the files give way to some without blocks,
        whose header says so, and nothing more is stored in this object. Blocks for disk writes."""
        context, holder = self._context, self._holder
        with self._lock:
            files = holder.files
            self.quarantine_sha256 = sha256
            if files is None or self._policy is None or holder.is_retired:
                return
            record = AttestationRecord(AttestationState.QUARANTINED, sha256, self._policy.anchor)
            try:
                fs.quarantine_files(context.cache_directory, context.ledger, self._version, files, record)
            except OSError as error:
                context.health.report_failure(error)
            # only now: from here on the version is opened anew, and the record has to be there
            holder.retire()
        summary = fs.read_summary(context.cache_directory, self._version.id)
        if summary is not None:
            context.object_table.put_record(self._version.id, record_from_summary(summary))

    def lift_quarantine(self) -> None:
        """The manifest says something else now: the object is unattested again. Blocks for a write to the header."""
        with self._lock:
            self.quarantine_sha256 = None
            if self._holder.files is not None:
                try:
                    self._holder.files.set_attestation(AttestationRecord())
                except OSError as error:
                    self._context.health.report_failure(error)
