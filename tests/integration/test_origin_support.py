"""The servers that other tests rely on."""

from __future__ import annotations

import urllib.error
import urllib.request

import botocore.exceptions
import pytest

from tests.support.content import check, content
from tests.support.faulty import FaultyServer
from tests.support.servers import GcsServer, S3Server


def test_content_is_the_same_at_any_range() -> None:
    whole = content("k", 1, 0, 1000)
    for offset, length in ((0, 0), (3, 10), (8, 8), (991, 9), (15, 500)):
        assert content("k", 1, offset, length) == whole[offset : offset + length]
    assert content("k", 2, 0, 1000) != whole != content("l", 1, 0, 1000)
    check(whole[5:], "k", 1, 5)
    with pytest.raises(AssertionError, match="byte 6 is wrong"):
        check(whole[5:6] + b"?" + whole[7:], "k", 1, 5)


def test_s3_servers_keep_what_they_get(s3_server: S3Server, moto_server: S3Server) -> None:
    for server in (s3_server, moto_server):
        bucket = server.bucket()
        first = bucket.put("dir/a b", content("a", 1, 0, 1000))
        assert bucket.put("dir/a b", content("a", 2, 0, 1000)) != first
        check(bucket.get("dir/a b"), "a", 2)
        assert bucket.keys() == ["dir/a b"]
        bucket.delete("dir/a b")
        assert bucket.keys() == []


def test_seaweedfs_refuses_other_credentials(s3_server: S3Server) -> None:
    stranger = S3Server("stranger", s3_server.endpoint, "nobody", "wrong")
    with pytest.raises(botocore.exceptions.ClientError, match="InvalidAccessKeyId"):
        stranger.client().list_objects_v2(Bucket="ready")


def test_gcs_emulator_keeps_what_it_gets(gcs_server: GcsServer) -> None:
    bucket = gcs_server.bucket()
    bucket.put("dir/a b", content("a", 1, 0, 1000))
    check(bucket.get("dir/a b"), "a", 1)


def _get(url: str, first: int, last: int) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={first}-{last}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return int(answer.status), bytes(answer.read())


def test_the_faulty_server_does_as_told(faulty_http: FaultyServer) -> None:
    faulty_http.objects["a"] = content("a", 1, 0, 100_000)
    url = f"{faulty_http.url}/a"
    assert _get(url, 10, 99) == (206, content("a", 1, 10, 90))
    faulty_http.add("status", status=503, times=2)
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            _get(url, 0, 9)
    faulty_http.add("truncate", after=50)
    with pytest.raises(Exception, match="IncompleteRead"):
        _get(url, 0, 99)
    faulty_http.add("reset")
    with pytest.raises(OSError, match=r"reset|closed"):
        _get(url, 0, 99)
    faulty_http.add("whole")
    assert _get(url, 10, 99) == (200, faulty_http.objects["a"])
    faulty_http.before(lambda: faulty_http.objects.pop("a"), nth=2)
    assert _get(url, 10, 99)[0] == 206
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _get(url, 0, 9)
    assert faulty_http.counts() == {"RANGE": 8}


def test_the_proxy_keeps_signatures_valid(faulty_s3: FaultyServer, s3_server: S3Server) -> None:
    bucket = s3_server.bucket()
    bucket.put("dir/a", content("a", 1, 0, 100_000))
    through = S3Server("proxy", faulty_s3.url, s3_server.access_key, s3_server.secret_key).client()
    at = {"Bucket": bucket.name, "Key": "dir/a"}
    check(through.get_object(**at, Range="bytes=10-99")["Body"].read(), "a", 1, 10)
    faulty_s3.add("whole")
    check(through.get_object(**at, Range="bytes=10-99")["Body"].read(), "a", 1)
    through.list_objects_v2(Bucket=bucket.name)
    assert faulty_s3.counts() == {"RANGE": 2, "LIST": 1}
