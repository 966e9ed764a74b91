"""The option reference is what the settings model says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fusecache.cli import options
from fusecache.config.model import MountConfig, SourceConfig, Tuning
from fusecache.config.peer_settings import PeerSettings

FILE = Path(__file__).resolve().parents[2] / "docs" / "OPTIONS.md"


def test_the_reference_is_current() -> None:
    assert FILE.read_text("utf-8") == options.make_reference(), "run python -m fusecache.cli.options"


def test_every_option_is_explained() -> None:
    text = options.make_reference()
    for model in (MountConfig, Tuning, PeerSettings, SourceConfig):
        for name, field in model.model_fields.items():
            if name not in ("sources", "tuning", "peers", "mountpoint"):
                assert f"| `{name}` |" in text
                assert field.description


def test_it_is_written_where_one_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["options", str(tmp_path / "new" / "OPTIONS.md")])
    options.main()
    assert (tmp_path / "new" / "OPTIONS.md").read_text() == options.make_reference()
