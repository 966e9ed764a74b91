"""Google Cloud Storage through gcsfs: lists, stats, holds the credentials, and can move the bytes, too.

The etag of a version is the object's generation, and reads name it: they can't get another one. gcsfs brings the
credentials, the endpoint (STORAGE_EMULATOR_HOST included) and the session; requests are made one by one, because its
own requests retry on their own for minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import gcsfs
import google.auth.exceptions

from fusecache.errors import AccessDeniedError, ConfigError, NotFoundError, OriginError
from fusecache.origin.aiohttp_bodies import (
    RangeAnswer,
    call_on_loop,
    client_timeout,
    close_session_soon,
    ranged_body,
    translate_aiohttp_error,
)
from fusecache.origin.bucket import BucketBackend
from fusecache.origin.errors_from_answers import ErrorTranslator, error_from_status, version_changed_error
from fusecache.origin.interface import PAGE_KEYS, ListPage, parse_metadata_sha256
from fusecache.origin.stored_form import ASK_GCS_STORED_FORM
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_OBJECT_FIELDS = "name,size,generation,timeCreated,updated"
_TOKEN_LIFETIME = timedelta(minutes=5)


class GcsBackend(BucketBackend):
    """A bucket of Google Cloud Storage."""

    scheme = "gs"
    usual_host = "googleapis.com"
    condition_option = "version"

    def _make_filesystem(self) -> Any:
        config = self._config
        options = dict(config.storage_options)
        if config.endpoint_url:
            options["endpoint_url"] = config.endpoint_url
        elsewhere = options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST")
        if config.anonymous:
            options["token"] = "anon"  # noqa: S105
        elif config.credentials_file:
            options["token"] = str(config.credentials_file)
        elif elsewhere and not os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            # An emulator wants none, and looking for some asks a metadata server that may not answer.
            options.setdefault("token", "anon")
        elif os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            options.setdefault("token", "google_default")
        options.setdefault("access", "read_only")
        try:
            return gcsfs.GCSFileSystem(skip_instance_cache=True, use_listings_cache=False, **options)
        except (google.auth.exceptions.GoogleAuthError, ValueError, TypeError, OSError, KeyError) as error:
            raise ConfigError(
                f"gs://{self.bucket}: the Google credentials can't be used ({type(error).__name__}): "
                "check credentials_file or GOOGLE_APPLICATION_CREDENTIALS"
            ) from None

    def _find_endpoint(self) -> str:
        return str(self._fs._location).rstrip("/")

    def refresh_credentials(self) -> None:
        """Read the credentials' file, or ask the metadata server, again."""
        self._fs = self._make_filesystem()

    def close(self) -> None:
        """Close the session of gcsfs, without waiting."""
        close_session_soon(self._fs)

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """Make one request of objects.list."""
        query = {
            "prefix": self.prefix,
            "maxResults": str(PAGE_KEYS),
            "fields": f"nextPageToken,items({_OBJECT_FIELDS})",
        }
        if token:
            query["pageToken"] = token
        answer = self._request_json(self.identity, "o", query, timeout)
        objects = [
            self._make_version(item["name"][len(self.prefix) :], item) for item in answer.get("items", ())
        ]
        return ListPage(objects, answer.get("nextPageToken") or None)

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """Make one request of objects.get for the metadata."""
        query = {"fields": _OBJECT_FIELDS}
        return self._make_version(
            key, self._request_json(self.object_url(key), self._object_path(key), query, timeout)
        )

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """The metadata `sha256` that the uploader gave the object; GCS itself has MD5 and CRC32C only."""
        where = self.object_url(version.key)
        query = {"fields": f"{_OBJECT_FIELDS},metadata"}
        if version.etag:
            query["generation"] = version.etag
        item = self._request_json(where, self._object_path(version.key), query, timeout)
        if self._make_version(version.key, item) != version:
            raise version_changed_error(where)
        metadata = item.get("metadata")
        return parse_metadata_sha256(metadata.get("sha256")) if isinstance(metadata, dict) else None

    def explain_missing(self, error: OriginError, version: ObjectVersion, timeout: float) -> OriginError:
        """A 404 for one generation means that the object is gone, or that another generation is there: ask which."""
        try:
            self.stat_object(version.key, timeout)
        except OriginError as found:
            return found
        return version_changed_error(self.object_url(version.key))

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Generator[Buffer, None, None]:
        """Make one request for a range of one generation."""
        where = self.object_url(version.key)
        query = {"alt": "media"}
        if version.etag:
            query["generation"] = version.etag
        ranged = {"Range": f"bytes={offset}-{offset + length - 1}", **ASK_GCS_STORED_FORM}
        filesystem = self._fs
        errors = _gcs_errors(where)
        with errors:
            answer = call_on_loop(
                filesystem.loop,
                self._send_request,
                self._object_path(version.key),
                query,
                ranged,
                timeout,
                timeout=timeout + self._tuning.connect_timeout,
            )
        generation = answer.headers.get("x-goog-generation")
        parts = ranged_body(
            filesystem.loop,
            errors,
            RangeAnswer.from_aiohttp(answer, generation),
            version,
            offset,
            length,
            timeout,
        )
        try:
            if generation is None and version.etag:
                # An emulator that may not have looked at ours: look again before any byte is given out.
                held = list(parts)
                if self.stat_object(version.key, timeout) != version:
                    raise version_changed_error(where)
                yield from held
            else:
                yield from parts
        except NotFoundError as error:
            raise self.explain_missing(error, version, timeout) from None

    def _object_path(self, key: str) -> str:
        return f"o/{quote(self.prefix + key, safe='')}"

    async def _send_request(
        self, path: str, query: dict[str, str], headers: dict[str, str], timeout: float
    ) -> Any:
        """The answer to a GET request; its body is as it was sent when `headers` say which codings may be."""
        filesystem = self._fs
        await filesystem._set_session()
        if filesystem.credentials.credentials is not None:
            filesystem.credentials.apply(headers)
        from yarl import URL

        base = f"{self.endpoint}/storage/v1/b/{quote(self.bucket, safe='')}/{path}"
        return await filesystem.session.get(
            URL(base, encoded=True).update_query(filesystem._get_params(query)),
            headers=headers,
            auto_decompress="Accept-Encoding" not in headers,
            timeout=client_timeout(self._tuning.connect_timeout, timeout),
        )

    def _request_json(self, where: str, path: str, query: dict[str, str], timeout: float) -> Any:
        async def ask() -> tuple[int, str | None, bytes]:
            async with await self._send_request(path, query, {}, timeout) as answer:
                return answer.status, answer.headers.get("Retry-After"), await answer.read()

        with _gcs_errors(where):
            status, after, body = call_on_loop(
                self._fs.loop, ask, timeout=timeout + self._tuning.connect_timeout
            )
            if status >= 300:
                if status == 404 and path == "o":
                    raise error_from_status(where, status, "NoSuchBucket")
                raise error_from_status(where, status, _error_reason(body), after)
            return json.loads(body)

    def _make_version(self, key: str, item: Any) -> ObjectVersion:
        made = item.get("timeCreated") or item.get("updated")
        nanoseconds = int(datetime.fromisoformat(made).timestamp() * 1000) * 1_000_000 if made else 0
        return ObjectVersion(
            self.identity, key, str(item.get("generation", "")), int(item.get("size", 0)), nanoseconds
        )

    # -- for a bulk engine

    def signs_requests(self) -> bool:
        """Whether requests carry a token: not if the source is anonymous."""
        return self._fs.credentials.credentials is not None

    def get_credentials(self) -> dict[str, Any]:
        """The token that gcsfs uses now, in obstore's form; gcsfs may wait for a server to renew it. Raises
        AccessDeniedError."""
        with _gcs_errors(self.identity):
            holder = self._fs.credentials
            holder.maybe_refresh()
            return {"token": holder.credentials.token, "expires_at": datetime.now(UTC) + _TOKEN_LIFETIME}

    def obstore_options(self) -> dict[str, Any]:
        """Signing and endpoint for obstore's GCSStore."""
        options: dict[str, Any] = {"skip_signature": not self.signs_requests()}
        if self.is_custom_endpoint:
            options["base_url"] = self.endpoint
        return options

    def etag_of_meta(self, meta: Any, version: ObjectVersion) -> str | None:
        """The generation; where the answer does not tell, it is the one that was asked for."""
        return meta["version"] or version.etag


def _error_reason(body: bytes) -> str:
    """The reason in an error answer of the JSON API, or nothing."""
    try:
        return str(json.loads(body)["error"]["errors"][0]["reason"])
    except (ValueError, LookupError, TypeError):
        return ""


def _gcs_errors(where: str) -> ErrorTranslator:
    return ErrorTranslator(where, _translate_google_error, translate_aiohttp_error)


def _translate_google_error(where: str, error: Exception) -> OriginError | None:
    if isinstance(error, google.auth.exceptions.GoogleAuthError | gcsfs.retry.HttpError):
        return AccessDeniedError(
            f"{where}: the Google credentials can't be renewed ({type(error).__name__}): log in again"
        )
    return None
