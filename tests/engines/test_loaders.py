"""Loaders that need no torch read on the mount, cold and warm, what they read from a local copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines import models
from tests.engines.library import Library
from tests.engines.process import Engine
from tests.support.mounting import needs_fuse

pytestmark = needs_fuse

_MADE: dict[str, Callable[[Path], Path]] = {
    "safetensors_mmap": models.llama,
    "safetensors_pread": models.llama,
    "safetensors_file": models.llama,
    "safetensors_eager": models.llama,
    "safetensors_ranks": models.llama,
    "gguf": models.gguf,
    "llama_cpp_mmap": models.gguf,
    "llama_cpp_read": models.gguf,
    "llama_cpp_direct": models.gguf,
    "tokenizers": models.tokenizer,
    "sentencepiece": models.sentencepiece,
    "onnx": models.onnx,
}


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the model for a loader; made once per kind."""
    root = tmp_path_factory.mktemp("local")

    def made(loader: str) -> Path:
        make = _MADE[loader]
        folder = root / make.__name__
        return folder if folder.exists() else make(folder)

    return made


@pytest.mark.parametrize("loader", _MADE)
def test_content_is_that_of_a_local_copy(
    loader: str, library: Library, loaders: Engine, local: Callable[[str], Path]
) -> None:
    source = local(loader)
    wanted = loaders.call(loader, folder=str(source))
    folder = library.serve(loader, source)
    cold, warm = library.cold_and_warm(folder, lambda path: loaders.call(loader, folder=path))
    assert cold == wanted
    assert warm == wanted
