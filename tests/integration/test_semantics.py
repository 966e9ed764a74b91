"""SEMANTICS.md is executed: every example, in its order, in the mountpoint of a real mount."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import RealMount, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, S3Server

pytestmark = [needs_fuse, pytest.mark.expected_log("[0-9]+ keys with ")]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "SEMANTICS.md"
_FENCE = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CONFIG = b'{"model_type": "llama-tiny"}\n'
_SHARD = bytes(range(251)) * 12_000


def examples() -> list[tuple[int, str, str]]:
    """(line, language, text) of each example."""
    text = DOCUMENT.read_text("utf-8")
    return [(text.count("\n", 0, each.start()) + 2, each[1], each[2]) for each in _FENCE.finditer(text)]


@pytest.fixture(scope="module")
def bucket(moto_server: S3Server) -> S3Bucket:
    """The bucket that the document describes; moto also takes keys that a file system would not."""
    made = moto_server.bucket()
    for key, data in {
        "config.json": _CONFIG,
        "llama/config.json": _CONFIG,
        "llama/model-00001-of-00002.safetensors": _SHARD[:3_000_000],
        "llama/model-00002-of-00002.safetensors": _SHARD[1:3_000_001],
        "llama/vocab.txt": b"",
        "notes": b"coffee\n",
        "notes/today.md": b"tea\n",
        "checkpoints/": b"",
        "odd//name": b"x",
        "odd/../name": b"x",
    }.items():
        made.put(key, data)
    return made


@pytest.fixture(scope="module")
def place(bucket: S3Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMount]:
    """The mount that the document describes, and `put` and `delete` on the PATH."""
    work = tmp_path_factory.mktemp("semantics")
    tools = work / "bin"
    tools.mkdir()
    for name, call in {
        "put": "put(sys.argv[1], sys.argv[2].encode())",
        "delete": "delete(sys.argv[1])",
    }.items():
        script = tools / name
        script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from tests.support.servers import S3Bucket, S3Server\n"
            f"server = {bucket.server!r}\nS3Bucket(server, {bucket.name!r}, server.client()).{call}\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    env = s3_environment(bucket.server)
    env |= {"PATH": f"{tools}:{os.environ['PATH']}", "LC_ALL": "C"}
    env.pop("PYTHONSTARTUP", None)
    with mounted(bucket.url, work, env=env, metadata_ttl=0, negative_ttl=0) as mount:
        yield mount


def _run(arguments: list[str], place: RealMount) -> str:
    done = subprocess.run(
        arguments,
        cwd=place.path,
        env=place.env,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return (
        done.stdout
        if arguments[0] == "bash" or done.returncode == 0
        else f"exit {done.returncode}: {done.stdout}"
    )


@pytest.mark.parametrize(
    ("language", "text"), [pytest.param(*rest, id=f"line-{line}-{rest[0]}") for line, *rest in examples()]
)
def test_the_document_says_what_happens(language: str, text: str, place: RealMount) -> None:
    if language == "python":
        assert _run([sys.executable, "-c", text], place) == ""
        return
    transcript = ""
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            transcript += line + _run(["bash", "-c", line[2:]], place)
    assert transcript == text


def test_there_are_examples_of_everything() -> None:
    assert len(examples()) >= 10
    commands = [
        line for _, language, text in examples() if language == "console" for line in text.splitlines()
    ]
    assert all(shlex.split(line) for line in commands if line.startswith("$ "))


_ELSEWHERE = {
    "EIO": "tests/faults/test_origin_through_mount.py",
    "EACCES": "tests/faults/test_origin_through_mount.py",
    "ESTALE": "tests/faults/test_origin_through_mount.py",
    "EBADMSG": "tests/integration/test_manifest.py",
    "EINTR": "tests/integration/test_manifest.py",
}
"""Errors that need an origin or a file that misbehaves: the tests that bring them about."""


def test_every_errno_of_the_document_is_brought_about_exactly() -> None:
    text = DOCUMENT.read_text("utf-8")
    spoken = set(re.findall(r"`(E[A-Z]+)`", text))
    shown = {name for _, _, example in examples() for name in re.findall(r'"(E[A-Z]+)"', example)}
    for name, test in _ELSEWHERE.items():
        assert f'"{name}"' in (ROOT / test).read_text("utf-8"), f"{test} tests {name} no more"
    assert spoken <= shown | _ELSEWHERE.keys()
