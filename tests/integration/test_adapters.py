"""Adapters by the hundred, loaded at random: few requests, the files of one together, and nobody else's."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests.support.faulty import FaultyServer
from tests.support.live import HANG, cached, status
from tests.support.mounting import RealMount, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, S3Server, wait_until

pytestmark = needs_fuse

ADAPTERS = 300
FLAT = 40
LOADED = 40
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tensor(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(5000).astype(np.float32)


def folder(number: int) -> str:
    return f"adapters/team-{number % 7}/lora-{number:04d}"


def flat(number: int) -> str:
    return f"flat/lora-{number:04d}.safetensors"


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> S3Bucket:
    """300 adapters in folders of their own, and 40 files in one folder."""
    made = s3_server.bucket()

    def put(number: int) -> None:
        weights = save({"lora": tensor(number)})
        made.put(f"{folder(number)}/{CONFIG}", json.dumps({"peft_type": "LORA", "r": number}).encode())
        made.put(f"{folder(number)}/{WEIGHTS}", weights)
        if number < FLAT:
            made.put(flat(number), weights)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(ADAPTERS)))
    return made


@pytest.fixture
def served(bucket: S3Bucket, s3_server: S3Server, tmp_path: Path) -> Iterator[tuple[RealMount, FaultyServer]]:
    """A mount with an empty cache, and the proxy in front of the origin that sees its requests."""
    with (
        FaultyServer(s3_server.endpoint) as proxy,
        mounted(bucket.url, tmp_path, env=s3_environment(s3_server, proxy.url)) as mount,
    ):
        yield mount, proxy


def fetched(proxy: FaultyServer) -> Counter[str]:
    """Requests for bytes, by key."""
    found = [request for request in proxy.seen if request.kind in ("RANGE", "GET")]
    return Counter(request.path.split("/", 2)[2] for request in found)


def metadata(proxy: FaultyServer) -> int:
    return sum(request.kind in ("LIST", "HEAD") for request in proxy.seen)


def quiet(mount: RealMount) -> None:
    """Until nothing is fetched or planned any more."""

    def done() -> bool:
        loader = status(mount)["loader"]
        return not (loader["fetching"] or loader["planned"] or loader["waiting_reads"])

    wait_until(done, "the end of all fetches", HANG)


LOADER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
from tests.integration.test_adapters import CONFIG, WEIGHTS, flat, folder, tensor

def load(number):
    home = Path(sys.argv[1]) / folder(number)
    assert json.loads((home / CONFIG).read_bytes())["r"] == number
    assert not (home / "new_embeddings.safetensors").exists()
    np.testing.assert_array_equal(load_file(home / WEIGHTS)["lora"], tensor(number))

def load_flat(number):
    np.testing.assert_array_equal(load_file(Path(sys.argv[1]) / flat(number))["lora"], tensor(number))

with ThreadPoolExecutor(int(sys.argv[3])) as pool:
    list(pool.map(globals()[sys.argv[2]], map(int, sys.argv[4:])))
"""
"""As an engine does: the configuration, then every tensor; compared with what was put there. A process of its own: the
proxy must not wait for a thread that touches a mapping and holds Python's lock."""


def load(mount: RealMount, *numbers: int, how: str = "load", threads: int = 4) -> None:
    """Load adapters of these numbers, or files of the flat folder ("load_flat")."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(mount.path), how, str(threads), *map(str, numbers)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_one_listing_serves_all_and_each_byte_is_fetched_once(served: tuple[RealMount, FaultyServer]) -> None:
    mount, proxy = served
    chosen = random.Random(3).sample(range(ADAPTERS), LOADED)
    load(mount, *chosen)
    quiet(mount)
    assert metadata(proxy) / LOADED <= 0.1
    assert fetched(proxy) == Counter(
        {f"{folder(number)}/{name}": 1 for number in chosen for name in (CONFIG, WEIGHTS)}
    )
    before = len(proxy.seen)
    load(mount, *chosen)
    assert len(proxy.seen) == before


def test_the_configuration_brings_the_weights(served: tuple[RealMount, FaultyServer]) -> None:
    mount, proxy = served
    home = mount.path / folder(5)
    (home / CONFIG).read_bytes()
    wait_until(lambda: cached(home / WEIGHTS) == (home / WEIGHTS).stat().st_size, "the weights", HANG)
    quiet(mount)
    assert set(fetched(proxy)) == {f"{folder(5)}/{CONFIG}", f"{folder(5)}/{WEIGHTS}"}
    load(mount, 5)


def test_the_weights_come_while_the_configuration_is_on_its_way(
    served: tuple[RealMount, FaultyServer],
) -> None:
    mount, proxy = served
    asked = threading.Event()
    proxy.before(asked.set, match=lambda request: request.path.endswith(f"{folder(8)}/{WEIGHTS}"))
    proxy.before(
        lambda: None if asked.wait(HANG) else pytest.fail("the weights were not asked for"),
        match=lambda request: request.path.endswith(f"{folder(8)}/{CONFIG}"),
    )
    load(mount, 8)
    assert asked.is_set()


def test_a_folder_of_files_that_only_look_alike_is_left_alone(
    served: tuple[RealMount, FaultyServer],
) -> None:
    mount, proxy = served
    load(mount, 7, 31, how="load_flat")
    quiet(mount)
    assert set(fetched(proxy)) == {flat(7), flat(31)}
