"""verify=manifest through real mounts: what may be opened, what may not, and what is asked of the origin for that."""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fusecache.errors import DaemonUnreachableError
from tests.support.content import check, content
from tests.support.faulty import FaultyServer, Request, gets
from tests.support.live import (
    HANG,
    MIB,
    Gate,
    asked,
    background,
    covers,
    in_time,
    is_right,
    kill_daemon,
    read_file,
    status,
)
from tests.support.mounting import RealMount, command, failing, mounted, needs_fuse, s3_environment
from tests.support.origins import QUICK, opened, s3_config
from tests.support.servers import GcsServer, S3Bucket, S3Server, wait_until
from tests.support.signed import FILES, PUBLIC_KEY, SIGNATURE, key_pair, signature_of, sums

pytestmark = needs_fuse

SIZE = 3 * MIB + 77
GOOD = "model-1.safetensors"
NEXT = "model-2.safetensors"
BAD = "tampered.safetensors"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def made(key: str) -> bytes:
    return content(key, 1, 0, SIZE)


def opening(path: Path) -> str:
    """The errno of an open, which must not hang."""
    return in_time(lambda: failing(lambda: os.open(path, os.O_RDONLY)))


def of(name: str) -> Any:
    """Matches requests for the bytes of this object."""

    def match(request: Request) -> bool:
        return gets(request) and request.path.endswith("/" + name)

    return match


def bytes_asked(proxy: FaultyServer, name: str) -> int:
    """Requests so far for the bytes of this object."""
    return len([request for request in proxy.seen if of(name)(request)])


def items(mount: RealMount) -> dict[str, dict[str, Any]]:
    """`fusecache ls --json` by path."""
    return {item["path"]: item for item in json.loads(mount.command("ls", str(mount.path), "--json").stdout)}


def waiting_reads(mount: RealMount) -> int:
    """How many reads wait for blocks; none while there is no daemon."""
    try:
        return int(asked(mount, "status")["loader"]["waiting_reads"])
    except DaemonUnreachableError:
        return 0


def log(work: Path) -> str:
    return "".join(path.read_text() for path in (work / "run").glob("*/log"))


@pytest.fixture
def model(s3_bucket: S3Bucket) -> S3Bucket:
    """Two good shards, one that was tampered with, one and a config that nobody speaks of, and the sums."""
    for key in (GOOD, NEXT, BAD):
        s3_bucket.put(f"m/{key}", made(key))
    s3_bucket.put("m/SHA256SUMS", sums({GOOD: made(GOOD), NEXT: made(NEXT), BAD: made("the original")}))
    s3_bucket.put("m/unlisted.safetensors", made("unlisted.safetensors"))
    s3_bucket.put("m/config.json", b"{}")
    return s3_bucket


@pytest.fixture
def environment(s3_server: S3Server, faulty_s3: FaultyServer) -> dict[str, str]:
    return s3_environment(s3_server, faulty_s3.url)


@pytest.mark.expected_log("is not what .* says|is in no manifest")
def test_what_a_manifest_says_is_shown_and_nothing_else(
    model: S3Bucket, environment: dict[str, str], faulty_s3: FaultyServer, tmp_path: Path, stack: ExitStack
) -> None:
    mount = stack.enter_context(mounted(model.url, tmp_path, env=environment, verify="manifest"))
    folder = mount.path / "m"
    is_right(folder / GOOD, GOOD, SIZE)
    assert read_file(folder / "SHA256SUMS") == model.get("m/SHA256SUMS")
    assert opening(folder / BAD) == "EBADMSG"
    fetched = bytes_asked(faulty_s3, BAD)
    for _ in range(3):
        assert opening(folder / BAD) == "EBADMSG"
    assert bytes_asked(faulty_s3, BAD) == fetched
    for name in ("unlisted.safetensors", "config.json"):
        for _ in range(2):
            assert opening(folder / name) == "EBADMSG"
        assert bytes_asked(faulty_s3, name) == 0 or name.startswith("unlisted")  # that one is the next shard
    assert faulty_s3.counts()["HEAD"] == 2  # one each, for what no manifest speaks of
    assert (folder / BAD).stat().st_size == SIZE  # it is seen, it can't be opened
    found = items(mount)
    assert found[f"m/{GOOD}"]["mark"] == "attested"
    assert (found[f"m/{BAD}"]["mark"], found[f"m/{BAD}"]["bytes"]) == ("quarantined", 0)
    told = status(mount)
    assert told["cache"]["objects_quarantined"] == 1
    assert told["manifest"]["quarantined"] == 1
    if told["mode"]["now"] == "passthrough":
        assert told["opens"] == {
            "passthrough": 2,
            "daemon": 0,
        }  # the shard, and the sums, which the daemon read
    assert "1 files are not what their manifest says" in mount.command("status", str(mount.path)).stdout
    assert "quarantined" in mount.command("ls", str(mount.path)).stdout
    said = [line for line in log(tmp_path).splitlines() if f"m/{BAD} is not what m/SHA256SUMS says" in line]
    assert len(said) == 1
    assert hashlib.sha256(made(BAD)).hexdigest() in said[0]
    assert hashlib.sha256(made("the original")).hexdigest() in said[0]
    done = mount.command("fetch", str(folder / BAD), check=False)
    assert done.returncode == 1
    assert "is in quarantine" in done.stderr


@pytest.mark.expected_log("is not what .* says")
def test_the_outcome_outlives_the_mount(
    model: S3Bucket, environment: dict[str, str], faulty_s3: FaultyServer, tmp_path: Path, stack: ExitStack
) -> None:
    options: dict[str, object] = {"verify": "manifest", "prefetch_budget": 0}
    with mounted(model.url, tmp_path, env=environment, **options) as mount:
        is_right(mount.path / "m" / GOOD, GOOD, SIZE)
        assert opening(mount.path / "m" / BAD) == "EBADMSG"
    faulty_s3.reset_counts()
    mount = stack.enter_context(mounted(model.url, tmp_path, env=environment, **options))
    is_right(mount.path / "m" / GOOD, GOOD, SIZE)
    assert not [request for request in faulty_s3.seen if gets(request) or request.kind == "HEAD"]
    assert status(mount)["manifest"]["attested"] == 0  # not hashed again, either
    assert opening(mount.path / "m" / BAD) == "EBADMSG"
    assert bytes_asked(faulty_s3, BAD) == 0
    # evicted: it is fetched, and looked at, once more
    mount.command("evict", str(mount.path / "m" / BAD))
    assert opening(mount.path / "m" / BAD) == "EBADMSG"
    assert bytes_asked(faulty_s3, BAD) > 0
    # the right one is uploaded
    model.put(f"m/{BAD}", made("the original"))
    mount.command("refresh", str(mount.path))
    check(read_file(mount.path / "m" / BAD), "the original", 1)
    # the manifest is mended, for what was found before
    model.put("m/SHA256SUMS", sums({"config.json": b"no"}))
    mount.command("refresh", str(mount.path))
    assert opening(mount.path / "m" / "config.json") == "EBADMSG"
    assert items(mount)["m/config.json"]["mark"] == "quarantined"
    model.put("m/SHA256SUMS", sums({"config.json": b"{}"}))
    mount.command("refresh", str(mount.path))
    assert read_file(mount.path / "m" / "config.json") == b"{}"


@pytest.mark.expected_log("is not what .* says")
def test_every_source_of_digests(
    s3_bucket: S3Bucket, environment: dict[str, str], tmp_path: Path, stack: ExitStack
) -> None:
    """A file about one file, a signature of the tool itself, and what S3 and the uploader keep in the metadata."""
    digest = hashlib.sha256(made("x.bin"))
    s3_bucket.put("one/x.bin", made("x.bin"))
    s3_bucket.put("one/x.bin.sha256", f"{digest.hexdigest()}  x.bin\n".encode())
    for name, size in FILES.items():
        s3_bucket.put(f"signed/{name}", content(name, 1, 0, size))
    s3_bucket.put("signed/model.sig", SIGNATURE.read_bytes())
    s3_bucket.put("meta/a.bin", made("a.bin"), ChecksumAlgorithm="SHA256")
    s3_bucket.put("meta/b.bin", made("b.bin"), Metadata={"sha256": hashlib.sha256(made("b.bin")).hexdigest()})
    s3_bucket.put("meta/c.bin", made("c.bin"), Metadata={"sha256": "00" * 32})
    mount = stack.enter_context(mounted(s3_bucket.url, tmp_path, env=environment, verify="manifest"))
    is_right(mount.path / "one" / "x.bin", "x.bin", SIZE)
    for name, size in FILES.items():
        is_right(mount.path / "signed" / name, name, size)
    for name in ("a.bin", "b.bin"):
        is_right(mount.path / "meta" / name, name, SIZE)
    assert opening(mount.path / "meta" / "c.bin") == "EBADMSG"


@pytest.mark.expected_log("it was not signed with manifest_key")
def test_with_a_key_only_what_it_signed_can_be_opened(
    s3_bucket: S3Bucket, environment: dict[str, str], tmp_path: Path, stack: ExitStack
) -> None:
    stranger, _ = key_pair()
    for name, size in FILES.items():
        s3_bucket.put(f"signed/{name}", content(name, 1, 0, size))
        s3_bucket.put(f"forged/{name}", content(name, 2, 0, size))
    s3_bucket.put("signed/model.sig", SIGNATURE.read_bytes())
    forged = {name: content(name, 2, 0, size) for name, size in FILES.items()}
    s3_bucket.put("forged/model.sig", signature_of(forged, stranger))
    s3_bucket.put("forged/SHA256SUMS", sums(forged))
    options = {"verify": "manifest", "manifest_key": PUBLIC_KEY}
    with mounted(s3_bucket.url, tmp_path, env=environment, verify="manifest") as mount:
        check(
            read_file(mount.path / "forged" / "config.json"), "config.json", 2
        )  # without a key it is believed
    mount = stack.enter_context(mounted(s3_bucket.url, tmp_path, env=environment, **options))
    for name, size in FILES.items():
        is_right(mount.path / "signed" / name, name, size)
        assert opening(mount.path / "forged" / name) == "EBADMSG"
    assert "forged/model.sig: it was not signed with manifest_key" in log(tmp_path)


HOSTILE = {
    "up": ("SHA256SUMS", f"{'ab' * 32}  ../other/x\n", "is no name below this folder"),
    "two": ("SHA256SUMS", f"{'ab' * 32}  {GOOD}\n{'cd' * 32}  {GOOD}\n", "two digests for"),
    "hex": ("SHA256SUMS", f"{'xy' * 32}  {GOOD}\n", "not a line of sha256sum"),
    "deep": ("model.sig", "[" * 50_000, "no JSON"),
    "other": (f"{GOOD}.sha256", f"{'ab' * 32}  other.safetensors\n", "it is about 'other.safetensors'"),
}


@pytest.mark.expected_log("is no manifest that can be used|is attested by nobody")
def test_a_hostile_manifest_is_a_clear_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder, (name, text, _) in HOSTILE.items():
        (source / folder).mkdir(parents=True)
        (source / folder / GOOD).write_bytes(b"weights")
        (source / folder / name).write_text(text)
    with mounted(f"file://{source}", tmp_path, verify="manifest") as mount:
        for folder, (name, text, _) in HOSTILE.items():
            assert opening(mount.path / folder / GOOD) == "EBADMSG"
            assert read_file(mount.path / folder / name) == text.encode()
    for folder, (name, _, says) in HOSTILE.items():
        (line,) = [
            line for line in log(tmp_path).splitlines() if f"{folder}/{GOOD} is attested by nobody" in line
        ]
        assert f"{folder}/{name}: " in line
        assert says in line


_INTERRUPTED = """
import ctypes, errno, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)  # again and again: the first may come before the open
got = libc.open(os.fsencode(sys.argv[1]), os.O_RDONLY)
signal.setitimer(signal.ITIMER_REAL, 0)  # at its exit Python gives signals their default action: death
print(got, errno.errorcode.get(ctypes.get_errno()))
"""


def test_nobody_gets_a_byte_before_the_last_one_came(
    model: S3Bucket, environment: dict[str, str], faulty_s3: FaultyServer, tmp_path: Path, stack: ExitStack
) -> None:
    """An open waits; it can be interrupted; a daemon that dies meanwhile costs it nothing but time."""
    options = {"verify": "manifest", "range_size": "1MiB", "prefetch_budget": 0}
    mount = stack.enter_context(mounted(model.url, tmp_path, env=environment, **options))
    path = mount.path / "m" / GOOD
    gate = Gate(faulty_s3, covers(f"m/{GOOD}", SIZE - 1))
    stack.callback(gate.open)
    waiting = background(lambda: path.read_bytes())
    impatient = subprocess.Popen(
        [sys.executable, "-c", f"open({str(path)!r}, 'rb').read()"], stderr=subprocess.DEVNULL
    )
    stack.callback(impatient.kill)
    gate.wait()
    wait_until(lambda: waiting_reads(mount) == 2, "two opens that wait", HANG)
    impatient.send_signal(signal.SIGTERM)
    assert impatient.wait(HANG) == -signal.SIGTERM
    interrupted = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, path], capture_output=True, text=True, timeout=HANG, check=True
    )
    assert interrupted.stdout.split() == ["-1", "EINTR"]
    assert not waiting.done()
    kill_daemon(mount)
    gate.open()
    check(waiting.result(HANG), GOOD, 1)


def test_open_files_go_on_through_a_restart(
    model: S3Bucket, s3_server: S3Server, tmp_path: Path, stack: ExitStack
) -> None:
    # without prefetch: the next shard would be attested before the restart, or after it
    options: dict[str, object] = {"verify": "manifest", "passthrough": "off", "prefetch_budget": 0}
    mount = stack.enter_context(mounted(model.url, tmp_path, env=s3_environment(s3_server), **options))
    with (mount.path / "m" / GOOD).open("rb") as file:
        check(file.read(1000), GOOD, 1)
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        kill_daemon(mount)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        check(in_time(lambda: mapping[:]), GOOD, 1)
        mapping.close()
    assert status(mount)["manifest"]["attested"] == 0


def test_mistakes_are_told_before_the_mount(
    s3_bucket: S3Bucket, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "nonsense.pem").write_text("nonsense")
    for options, says in {
        f"verify=manifest,manifest_key={tmp_path}/none.pem": "none.pem: No such file or directory",
        f"verify=manifest,manifest_key={tmp_path}/nonsense.pem": "nonsense.pem is no public key in PEM",
        f"manifest_key={tmp_path}/nonsense.pem": "manifest_key means nothing without verify=manifest",
        "verify=manifest,peers.local_copies=owned": "it needs peers.local_copies=all",
    }.items():
        given = f"{options},cache_dir={tmp_path}/cache,runtime_dir={tmp_path}/run"
        done = command(
            "mount", s3_bucket.url, str(tmp_path / "mnt"), "-o", given, env=environment, check=False
        )
        assert done.returncode != 0
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_the_metadata_of_s3_and_gcs(
    s3_bucket: S3Bucket, moto_server: S3Server, gcs_server: GcsServer
) -> None:
    """A checksum of parts is not one of the object; another version has none."""
    data = b"x" * (5 * MIB) + b"y"
    digest = hashlib.sha256(data).digest()
    for bucket in (s3_bucket, moto_server.bucket()):
        bucket.put("checksum", data, ChecksumAlgorithm="SHA256")
        bucket.put("metadata", data, Metadata={"sha256": digest.hex()})
        bucket.put("base64", data, Metadata={"sha256": base64.b64encode(digest).decode()})
        bucket.put("nonsense", data, Metadata={"sha256": "nonsense"})
        at = {"Bucket": bucket.name, "Key": "parts"}
        upload = bucket.client.create_multipart_upload(**at, ChecksumAlgorithm="SHA256")["UploadId"]
        parts = []
        for number, part in enumerate((data[:-1], data[-1:]), 1):
            answer = bucket.client.upload_part(
                **at, UploadId=upload, PartNumber=number, Body=part, ChecksumAlgorithm="SHA256"
            )
            parts.append({"PartNumber": number, **{k: answer[k] for k in ("ETag", "ChecksumSHA256")}})
        bucket.client.complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": parts})
        with opened(s3_config(bucket), QUICK) as origin:
            found = {
                key: origin.read_metadata_sha256(origin.stat_object(key)) for key in sorted(bucket.keys())
            }
        assert found == {
            "checksum": digest,
            "metadata": digest,
            "base64": digest,
            "nonsense": None,
            "parts": None,
        }
