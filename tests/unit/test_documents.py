"""The documents say what the code does: links, commands, options and configuration examples."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fusecache.cli.main import cli
from fusecache.config.load import load_mount_config
from fusecache.config.model import MountConfig, SourceConfig, Tuning
from fusecache.config.peer_settings import PeerSettings
from fusecache.telemetry.metrics import METRICS
from fusecache_mount.lifecycle.helper import translate_arguments

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = tuple(
    str(file.relative_to(ROOT))
    for file in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
)
GUIDES = ("README.md", "docs/MOUNTING.md", "docs/CLUSTER.md", "docs/OPERATIONS.md", "CONTRIBUTING.md")
"""Whose commands and configurations are tried."""
README_WORDS = 1500
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTIONS = {*MountConfig.model_fields, *SourceConfig.model_fields, *Tuning.model_fields, "config", "nonempty"}
_OPTIONS |= {f"peers.{name}" for name in PeerSettings.model_fields} - {"peers.secret"}
_FLAGS = {"ro", "_netdev", "nofail"}


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(text(name)) if kind == language]


def anchors(name: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for link in _LINK.findall(text(name)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), f"{name}: {link}"


def commands() -> Iterator[list[str]]:
    """Calls of fusecache in the guides' shell blocks and unit files, in words."""
    for name in GUIDES:
        for block in blocks(name, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "fusecache":
                    yield words[1:]
        for block in blocks(name, "ini"):
            for call in re.findall(r"^Exec\w+=\S*/fusecache (.*)$", block, re.MULTILINE):
                yield shlex.split(call)


def test_every_command_is_accepted() -> None:
    seen = set()
    for words in commands():
        name, command, rest = cli.resolve_command(click.Context(cli), list(words))
        assert command is not None, words
        with command.make_context(str(name), rest, resilient_parsing=False) as context:
            for options in context.params.get("options", ()):
                check_options(options)
        seen.add(name)
    assert {
        "mount",
        "umount",
        "status",
        "doctor",
        "fetch",
        "ls",
        "pin",
        "unpin",
        "evict",
        "refresh",
        "peers",
        "trace",
    } <= seen


def check_options(options: str) -> None:
    for option in options.split(","):
        key = option.partition("=")[0]
        assert key in _OPTIONS | _FLAGS, option


@pytest.mark.parametrize("name", ["docs/MOUNTING.md", "docs/CLUSTER.md", "docs/OPTIONS.md"])
def test_configuration_examples_load(name: str, tmp_path: Path) -> None:
    found = blocks(name, "toml")
    assert found
    for number, block in enumerate(found):
        file = tmp_path / f"{number}.toml"
        file.write_text(block)
        file.chmod(0o600)
        config = load_mount_config(None, "/models", [], file, {})
        assert config.sources


def test_lines_of_fstab_and_calls_of_mount_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "fusecache.toml"
    file.write_text(blocks("docs/MOUNTING.md", "toml")[0])
    file.chmod(0o600)
    lines = [line.split() for block in blocks("docs/MOUNTING.md", "fstab") for line in block.splitlines()]
    calls = [
        shlex.split(line)
        for block in blocks("docs/MOUNTING.md", "sh")
        for line in block.splitlines()
        if line.startswith("mount -t")
    ]
    found = [(line[0], line[1], line[3]) for line in lines]
    found += [(call[3], call[4], call[6]) for call in calls]
    assert len(found) > 1
    for source, mountpoint, options in found:
        arguments, really = translate_arguments([source, mountpoint, "-o", options])
        assert really
        assert arguments[-2:] == [source, mountpoint] or {source, mountpoint} <= set(arguments)
        check_options(options)
        given = options.replace("/etc/fusecache.toml", str(file))
        assert load_mount_config(source, mountpoint, [given], None, {}).mountpoint == Path(mountpoint)


def test_options_that_are_spoken_of_exist() -> None:
    table = text("docs/MOUNTING.md").partition("## Tune it")[2].partition("\n## ")[0]
    names = {name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in spoken(cell)}
    assert len(names) > 8
    assert names <= _OPTIONS


def spoken(cell: str) -> list[str]:
    words = [word.partition("=")[0] for word in re.findall(r"`([\w=]+)`", cell)]
    return [word for word in words if word not in ("tuning", "o")]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_shell_blocks_are_well_formed(name: str) -> None:
    for block in blocks(name, "sh"):
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "docs/RENAMES.md"])
def test_files_that_are_named_exist(name: str) -> None:
    pattern = r"`((?:fusecache|mount|tests|benchmarks|scripts|docs)/[\w./]+)`"
    named = [path for path in re.findall(pattern, text(name)) if "results/" not in path]
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len(text("README.md").split()) <= README_WORDS


def test_operations_explains_every_metric() -> None:
    table = text("docs/OPERATIONS.md").partition("## Metrics")[2].partition("\n## ")[0]
    explained = set(re.findall(r"`(fusecache_\w+)(?:\{\w+\})?`", table))
    assert explained == {metric.name for metric in METRICS} | {"fusecache_up", "fusecache_passthrough"}


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts/site", tmp_path / "site"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.parent.name for file in (tmp_path / "site").glob("*/index.html")} >= {
        "ARCHITECTURE",
        "OPERATIONS",
    }
