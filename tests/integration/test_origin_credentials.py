"""Credentials, endpoints and odd keys: every engine sees the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusecache.config.model import SourceConfig
from fusecache.errors import AccessDeniedError
from tests.support.content import check, content
from tests.support.faulty import FaultyServer, everything
from tests.support.origins import opened, read, s3_config
from tests.support.servers import GcsServer, S3Bucket, S3Server

pytestmark = pytest.mark.parametrize("engine", ["auto", "obstore", "fsspec"])


def reads(config: SourceConfig) -> None:
    with opened(config) as origin:
        (version,) = origin.list_objects()
        assert origin.stat_object(version.key) == version
        check(read(origin, version), "a", 1)


@pytest.fixture
def bucket(s3_server: S3Server) -> S3Bucket:
    bucket = s3_server.bucket()
    bucket.put("p/a", content("a", 1, 0, 1000))
    return bucket


def test_the_environment(
    engine: str, bucket: S3Bucket, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads(SourceConfig(url=f"{bucket.url}/p/", engine=engine))  # type: ignore[arg-type]
    # The variable for S3 alone wins over the general one.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_environment.endpoint)
    config = SourceConfig(url=f"{bucket.url}/p", engine=engine)  # type: ignore[arg-type]
    reads(config)
    with opened(config) as origin:
        assert origin.identity == f"{bucket.url}/p@{s3_environment.endpoint.removeprefix('http://')}"


def test_explicit_settings_win_over_the_environment(
    engine: str, bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    reads(s3_config(bucket, "p", engine=engine))


def test_profiles_and_shared_files(
    engine: str, bucket: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = bucket.server
    keys = tmp_path / "credentials"
    keys.write_text(
        f"[models]\naws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"
    )
    settings = tmp_path / "config"
    settings.write_text(f"[profile models]\nregion = us-east-1\nendpoint_url = {server.endpoint}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(settings))
    reads(
        SourceConfig(url=f"{bucket.url}/p", engine=engine, profile="models", credentials_file=keys)  # type: ignore[arg-type]
    )


def test_keys_that_were_renewed_are_found(
    engine: str, bucket: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = bucket.server
    keys = tmp_path / "credentials"

    def write(secret: str) -> None:
        keys.write_text(
            f"[default]\naws_access_key_id = {server.access_key}\naws_secret_access_key = {secret}\n"
        )

    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    write(server.secret_key)
    config = SourceConfig(
        url=f"{bucket.url}/p", engine=engine, endpoint_url=faulty_s3.url, region="us-east-1"
    )  # type: ignore[arg-type]
    with opened(config) as origin:
        (version,) = origin.list_objects()
    write("outdated")
    with opened(config) as origin:
        with pytest.raises(AccessDeniedError):
            read(origin, version)
        faulty_s3.before(lambda: write(server.secret_key), match=everything)
        check(read(origin, version), "a", 1)


def test_no_credentials_are_said_to_be_missing(engine: str, bucket: S3Bucket) -> None:
    config = SourceConfig(url=bucket.url, engine=engine, endpoint_url=bucket.server.endpoint)  # type: ignore[arg-type]
    with opened(config) as origin, pytest.raises(AccessDeniedError, match="no AWS credentials found"):
        list(origin.list_objects())


def test_anonymous_requests_are_not_signed(engine: str, bucket: S3Bucket, faulty_s3: FaultyServer) -> None:
    config = SourceConfig(url=bucket.url, engine=engine, endpoint_url=faulty_s3.url, anonymous=True)  # type: ignore[arg-type]
    with opened(config) as origin:
        with pytest.raises(AccessDeniedError):
            list(origin.list_objects())
        with opened(s3_config(bucket)) as signed:
            (version,) = signed.list_objects()
        with pytest.raises(AccessDeniedError):
            read(origin, version)
    assert faulty_s3.seen
    assert not any("authorization" in request.headers for request in faulty_s3.seen)


def test_odd_keys_arrive_as_they_are(engine: str, moto_server: S3Server) -> None:
    bucket = moto_server.bucket()
    keys = [
        "a//b",
        "marker/",
        "x/../y",
        "./z",
        "tab\there",
        "long/" + "ü" * 500,
        "per%2Fcent+plus",
        "q?a=b#c",
    ]
    for key in keys:
        bucket.put("p/" + key, content(key, 1, 0, 100))
    with opened(s3_config(bucket, "p", engine=engine)) as origin:
        found = {version.key: version for version in origin.list_objects()}
        assert sorted(found) == sorted(keys)
        for key in keys:
            check(read(origin, found[key], 10, 80), key, 1, 10)


def test_multipart_objects_have_etags_of_their_own_form(engine: str, s3_server: S3Server) -> None:
    bucket = s3_server.bucket()
    part = 5 << 20
    etag = bucket.put_multipart("big", [content("big", 1, 0, part), content("big", 1, part, 1000)])
    with opened(s3_config(bucket, engine=engine)) as origin:
        (version,) = origin.list_objects()
        assert version.etag == etag
        assert version.size == part + 1000
        check(read(origin, version, part - 500, 1000), "big", 1, part - 500)


def test_an_empty_bucket_is_an_empty_listing(engine: str, s3_server: S3Server) -> None:
    with opened(s3_config(s3_server.bucket(), "nothing/here", engine=engine)) as origin:
        assert list(origin.list_objects()) == []


def test_the_gcs_emulator_by_its_variable(
    engine: str, gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = gcs_server.bucket()
    bucket.put("p/a", content("a", 1, 0, 1000))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint)
    reads(SourceConfig(url=f"{bucket.url}/p", engine=engine))  # type: ignore[arg-type]
