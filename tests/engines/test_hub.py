"""Cache folders of huggingface_hub in a bucket. An object store has no symbolic links, and they are made of them.

In the cache each file of a snapshot is a link to a blob. The fate of a link is the uploader's choice: most follow
it and store a copy; some store a small object that holds the target; some leave it out. The mount shows what is
there: copies work everywhere, the others are what they are, as on a local disk with the same files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import models
from tests.engines.library import Library
from tests.engines.process import Engine, EngineError
from tests.support.live import read_file
from tests.support.mounting import failing, needs_fuse, s3_environment

pytestmark = needs_fuse

_REPOSITORY = "acme/tiny"
_REVISION = "0123456789abcdef0123456789abcdef01234567"
_SNAPSHOT = f"models--acme--tiny/snapshots/{_REVISION}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a download of the repository leaves on a disk."""
    root = tmp_path_factory.mktemp("hub")
    made = models.llama(root / "model", layers=1)
    repository = root / "cache" / "models--acme--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / _REVISION
    for folder in (blobs, snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(_REVISION)
    for file in made.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    return root / "cache"


def found(loaders: Engine, cache: Path) -> dict[str, object]:
    """The repositories that huggingface_hub finds in a cache, the path of the cache left out."""
    result = loaders.call("hub", cache=str(cache), repository=_REPOSITORY)
    return result | {"folder": str(Path(result["folder"]).relative_to(cache))}


def test_copies_of_linked_files_are_a_cache(plain: Library, loaders: Engine, cache: Path) -> None:
    """As `aws s3 cp --recursive`, s5cmd and gcloud store it. The blobs beside the copies are never fetched."""
    wanted = found(loaders, cache)
    assert wanted["folder"] == _SNAPSHOT
    assert wanted["scanned"] == [_REPOSITORY]
    folder = plain.serve("hub-copies", cache)
    cold, warm = plain.cold_and_warm(folder, lambda path: found(loaders, Path(path)))
    assert cold == warm == wanted
    blobs = list((folder / "models--acme--tiny/blobs").iterdir())
    assert blobs
    assert all(os.getxattr(blob, "user.fusecache.cached_bytes") == b"0" for blob in blobs)


def link_objects(library: Library, name: str, cache: Path) -> Path:
    """Upload a cache whose links become objects that hold their target."""
    for file in sorted(cache.rglob("*")):
        key = f"{library.prefix}/{name}/{file.relative_to(cache)}"
        if file.is_symlink():
            library.bucket.put(key, os.fsencode(os.readlink(file)))
        elif file.is_file():
            library.bucket.put(key, file.read_bytes())
    return library.shown(name)


def test_an_object_that_holds_a_target_is_a_file_with_that_text(
    plain: Library, loaders: Engine, cache: Path
) -> None:
    """It is not taken for a link: nothing in its metadata or content says for sure that it is one."""
    folder = link_objects(plain, "hub-targets", cache)
    for link in (cache / _SNAPSHOT).iterdir():
        shown = folder / _SNAPSHOT / link.name
        assert not shown.is_symlink()
        assert failing(lambda shown=shown: os.readlink(shown)) == "EINVAL"
        assert read_file(shown).decode() == os.readlink(link)
        # The target as it is written leads to the blob, which is whole.
        assert read_file(Path(os.path.normpath(shown.parent / os.readlink(link)))) == link.read_bytes()
    with pytest.raises(EngineError) as told:
        loaders.call("safetensors_mmap", folder=str(folder / _SNAPSHOT))
    assert told.value.kind == "SafetensorError"


def test_links_that_were_left_out_are_a_clear_error(
    plain: Library, loaders: Engine, cache: Path, tmp_path: Path
) -> None:
    """As with `--no-follow-symlinks`: the blobs are there, the snapshot is not. The same error as on a disk."""
    for place, serve in (
        ("disk", lambda path: path),
        ("mount", lambda path: plain.serve("hub-left-out", path)),
    ):
        without = tmp_path / place
        shutil.copytree(cache, without, symlinks=True)
        shutil.rmtree(without / "models--acme--tiny" / "snapshots")
        with pytest.raises(EngineError) as told:
            loaders.call("hub", cache=str(serve(without)), repository=_REPOSITORY)
        assert told.value.kind == "LocalEntryNotFoundError", place


_COPIES = ("rclone", "copy", "--copy-links", "{folder}", ":s3:{address}")
_LINKS = ("rclone", "copy", "--links", "{folder}", ":s3:{address}")


@pytest.mark.engines
@pytest.mark.parametrize(
    ("command", "suffix"),
    [(("s5cmd", "cp", "{folder}/", "s3://{address}/"), ""), (_COPIES, ""), (_LINKS, ".rclonelink")],
    ids=["s5cmd", "rclone-copies", "rclone-links"],
)
def test_what_uploaders_make_of_links(
    command: tuple[str, ...], suffix: str, plain: Library, loaders: Engine, cache: Path
) -> None:
    name = "-".join(["hub", command[0], command[2].strip("-{}/")])
    folder = uploaded(command, plain, name, cache)
    names = {file.name for file in (cache / _SNAPSHOT).iterdir()}
    assert {file.name for file in (folder / _SNAPSHOT).iterdir()} == {name + suffix for name in names}
    if suffix:
        link = folder / _SNAPSHOT / f"config.json{suffix}"
        assert read_file(link).decode() == os.readlink(cache / _SNAPSHOT / "config.json")
    else:
        assert found(loaders, folder) == found(loaders, cache)


def uploaded(command: tuple[str, ...], library: Library, name: str, folder: Path) -> Path:
    """Run the uploader; the folder on the mount."""
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        pytest.skip(f"{command[0]} is not installed")
    server = library.bucket.server
    address = f"{library.bucket.name}/{library.prefix}/{name}"
    settings = {"S3_ENDPOINT_URL": server.endpoint, "RCLONE_CONFIG": os.devnull}
    settings |= {"RCLONE_S3_PROVIDER": "SeaweedFS", "RCLONE_S3_ENV_AUTH": "true"}
    settings |= {"RCLONE_S3_ENDPOINT": server.endpoint, "RCLONE_S3_NO_CHECK_BUCKET": "true"}
    done = subprocess.run(
        [program, *(word.format(folder=folder, address=address) for word in command[1:])],
        env=s3_environment(server) | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return library.shown(name)
