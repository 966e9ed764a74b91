"""S3 through s3fs: lists, stats, holds the credentials, and can move the bytes, too.

Requests go through s3fs's client with its own retries off. Listings are asked for page by page, so that keys arrive
as the server has them. Modification times are cut to seconds: HEAD has no finer ones, and a version must be the same
however it was learned.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import aiobotocore.session
import botocore.exceptions
import botocore.loaders
import botocore.parsers
import fsspec.asyn
import s3fs
from botocore.parsers import ResponseParserError

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import AccessDeniedError, ConfigError, OriginError
from fusecache.origin.aiohttp_bodies import ErrorTranslator, bytes_to_skip, stream_body
from fusecache.origin.errors_from_answers import (
    connection_error,
    error_from_status,
    timeout_error,
    truncated_error,
    version_changed_error,
)
from fusecache.origin.interface import PAGE_KEYS, ListPage, parse_metadata_sha256
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

CREDENTIALS_LIFETIME = timedelta(minutes=5)
"""How long the bulk engine may use credentials before it asks botocore again, which renews them 10-15 minutes before
they expire."""


class S3Backend:
    """See fusecache.origin.interface.Backend."""

    engine = "fsspec"
    scheme: Literal["s3"] = "s3"

    def __init__(self, config: SourceConfig, tuning: Tuning, bucket: str, prefix: str) -> None:
        """`prefix` has no slash at its end. Raises ConfigError for a profile or file that is not there."""
        self._config = config
        self._tuning = tuning
        self.bucket = bucket
        self.prefix = prefix + "/" if prefix else ""
        self._lock = threading.Lock()
        self._fs = self._make_filesystem()
        self.endpoint = str(self._fs.s3.meta.endpoint_url)
        self.is_custom_endpoint = "amazonaws.com" not in self.endpoint
        self.identity = f"s3://{bucket}" + (f"/{prefix}" if prefix else "")
        if self.is_custom_endpoint:
            self.identity += "@" + self.endpoint.split("://")[-1].rpartition("@")[2].rstrip("/")

    def _make_filesystem(self) -> Any:
        config = self._config
        options = dict(config.storage_options)
        client = dict(options.pop("client_kwargs", {}))
        if config.region:
            client["region_name"] = config.region
        more = dict(options.pop("config_kwargs", {}))
        more.setdefault("retries", {"total_max_attempts": 1, "mode": "standard"})
        more.setdefault("connect_timeout", self._tuning.connect_timeout)
        more.setdefault("read_timeout", self._tuning.stall_timeout)
        more.setdefault("max_pool_connections", self._tuning.concurrency + 8)
        if config.access_key_id and config.secret_access_key:
            options["key"] = config.access_key_id.get_secret_value()
            options["secret"] = config.secret_access_key.get_secret_value()
        if config.session_token:
            options["token"] = config.session_token.get_secret_value()
        if config.endpoint_url:
            options["endpoint_url"] = config.endpoint_url
        if config.anonymous:
            options["anon"] = True
        try:
            profile = config.profile or options.pop("profile", None)
            session = aiobotocore.session.AioSession(profile=profile)
            session.register_component("data_loader", _botocore_loader())
            if config.credentials_file:
                session.set_config_variable("credentials_file", str(config.credentials_file))
            filesystem = s3fs.S3FileSystem(
                session=session,
                client_kwargs=client,
                config_kwargs=more,
                skip_instance_cache=True,
                use_listings_cache=False,
                **options,
            )
            filesystem.retries = 1
            filesystem.connect()
        except (botocore.exceptions.BotoCoreError, ValueError, TypeError) as error:
            raise ConfigError(f"s3://{self.bucket}: {_error_text(error)}: check the S3 settings") from None
        return filesystem

    def refresh_credentials(self) -> None:
        """See Backend: files, environment and instance roles are read again."""
        filesystem = self._make_filesystem()
        with self._lock:
            old, self._fs = self._fs, filesystem
        _close_client(old)

    def close(self) -> None:
        """See Backend."""
        _close_client(self._fs)

    def object_url(self, key: str) -> str:
        """URL of an object, for messages."""
        return f"{self.identity}/{key}"

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """See Backend."""
        more = {"ContinuationToken": token} if token else {}
        answer = self._call_s3(
            self.identity,
            "list_objects_v2",
            timeout,
            Bucket=self.bucket,
            Prefix=self.prefix,
            MaxKeys=PAGE_KEYS,
            **more,
        )
        objects = [
            self._make_version(
                item["Key"][len(self.prefix) :], item.get("ETag"), item["Size"], item.get("LastModified")
            )
            for item in answer.get("Contents", ())
        ]
        return ListPage(objects, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None)

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """See Backend."""
        answer = self._call_s3(
            self.object_url(key), "head_object", timeout, Bucket=self.bucket, Key=self.prefix + key
        )
        return self._make_version(
            key, answer.get("ETag"), answer["ContentLength"], answer.get("LastModified")
        )

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """See Backend: the checksum that S3 keeps of the object, or the metadata `sha256` that its uploader gave it.
        What was uploaded in parts (its ETag has a dash) may have a checksum of its parts' checksums (COMPOSITE)."""
        condition = {"IfMatch": version.etag} if version.etag else {}
        answer = self._call_s3(
            self.object_url(version.key),
            "head_object",
            timeout,
            Bucket=self.bucket,
            Key=self.prefix + version.key,
            ChecksumMode="ENABLED",
            **condition,
        )
        if version.etag and normalize_etag(answer.get("ETag")) != version.etag:
            raise version_changed_error(self.object_url(version.key))
        kind = answer.get("ChecksumType") or ("COMPOSITE" if "-" in version.etag else "FULL_OBJECT")
        found = parse_metadata_sha256(answer.get("ChecksumSHA256")) if kind == "FULL_OBJECT" else None
        return found or parse_metadata_sha256(answer.get("Metadata", {}).get("sha256"))

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Iterator[Buffer]:
        """See Backend."""
        where = self.object_url(version.key)
        condition = {"IfMatch": version.etag} if version.etag else {}
        filesystem = self._fs
        answer = self._call_s3(
            where,
            "get_object",
            timeout,
            Bucket=self.bucket,
            Key=self.prefix + version.key,
            Range=f"bytes={offset}-{offset + length - 1}",
            **condition,
        )
        body = answer["Body"]
        try:
            if version.etag and normalize_etag(answer.get("ETag")) != version.etag:
                raise version_changed_error(where)
            skip = bytes_to_skip(
                where,
                answer["ResponseMetadata"]["HTTPStatusCode"],
                answer.get("ContentRange"),
                answer.get("ContentLength"),
                version.size,
                offset,
            )
            yield from stream_body(
                filesystem.loop, where, body.read, skip, length, timeout, _S3ErrorTranslator
            )
        finally:
            # A body that was not read to its end takes its connection with it.
            filesystem.loop.call_soon_threadsafe(body.close)

    def _call_s3(self, where: str, method: str, timeout: float, **arguments: Any) -> Any:
        with _S3ErrorTranslator(where):
            return self._fs.call_s3(method, timeout=timeout + self._tuning.connect_timeout, **arguments)

    def _make_version(
        self, key: str, etag: str | None, size: int, modified: datetime | None
    ) -> ObjectVersion:
        seconds = int(modified.timestamp()) if modified else 0
        return ObjectVersion(self.identity, key, normalize_etag(etag), int(size), seconds * 1_000_000_000)

    # -- for the bulk engine

    def find_region(self) -> str:
        """Region of the bucket: as AWS says, or as it is configured."""
        configured = str(self._fs.s3.meta.region_name or "us-east-1")
        if self.is_custom_endpoint or self._config.anonymous:
            return configured if configured != "aws-global" else "us-east-1"
        try:
            answer = self._call_s3(
                self.identity, "head_bucket", self._tuning.stall_timeout, Bucket=self.bucket
            )
        except OriginError:
            return configured  # not allowed to ask: the requests themselves will tell
        return str(answer.get("BucketRegion") or configured)

    def uses_virtual_host(self) -> bool:
        """Whether the bucket is to be part of the host name."""
        chosen = (self._fs.s3.meta.config.s3 or {}).get("addressing_style")
        return chosen == "virtual"

    def works_without_s3fs(self) -> bool:
        """Whether nothing is asked of requests that only s3fs knows how to do."""
        options = self._config.storage_options
        return not (
            options.get("s3_additional_kwargs") or options.get("config_kwargs", {}).get("signature_version")
        )

    def request_headers(self) -> dict[str, str]:
        """Headers that each request for an object has to have."""
        return {"x-amz-request-payer": "requester"} if self._fs.requester_pays else {}

    def signs_requests(self) -> bool:
        """Whether requests are signed."""
        return not self._fs.anon

    def get_credentials(self) -> dict[str, Any]:
        """The credentials that s3fs uses at this time, in obstore's form. Raises AccessDeniedError."""
        filesystem = self._fs
        until = datetime.now(UTC) + CREDENTIALS_LIFETIME
        if filesystem.key:
            return {
                "access_key_id": filesystem.key,
                "secret_access_key": filesystem.secret,
                "token": filesystem.token,
                "expires_at": until,
            }

        async def ask() -> Any:
            found = await filesystem.session.get_credentials()
            return await found.get_frozen_credentials() if found else None

        with _S3ErrorTranslator(self.identity):
            found = fsspec.asyn.sync(filesystem.loop, ask, timeout=self._tuning.stall_timeout)
        if found is None:
            raise _no_credentials_error(self.identity)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": until,
        }


@functools.cache
def _botocore_loader() -> Any:
    """botocore's service descriptions, read once per process: 0.1 s for each session else."""
    return botocore.loaders.create_loader()


def normalize_etag(text: str | None) -> str:
    """In the form of the header, quotes included: some servers leave them out in listings."""
    if not text:
        return ""
    return text if text.endswith('"') else f'"{text}"'


def _close_client(filesystem: Any) -> None:
    creator = getattr(filesystem, "_s3creator", None)
    if creator is not None:
        asyncio.run_coroutine_threadsafe(creator.__aexit__(None, None, None), filesystem.loop)


def _error_text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] if isinstance(error, botocore.exceptions.ProfileNotFound) else type(error).__name__


def _no_credentials_error(where: str) -> AccessDeniedError:
    return AccessDeniedError(
        f"{where}: no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or anonymous"
    )


class _S3ErrorTranslator(ErrorTranslator):
    """Turn what botocore raises, and s3fs makes of it, into errors of ours."""

    def translate_error(self, error: Exception) -> OriginError | None:
        where = self.where
        cause: BaseException | None = error
        while cause is not None and not isinstance(
            cause, botocore.exceptions.ClientError | botocore.exceptions.BotoCoreError | ResponseParserError
        ):
            cause = cause.__cause__
        if isinstance(cause, botocore.exceptions.ClientError):
            meta = cause.response.get("ResponseMetadata", {})
            code = str(cause.response.get("Error", {}).get("Code", ""))
            headers = {k.lower(): v for k, v in meta.get("HTTPHeaders", {}).items()}
            status = int(meta.get("HTTPStatusCode") or (code if code.isdigit() else 0))
            return error_from_status(where, status, code, headers.get("retry-after"))
        if isinstance(error, botocore.parsers.ResponseParserError):
            return truncated_error(where)
        names = botocore.exceptions
        if isinstance(cause, names.NoCredentialsError | names.PartialCredentialsError):
            return _no_credentials_error(where)
        if isinstance(cause, names.CredentialRetrievalError | names.TokenRetrievalError | names.SSOError):
            return AccessDeniedError(
                f"{where}: the AWS credentials can't be renewed ({type(cause).__name__}): log in again"
            )
        if isinstance(cause, names.ReadTimeoutError | names.ConnectTimeoutError):
            return timeout_error(where)
        if isinstance(
            cause,
            names.ConnectionError | names.HTTPClientError | ResponseParserError | names.IncompleteReadError,
        ):
            return connection_error(where, type(cause).__name__)
        if isinstance(cause, names.ParamValidationError):
            return OriginError(f"{where}: S3 has no such name: check the URL")
        if isinstance(cause, names.BotoCoreError):
            return OriginError(f"{where}: S3 request failed ({type(cause).__name__}): check the S3 settings")
        return None
