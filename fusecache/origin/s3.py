"""S3 through s3fs: lists, stats, holds the credentials, and can move the bytes, too.

Requests go through s3fs's client with its own retries off. Listings are asked for page by page, so that keys arrive
as the server has them. Modification times are cut to seconds: HEAD has no finer ones, and a version must be the same
however it was learned.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import aiobotocore.session
import botocore.exceptions
import botocore.loaders
import botocore.parsers
import fsspec.asyn
import s3fs
from botocore.parsers import ResponseParserError

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import AccessDeniedError, ConfigError, OriginError
from fusecache.origin.aiohttp_bodies import RangeAnswer, ranged_body, translate_aiohttp_error
from fusecache.origin.bucket import BucketBackend
from fusecache.origin.errors_from_answers import (
    ErrorTranslator,
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

CREDENTIALS_LIFETIME = timedelta(minutes=5)
"""How long a bulk engine may use credentials before it asks botocore again, which renews them 10-15 minutes before
they expire."""

_CONTINUATION = "token"
_MARKER = "marker"
"""The kinds of tokens of pages, which begin with the kind and a colon."""


class S3Backend(BucketBackend):
    """A bucket of S3, or of a store that speaks its protocol. The lock guards the exchange of `_fs`."""

    scheme = "s3"
    usual_host = "amazonaws.com"
    condition_option = "if_match"

    def __init__(self, config: SourceConfig, tuning: Tuning, bucket: str, prefix: str) -> None:
        """`prefix` has no slash at its end. Raises ConfigError for a profile or file that is not there."""
        self._lock = threading.Lock()
        super().__init__(config, tuning, bucket, prefix)

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

    def _find_endpoint(self) -> str:
        return str(self._fs.s3.meta.endpoint_url)

    def refresh_credentials(self) -> None:
        """Read files, environment and instance roles again."""
        filesystem = self._make_filesystem()
        with self._lock:
            old, self._fs = self._fs, filesystem
        _close_client(old)

    def close(self) -> None:
        """Close the client of s3fs, without waiting."""
        _close_client(self._fs)

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """Make one ListObjectsV2 request, or one ListObjects request (version 1) for the page after a marker.

        A server of version 1 cuts a listing short without a continuation token: the next page is then the one after the
        page's last key. Raises OriginError when it cuts an empty page short.
        """
        method, more = "list_objects_v2", {}
        if token is not None:
            kind, _, value = token.partition(":")
            if kind == _MARKER:
                method, more = "list_objects", {"Marker": value}
            else:
                more = {"ContinuationToken": value}
        answer = self._call_s3(
            self.identity,
            method,
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
        return ListPage(objects, self._next_token(answer) if answer.get("IsTruncated") else None)

    def _next_token(self, answer: Any) -> str:
        """The token, as of ListPage, of the page after an answer that is cut short."""
        if answer.get("NextContinuationToken"):
            return f"{_CONTINUATION}:{answer['NextContinuationToken']}"
        contents = answer.get("Contents", ())
        marker = answer.get("NextMarker") or (contents[-1]["Key"] if contents else "")
        if not marker:
            raise OriginError(
                f"{self.identity}: the server cuts its listing short without saying where it goes on: "
                "its files can't all be listed"
            )
        return f"{_MARKER}:{marker}"

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """Make one HeadObject request."""
        answer = self._call_s3(
            self.object_url(key), "head_object", timeout, Bucket=self.bucket, Key=self.prefix + key
        )
        return self._make_version(
            key, answer.get("ETag"), answer["ContentLength"], answer.get("LastModified")
        )

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """The checksum that S3 keeps of the object, or the metadata `sha256` that its uploader gave it. An object that
        was uploaded in parts (its ETag has a dash) may have a checksum of its parts' checksums (COMPOSITE): that is
        not a sha256 of its bytes."""
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
    ) -> Generator[Buffer, None, None]:
        """Make one GetObject request, with If-Match."""
        where = self.object_url(version.key)
        condition = {"IfMatch": version.etag} if version.etag else {}
        filesystem = self._fs
        found = self._call_s3(
            where,
            "get_object",
            timeout,
            Bucket=self.bucket,
            Key=self.prefix + version.key,
            Range=f"bytes={offset}-{offset + length - 1}",
            **condition,
        )
        answer = RangeAnswer(
            found["ResponseMetadata"]["HTTPStatusCode"],
            normalize_etag(found.get("ETag")),
            found.get("ContentRange"),
            found.get("ContentLength"),
            found.get("ContentEncoding"),
            None,
            found["Body"].read,
            found["Body"].close,
        )
        errors = _s3_errors(where)
        yield from ranged_body(filesystem.loop, errors, answer, version, offset, length, timeout)

    def _call_s3(self, where: str, method: str, timeout: float, **arguments: Any) -> Any:
        with _s3_errors(where):
            return self._fs.call_s3(method, timeout=timeout + self._tuning.connect_timeout, **arguments)

    def _make_version(
        self, key: str, etag: str | None, size: int, modified: datetime | None
    ) -> ObjectVersion:
        seconds = int(modified.timestamp()) if modified else 0
        return ObjectVersion(self.identity, key, normalize_etag(etag), int(size), seconds * 1_000_000_000)

    # -- for a bulk engine

    def obstore_options(self) -> dict[str, Any]:
        """Region, addressing, payer and endpoint for obstore's S3Store. Makes a request for the region."""
        options: dict[str, Any] = {
            "region": self.find_region(),
            "skip_signature": not self.signs_requests(),
            "virtual_hosted_style_request": self.uses_virtual_host(),
            "request_payer": bool(self.request_headers()),
        }
        if self.is_custom_endpoint:
            endpoint = self.endpoint
            if self.uses_virtual_host():
                scheme, _, host = endpoint.partition("://")
                endpoint = f"{scheme}://{self.bucket}.{host}"
            # The variable AWS_ENDPOINT_URL_S3 would win over `endpoint`.
            options["aws_endpoint_url_s3" if "AWS_ENDPOINT_URL_S3" in os.environ else "endpoint"] = endpoint
        return options

    def etag_of_meta(self, meta: Any, version: ObjectVersion) -> str | None:
        """The ETag header."""
        etag: str | None = meta["e_tag"]
        return etag

    def find_region(self) -> str:
        """Region of the bucket: as AWS says, or as it is configured. Makes a request."""
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
        """Whether requests are signed: not if the source is anonymous."""
        return not self._fs.anon

    def get_credentials(self) -> dict[str, Any]:
        """The keys that s3fs uses now, in obstore's form; botocore may wait for a server to renew them. Raises
        AccessDeniedError."""
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

        with _s3_errors(self.identity):
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


def _s3_errors(where: str) -> ErrorTranslator:
    return ErrorTranslator(where, translate_botocore_error, translate_aiohttp_error)


def translate_botocore_error(where: str, error: Exception) -> OriginError | None:
    """For ErrorTranslator: what botocore raised, also where s3fs has made an OSError of it; None for other errors."""
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
