"""The contestants, one module each, behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Bucket:
    """Where the model is: a folder of a bucket of an S3 server on this machine."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    prefix: str
    server_pid: int = 0
    """Of the server's process, to take its CPU time."""

    @property
    def environment(self) -> dict[str, str]:
        """The credentials as every AWS client reads them."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def url(self) -> str:
        """s3:// URL of the folder."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


class Tool(Protocol):
    """A mount of a bucket with a cache on the local disk, at its best documented settings."""

    name: str

    def version(self) -> str:
        """The version that the tool names, one line."""

    def settings(self) -> Sequence[str]:
        """The options that matter to speed, for the report."""

    def prepare(self, bucket: Bucket, model: Path, work: Path) -> None:
        """Do what is needed once before the first mount (a tool with a format of its own: the upload)."""

    def mounted(self, bucket: Bucket, work: Path) -> AbstractContextManager[Path]:
        """Mount for the length of the block, with the cache below `work` (empty: cold): the folder."""
