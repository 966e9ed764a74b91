"""The statements of manifests, and those that hostile ones don't get through; whose word counts for a file."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from fusecache.attest.digests import ExpectedDigests, ManifestReplacedError
from fusecache.attest.manifests import MAX_MANIFEST_BYTES, is_manifest, manifest_keys, parse_manifest
from fusecache.attest.signing import ManifestKey, parse_signature
from fusecache.attest.sums import parse_single, parse_sums
from fusecache.errors import AttestationError, VersionChangedError
from fusecache.types import ObjectVersion
from tests.support.content import content
from tests.support.signed import FILES, PUBLIC_KEY, SIGNATURE, key_pair, sign, signature_of, statement, sums

A, B = hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest()
KEY, PUBLIC = key_pair()


# -- sha256sum


def test_what_sha256sum_writes_is_read(tmp_path: Path) -> None:
    names = ["a", "with space", "back\\slash", "new\nline", "ünï", "*star", " lead"]
    (tmp_path / "sub").mkdir()
    names.append("sub/deep")
    for name in names:
        (tmp_path / name).write_text(name)
    expected = {name: hashlib.sha256(name.encode()).digest() for name in names}
    for options in ([], ["-b"], ["--tag"]):
        written = subprocess.run(
            ["sha256sum", *options, "--", *names], cwd=tmp_path, capture_output=True, check=True
        ).stdout
        assert parse_sums(written) == expected


def test_comments_blank_lines_crlf_and_dots_are_fine() -> None:
    text = f"# made by hand\r\n\r\n{A.hex().upper()} *./x\r\n{A.hex()}  ././x\n"
    assert parse_sums(text.encode()) == {"x": A}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{A.hex()}  ../up", "is no name below"),
        (f"{A.hex()}  a/../../up", "is no name below"),
        (f"{A.hex()}  /etc/passwd", "is no name below"),
        (f"{A.hex()}  a//b", "is no name below"),
        (f"{A.hex()}  a/./b", "is no name below"),
        (f"{A.hex()}  a\0b", "is no name below"),
        (f"\\{A.hex()}  ..\\n/x\n{A.hex()}  ..", "line 2"),
        (f"{A.hex()[:-1]}  short", "not a line of sha256sum"),
        (f"{A.hex()[:-1]}g  letter", "not a line of sha256sum"),
        (f"{A.hex()}x  long", "not a line of sha256sum"),
        ("d41d8cd98f00b204e9800998ecf8427e  md5", "not a line of sha256sum"),
        ("<html>not found</html>", "not a line of sha256sum"),
        (f"{A.hex()}  ", "not a line of sha256sum"),
        (f"{A.hex()}  x\n{B.hex()}  x", "line 2: two digests for 'x'"),
        (f"{A.hex()}  x\n{B.hex()}  ./x", "line 2: two digests for 'x'"),
    ],
)
def test_one_wrong_line_voids_all(line: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_sums(f"{A.hex()}  good\n{line}\n".encode() if "line 2" not in says else line.encode())


@given(st.binary(max_size=300))
def test_junk_is_a_value_error_or_harmless(text: bytes) -> None:
    for parse in (parse_sums, lambda data: parse_single(data, "x"), lambda data: parse_signature(data, None)):
        try:
            found = parse(text)
        except ValueError:
            continue
        if isinstance(found, dict):
            assert all(len(digest) == 32 and ".." not in name.split("/") for name, digest in found.items())


def test_a_file_about_one_file() -> None:
    for text in (
        A.hex(),
        f"{A.hex()}\n",
        f"{A.hex()}  x\n",
        f"{A.hex()}  /build/out/x\n",
        f"SHA256 (x) = {A.hex()}",
    ):
        assert parse_single(text.encode(), "x") == A
    for text, says in (
        ("", "0 lines"),
        (f"{A.hex()}  x\n{A.hex()}  y\n", "2 lines"),
        (f"{A.hex()}  y\n", "it is about 'y'"),
        ("nonsense", "not a line"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_single(text.encode(), "x")


# -- model signing


def test_a_signature_of_the_tool_itself_is_read_and_verified() -> None:
    expected = {name: hashlib.sha256(content(name, 1, 0, size)).digest() for name, size in FILES.items()}
    text, key = SIGNATURE.read_bytes(), ManifestKey(PUBLIC_KEY.read_bytes())
    assert parse_signature(text, key) == expected
    assert parse_signature(text, None) == expected
    assert len(key.anchor) == 8


def bundle(**changes: Any) -> dict[str, Any]:
    said = statement({"x": A}) | changes
    return sign(said, KEY)


def tampered(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    made = bundle()
    change(made)
    return made


def other_payload(made: dict[str, Any]) -> None:
    made["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement({"x": B})).encode()).decode()


def other_type(made: dict[str, Any]) -> None:
    made["dsseEnvelope"]["payloadType"] = "text/plain"


def no_signature(made: dict[str, Any]) -> None:
    made["dsseEnvelope"]["signatures"] = []


def odd_signature(made: dict[str, Any]) -> None:
    made["dsseEnvelope"]["signatures"] = ["x", {"sig": 7}]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (tampered(other_payload), "not signed with manifest_key"),
        (tampered(other_type), "no in-toto statement"),
        (tampered(no_signature), "not signed with manifest_key"),
        (tampered(odd_signature), "no base64"),
        (sign(statement({"x": A}), key_pair()[0]), "not signed with manifest_key"),
        (sign({**statement({"x": A}), "_type": "x"}, KEY), "no in-toto statement"),
        (sign([], KEY), "no in-toto statement"),
        (sign(statement({"../x": A}), KEY), "no name below"),
        (sign(statement({"x": b"short"}), KEY), "no sha256"),
        (bundle(subject=[]), "not those of the model"),
        (bundle(subject=[{"name": "m", "digest": {"sha256": B.hex()}}]), "not those of the model"),
        (
            bundle(predicate={"serialization": {"method": "shards"}, "resources": []}),
            "sign the model by files",
        ),
        (bundle(predicate={"serialization": {"method": "files"}}), "no resources"),
        (bundle(predicate={"serialization": {"method": "files"}, "resources": ["x"]}), "not sha256"),
        (bundle(predicate=7), "no predicate"),
        (
            bundle(
                predicate={
                    "serialization": {"method": "files"},
                    "resources": [{"name": "x", "algorithm": "blake3", "digest": A.hex()}],
                }
            ),
            "not sha256",
        ),
        ({}, "no dsseEnvelope"),
        ([], "no dsseEnvelope"),
        ({"dsseEnvelope": {"payload": "%%%"}}, "no base64"),
    ],
)
def test_what_is_wrong_with_a_signature_is_said(made: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_signature(json.dumps(made).encode(), ManifestKey(PUBLIC))


def test_a_statement_that_names_files_as_its_subjects() -> None:
    said = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "https://slsa.dev/provenance/v1",
        "subject": [
            {"name": "x", "digest": {"sha256": A.hex()}},
            {"name": "y", "digest": {"sha256": B.hex()}},
        ],
    }
    text = json.dumps(sign(said, KEY)).encode()
    assert parse_signature(text, ManifestKey(PUBLIC)) == {"x": A, "y": B}


def test_json_that_nests_deeply_is_refused() -> None:
    with pytest.raises(ValueError, match="it is no JSON"):
        parse_signature(b'{"a":' * 100_000, None)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_keys_that_model_signing_takes_are_taken(curve: ec.EllipticCurve) -> None:
    private = ec.generate_private_key(curve)
    assert ManifestKey(pem(private.public_key())).has_signed(b"x", b"nonsense") is False


def pem(key: Any) -> bytes:
    return bytes(
        key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def test_other_keys_are_refused() -> None:
    others = [
        b"",
        b"-----BEGIN PUBLIC KEY-----\nxx\n-----END PUBLIC KEY-----\n",
        pem(ed25519.Ed25519PrivateKey.generate().public_key()),
        pem(ec.generate_private_key(ec.SECP256K1()).public_key()),
    ]
    for key in others:
        with pytest.raises(ValueError, match=r"is no (public key in PEM|EC key on)"):
            ManifestKey(key)


# -- which files are manifests


def test_manifests_are_known_by_name_and_size() -> None:
    for name in ("SHA256SUMS", "a/sha256sums.txt", "m/model.sig", "m/x.safetensors.sha256"):
        assert is_manifest(ObjectVersion("o", name, "", MAX_MANIFEST_BYTES, 0))
        assert not is_manifest(ObjectVersion("o", name, "", MAX_MANIFEST_BYTES + 1, 0))
    for name in ("x.safetensors", "SHA256SUMS/x", "model.sig.bin"):
        assert not is_manifest(ObjectVersion("o", name, "", 1, 0))


def test_manifests_are_looked_for_beside_a_file_and_above_it() -> None:
    found = list(manifest_keys("a/b/x.bin", is_signed=False))
    assert found[:3] == ["a/b/x.bin.sha256", "a/b/x.bin.sha256sum", "a/b/model.sig"]
    assert {"a/b/SHA256SUMS", "a/SHA256SUMS", "SHA256SUMS", "a/model.sig", "model.sig"} <= set(found)
    assert list(manifest_keys("a/b/x.bin", is_signed=True)) == ["a/b/model.sig", "a/model.sig", "model.sig"]
    assert list(manifest_keys("x", is_signed=True)) == ["model.sig"]


def test_a_manifest_speaks_of_files_below_its_folder() -> None:
    assert parse_manifest("m/SHA256SUMS", sums({"s/x": b"a"}), None) == {"m/s/x": A}
    assert parse_manifest("SHA256SUMS", sums({"x": b"a"}), None) == {"x": A}
    assert parse_manifest("m/x.sha256", A.hex().encode(), None) == {"m/x": A}
    assert parse_manifest("m/model.sig", signature_of({"x": b"a"}, KEY), ManifestKey(PUBLIC)) == {"m/x": A}


# -- whose word counts


class Folder:
    """A source in memory, and what was asked of it."""

    def __init__(self, files: Mapping[str, bytes], metadata: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files)
        self.metadata = dict(metadata or {})
        self.reads: list[str] = []
        self.asked: list[str] = []

    def version(self, key: str) -> ObjectVersion:
        data = self.files.get(key, b"")
        return ObjectVersion("o", key, hashlib.md5(data).hexdigest(), len(data), 0)

    def find(self, _about: ObjectVersion, key: str) -> ObjectVersion | None:
        return self.version(key) if key in self.files else None

    def read(self, version: ObjectVersion, _source: str) -> bytes:
        self.reads.append(version.key)
        if version != self.version(version.key):
            raise VersionChangedError("changed")
        return self.files[version.key]

    def ask(self, version: ObjectVersion, _source: str) -> bytes | None:
        self.asked.append(version.key)
        return self.metadata.get(version.key)

    def digests(self, key: ManifestKey | None = None) -> ExpectedDigests:
        return ExpectedDigests(self.find, self.read, self.ask, key)

    def says(self, key: str, digests: ExpectedDigests | None = None) -> tuple[bytes, str]:
        found = (digests or self.digests()).find_expected(self.version(key), "")
        return found.sha256, found.stated_by


def test_each_kind_of_manifest_counts() -> None:
    for name, text in {
        "m/SHA256SUMS": sums({"x": b"a"}),
        "sha256sums.txt": sums({"m/x": b"a"}),
        "m/x.sha256": A.hex().encode(),
        "model.sig": signature_of({"m/x": b"a"}, KEY),
    }.items():
        folder = Folder({name: text})
        assert folder.says("m/x") == (A, name)
        assert folder.asked == []


def test_the_origin_is_asked_once_and_only_where_no_manifest_speaks() -> None:
    folder = Folder({"SHA256SUMS": sums({"other": b"a"})}, {"x": B})
    digests = folder.digests()
    for _ in range(3):
        assert folder.says("x", digests) == (B, "the origin's metadata")
        with pytest.raises(AttestationError, match="y is in no manifest, and the origin has no sha256 of it"):
            folder.says("y", digests)
    assert folder.asked == ["x", "y"]
    assert folder.reads == ["SHA256SUMS"]
    folder.metadata["y"] = A
    digests.forget_metadata()
    assert folder.says("y", digests) == (A, "the origin's metadata")


def test_manifests_have_to_agree() -> None:
    folder = Folder({"SHA256SUMS": sums({"x": b"a"}), "x.sha256": A.hex().encode()})
    assert folder.says("x") == (A, "x.sha256")
    folder.files["model.sig"] = signature_of({"x": b"b"}, KEY)
    with pytest.raises(AttestationError, match=r"x\.sha256 and model\.sig say different things"):
        folder.says("x")


def test_a_manifest_that_is_broken_counts_for_nothing() -> None:
    folder = Folder({"SHA256SUMS": b"<html>", "x.sha256": A.hex().encode()})
    assert folder.says("x") == (A, "x.sha256")
    with pytest.raises(AttestationError, match="y is attested by nobody: SHA256SUMS: line 1: not a line"):
        folder.says("y")


def test_a_huge_manifest_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecache.attest.digests.MAX_MANIFEST_BYTES", 10)
    folder = Folder({"SHA256SUMS": sums({"x": b"a"})})
    with pytest.raises(AttestationError, match="in no manifest"):
        folder.says("x")
    assert folder.reads == []


def test_a_new_version_of_a_manifest_is_read() -> None:
    folder = Folder({"SHA256SUMS": sums({"x": b"a"})})
    digests = folder.digests()
    assert folder.says("x", digests)[0] == A
    folder.files["SHA256SUMS"] = sums({"x": b"b"})
    assert folder.says("x", digests)[0] == B


def test_a_manifest_that_is_replaced_while_it_is_read_is_told() -> None:
    folder = Folder({"SHA256SUMS": sums({"x": b"a"})})
    old = folder.version("SHA256SUMS")
    digests = ExpectedDigests(
        lambda _about, key: old if key == "SHA256SUMS" else None, folder.read, folder.ask
    )
    folder.files["SHA256SUMS"] = b"new"
    with pytest.raises(ManifestReplacedError):
        folder.says("x", digests)


def test_with_a_key_only_what_it_signed_counts() -> None:
    key = ManifestKey(PUBLIC)
    folder = Folder({"SHA256SUMS": sums({"x": b"b"}), "x.sha256": B.hex().encode()}, {"x": B})
    with pytest.raises(AttestationError, match=r"x is in no model\.sig that was signed with manifest_key"):
        folder.says("x", folder.digests(key))
    folder.files["model.sig"] = signature_of({"x": b"b"}, key_pair()[0])
    with pytest.raises(AttestationError, match=r"nobody: model\.sig: it was not signed with manifest_key"):
        folder.says("x", folder.digests(key))
    folder.files["model.sig"] = signature_of({"x": b"a"}, KEY)
    assert folder.says("x", folder.digests(key)) == (A, "model.sig")
    assert folder.asked == []


def test_what_is_remembered_of_manifests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecache.attest.digests._MAX_MANIFEST_ENTRIES", 5)
    folder = Folder({f"{n}/SHA256SUMS": sums({f"{i}": b"a" for i in range(3)}) for n in range(4)})
    digests = folder.digests()
    for n in range(4):
        assert folder.says(f"{n}/0", digests)[0] == A
    assert len(digests._manifests) == 1
