"""The accesses of SGLang's loader. A replay: SGLang itself does not install without CUDA.

`tests/engines/loaders.py` says what is replayed, and after which code. Each rank is a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import models
from tests.engines.library import Library
from tests.engines.loaders import staggered
from tests.engines.process import Engine, environment
from tests.support.live import HANG, background
from tests.support.mounting import needs_fuse

_SHARDS = 12  # more than the window of 9
_RANKS = 2
_DEFAULT: dict[str, object] = {}


@pytest.fixture(scope="module")
def ranks(home: Path) -> Iterator[list[Engine]]:
    """A process per rank."""
    engines = [
        Engine("tests.engines.loaders", home / f"rank-{rank}.log", environment(home))
        for rank in range(_RANKS)
    ]
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.shards(tmp_path_factory.mktemp("sglang") / "model", _SHARDS)


@needs_fuse
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", _DEFAULT),
        ("staggered", {"stagger": 2}),
        ("without-mmap", {"how": "read"}),
        ("dropping-caches", {"drop": True}),
    ],
)
def test_every_rank_gets_what_a_local_copy_has(
    name: str, options: dict[str, object], library: Library, ranks: list[Engine], local: Path
) -> None:
    """Both ranks at once, cold: together they cost one download."""

    def load(folder: str) -> list[dict[str, str]]:
        started = [
            background(
                lambda rank=rank, engine=engine: engine.call(
                    "sglang", folder=folder, rank=rank, ranks=_RANKS, **options
                )
            )
            for rank, engine in enumerate(ranks)
        ]
        return [future.result(4 * HANG) for future in started]

    wanted = load(str(local))
    cold, warm = library.cold_and_warm(library.serve(f"sglang-{name}", local), load)
    assert cold == wanted
    assert warm == wanted


def test_ranks_begin_at_shards_of_their_own() -> None:
    files = [Path(str(number)) for number in range(10)]
    assert staggered(files, 1, 2, 0) == files
    names = ["".join(map(str, staggered(files, rank, 2, 2))) for rank in range(2)]
    assert names == ["0123456789", "2301674589"]
