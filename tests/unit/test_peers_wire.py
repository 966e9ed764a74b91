"""The exchange's protocol as text and bytes, and signatures: nothing that another machine sends surprises us."""

from __future__ import annotations

import contextlib
import dataclasses
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecache.peers.errors import PeerError
from fusecache.peers.member import PROTOCOL, NodeInfo, pack_node_info, unpack_node_info
from fusecache.peers.transport.auth import RequestSigner, RequestVerifier
from fusecache.peers.transport.wire import (
    FRAME_HEADER,
    BlockRequest,
    RequestError,
    pack_version,
    parse_block_request,
    parse_frame_checksum,
    unpack_version,
)
from fusecache.types import ObjectVersion

VERSION = ObjectVersion("s3://bucket/prefix", "a/b.safetensors", "etag", 1 << 40, 123)
NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=20)


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@given(
    st.integers(0, 10**9),
    st.integers(1, 4096),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(NAMES, max_size=5),
    st.text(max_size=30),
)
def test_a_request_is_understood_as_it_was_meant(
    first: int, count: int, hops: int, stored: bool, direct: bool, frames: bool, failed: list[str], key: str
) -> None:
    version = dataclasses.replace(VERSION, key=key)
    request = BlockRequest(
        version.id,
        range(first, first + count),
        version,
        1 << 20,
        12.5,
        hops,
        stored,
        tuple(failed),
        direct,
        frames,
        urgent=frames,
        unsent_bytes=77,
        receive_rate=78,
        caller="me",
    )
    assert parse_block_request(request.target, lower(request.headers())) == request


@pytest.mark.parametrize(
    ("priority", "urgent"),
    [
        ("", True),
        ("u=3", True),
        ("u=1, i", True),
        ("i, u=5", False),
        ("u=7;x=1", False),
        ("u=9", True),
        ("u=", True),
        ("x" * 900, True),
        ("au=6", True),
    ],
)
def test_the_urgency_is_that_of_rfc_9218(priority: str, urgent: bool) -> None:
    found = parse_block_request(f"/v1/objects/{VERSION.id}/blocks/0-1", {"priority": priority})
    assert found.urgent is urgent


def test_who_knows_the_id_alone_gets_what_is_stored() -> None:
    found = parse_block_request(f"/v1/objects/{VERSION.id}/blocks/0-3?frames=0", {})
    assert found.stored_only
    assert not found.with_frames
    assert found.blocks == range(4)


@given(
    st.text(max_size=200),
    st.dictionaries(
        st.sampled_from(
            sorted(
                lower(
                    BlockRequest(
                        VERSION.id,
                        range(1),
                        VERSION,
                        1,
                        failed_nodes=("a",),
                        stored_only=True,
                        direct=True,
                        caller="n",
                    ).headers()
                )
            )
        ),
        st.text(max_size=60),
    ),
)
def test_no_request_is_too_odd(target: str, headers: dict[str, str]) -> None:
    for asked in (
        target,
        f"/v1/objects/{VERSION.id}/blocks/{target}",
        f"/v1/objects/{VERSION.id}/blocks/0-1",
    ):
        with contextlib.suppress(RequestError):
            parse_block_request(asked, headers)


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("blocks/5-4", {}),
        ("blocks/0-4096", {}),
        ("blocks/0-1", {"fusecache-hops": "5"}),
        ("blocks/0-1", {"fusecache-hops": "-1"}),
        ("blocks/0-1", {"fusecache-only": "all"}),
        ("blocks/0-1", {"fusecache-deadline": "nan"}),
        ("blocks/0-1", {"fusecache-failed": "a b"}),
        ("blocks/0-1", {"fusecache-node": "a\x00"}),
        ("blocks/0-1", {"fusecache-version": "not base64!"}),
        ("blocks/0-1", {"fusecache-version": pack_version(dataclasses.replace(VERSION, etag="other"))}),
        ("blocks/0-1", {"fusecache-version": pack_version(dataclasses.replace(VERSION, size=1 << 60))}),
    ],
)
def test_what_can_not_be_is_refused(target: str, headers: dict[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse_block_request(f"/v1/objects/{VERSION.id}/{target}", headers)
    assert caught.value.status == 400
    assert b'"error"' in caught.value.body()


@given(st.text(max_size=100))
def test_no_version_is_too_odd(text: str) -> None:
    with pytest.raises(RequestError):
        unpack_version(text)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_no_health_is_too_odd(body: bytes) -> None:
    with pytest.raises(PeerError):
        unpack_node_info(body)


def test_a_health_that_lies_about_its_types() -> None:
    health = NodeInfo("a", "i", 5, "", PROTOCOL, "1", 2.0)
    assert unpack_node_info(pack_node_info(health)) == health
    for change in (
        {"weight": 0},
        {"weight": True},
        {"name": "a/b"},
        {"protocol": "1"},
        {"time": "x"},
        {"tenant": "a b"},
        {"version": "x" * 100},
    ):
        with pytest.raises(PeerError):
            unpack_node_info(pack_node_info(dataclasses.replace(health, **change)))  # type: ignore[arg-type]


def test_a_frame_has_to_be_that_of_its_block() -> None:
    assert parse_frame_checksum(FRAME_HEADER.pack(9, 100, 3), 3, 100) == 9
    for wrong in (FRAME_HEADER.pack(9, 100, 4), FRAME_HEADER.pack(9, 99, 3), FRAME_HEADER.pack(0, 100, 3)):
        with pytest.raises(PeerError):
            parse_frame_checksum(wrong, 3, 100)


SECRET = "sixteen letters at least"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def signed(clock: Clock, secret: str = SECRET, tenant: str = "", offset: float = 0.0) -> dict[str, str]:
    headers = {"fusecache-hops": "1"}
    signer = RequestSigner(secret, "me", tenant, clock)
    return headers | {"authorization": signer.authorization_header("GET", "/v1/objects", headers, offset)}


def refused(
    verifier: RequestVerifier, headers: dict[str, str], method: str = "GET", target: str = "/v1/objects"
) -> int:
    with pytest.raises(RequestError) as caught:
        verifier.verify_request(method, target, headers)
    return caught.value.status


def test_a_signature_holds_for_its_request_and_once() -> None:
    clock = Clock()
    verifier = RequestVerifier(SECRET, "", clock)
    headers = signed(clock)
    assert refused(verifier, headers, method="PUT") == 401
    assert refused(verifier, headers, target="/v1/objects/x") == 401
    assert refused(verifier, headers | {"fusecache-hops": "2"}) == 401
    assert refused(verifier, headers | {"fusecache-only": "stored"}) == 401
    assert verifier.verify_request("GET", "/v1/objects", headers) == "me"
    assert refused(verifier, headers) == 401
    clock.now += 61
    assert refused(verifier, headers) == 401


def test_another_secret_tenant_or_clock() -> None:
    clock = Clock()
    verifier = RequestVerifier(SECRET, "red", clock)
    assert refused(verifier, signed(clock, secret="another secret of ours")) == 401
    assert refused(verifier, signed(clock, tenant="blue")) == 403
    assert refused(verifier, {}) == 401
    with pytest.raises(RequestError) as caught:
        verifier.verify_request("GET", "/v1/objects", signed(clock, tenant="red", offset=-600))
    assert caught.value.status == 401
    assert caught.value.headers["Fusecache-Time"] == "1000000"
    assert caught.value.extra_fields == {"reason": "clock"}
    assert verifier.verify_request("GET", "/v1/objects", signed(clock, tenant="red", offset=30)) == "me"


@given(st.text(max_size=200))
def test_no_authorization_is_too_odd(text: str) -> None:
    verifier = RequestVerifier(SECRET, "", Clock())
    for value in (text, f"Fusecache-HMAC-SHA256 {text}"):
        assert refused(verifier, {"authorization": value}) == 401
