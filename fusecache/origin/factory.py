"""Chooses the backend and the engine of a source."""

from __future__ import annotations

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import ConfigError
from fusecache.origin.interface import Origin, OriginBackend
from fusecache.origin.retrying import RetryingOrigin


def open_origin(config: SourceConfig, tuning: Tuning) -> Origin:
    """The origin of a source. Makes no request yet; raises ConfigError for what can never work."""
    return RetryingOrigin(_make_backend(config, tuning), tuning)


def _make_backend(config: SourceConfig, tuning: Tuning) -> OriginBackend:
    # Each import costs 0.1-0.5 s, so that only what is needed is loaded.
    scheme = config.url.partition("://")[0].lower()
    if config.engine == "obstore" and scheme not in ("s3", "s3a", "gs", "gcs"):
        raise ConfigError(f"engine=obstore can't read {scheme}://, only s3:// and gs://: leave engine out")
    if scheme in ("s3", "s3a", "gs", "gcs"):
        # A '?' or '#' is a part of the key here.
        bucket, _, prefix = config.url.partition("://")[2].partition("/")
        prefix = prefix.strip("/")
        backend: OriginBackend
        if scheme in ("s3", "s3a"):
            from fusecache.origin.s3 import S3Backend

            s3 = S3Backend(config, tuning, bucket, prefix)
            if config.engine == "fsspec" or (config.engine == "auto" and not s3.works_without_s3fs()):
                return s3
            if config.engine == "auto":
                from fusecache.origin.plain_http_engine import PlainHttpEngine, supports_endpoint

                if supports_endpoint(s3.endpoint):
                    return PlainHttpEngine(s3, tuning)
            backend = s3
        else:
            from fusecache.origin.gcs import GcsBackend

            gcs = GcsBackend(config, tuning, bucket, prefix)
            if config.engine == "fsspec":
                return gcs
            backend = gcs
        from fusecache.origin.obstore_engine import ObstoreEngine

        return ObstoreEngine(backend, tuning)
    if scheme in ("file", "local"):
        from fusecache.origin.local import LocalBackend

        root = config.url.partition("://")[2].removeprefix("localhost")
        if not root.startswith("/"):
            raise ConfigError(f"{config.url}: write it with an absolute path, like file:///data/models")
        return LocalBackend(root)
    if scheme in ("http", "https"):
        from fusecache.origin.http import HttpBackend

        return HttpBackend(config, tuning)
    from fusecache.origin.any_fsspec import AnyFsspecBackend

    return AnyFsspecBackend(config)
