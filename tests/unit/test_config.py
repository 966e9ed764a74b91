"""Settings: where they come from, which wins, and what a mistake says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fusecache.config.load import load_mount_config
from fusecache.config.model import (
    MountConfig,
    SourceConfig,
    Tuning,
    default_cache_dir,
    make_default_cache_dir,
)
from fusecache.errors import ConfigError

SECRET = "wJalrXUtnFEMI"


def load(
    source: str | None = "s3://bucket/prefix",
    options: tuple[str, ...] = (),
    file: Path | None = None,
    env: dict[str, str] | None = None,
) -> MountConfig:
    return load_mount_config(source, "/models", options, file, env or {})


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "fusecache.toml"
    file.write_text(text)
    file.chmod(0o600)
    return file


def complaint(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults() -> None:
    config = load()
    assert config.sources == (SourceConfig(url="s3://bucket/prefix"),)
    assert config.mountpoint == Path("/models")
    assert config.tuning == Tuning(concurrency=16, range_size=16 << 20, deadline=60, stall_timeout=10)
    assert (config.block_size, config.file_mode, config.dir_mode) == (1 << 20, 0o444, 0o555)
    assert (config.uid, config.gid) == (os.geteuid(), os.getegid())
    assert config.prefetch_budget is None


def test_directories_follow_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    config = load(env={"XDG_CACHE_HOME": "/home/u/.cache", "XDG_RUNTIME_DIR": "/run/user/1"})
    assert (config.cache_dir, config.runtime_dir) == (Path("/var/cache/fusecache"), Path("/run/fusecache"))
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    config = load(env={"XDG_CACHE_HOME": "/home/u/.cache", "XDG_RUNTIME_DIR": "/run/user/1"})
    assert config.cache_dir == Path("/home/u/.cache/fusecache")
    assert config.runtime_dir == Path("/run/user/1/fusecache")
    assert load().runtime_dir == Path("/tmp/fusecache-1")


def test_later_layers_win(tmp_path: Path) -> None:
    file = toml(tmp_path, 'threads = 5\nread_ahead = "1MiB"\numask = 0o022\n[tuning]\nconcurrency = 5\n')
    env = {"FUSECACHE_THREADS": "6", "FUSECACHE_TUNING__CONCURRENCY": "6", "FUSECACHE_MAX_BACKGROUND": "6"}
    assert load(file=file).threads == 5
    config = load(file=file, env=env)
    assert (config.threads, config.tuning.concurrency, config.max_background) == (6, 6, 6)
    config = load(file=file, env=env, options=("ro,threads=7", "concurrency=7"))
    assert (config.threads, config.tuning.concurrency, config.max_background) == (7, 7, 6)
    assert (config.read_ahead, config.umask) == (1 << 20, 0o022)


def test_options_as_mount_writes_them() -> None:
    config = load(
        options=(
            "ro,_netdev,nofail,noatime,nosuid,nodev,x-systemd.automount,allow_other,cache_dir=/nvme/x,"
            "uid=root,umask=027,file_mode=0640,metadata_ttl=5m,cache_size=80%,free_space=1GiB,"
            "prefetch_budget=2G,engine=fsspec,endpoint_url=http://localhost:9000/,anonymous",
        )
    )
    assert config.allow_other
    assert config.cache_dir == Path("/nvme/x")
    assert (config.uid, config.umask, config.file_mode) == (0, 0o027, 0o640)
    assert config.metadata_ttl == 300
    assert (config.cache_size, config.free_space, config.prefetch_budget) == ("80%", 1 << 30, 2 << 30)
    source = config.sources[0]
    assert (source.engine, source.endpoint_url, source.anonymous) == ("fsspec", "http://localhost:9000", True)
    assert not load(options=("allow_other=false",)).allow_other


def test_mount8_writes_rw_by_itself() -> None:
    config = load_mount_config("s3://b", "/models", ["rw,allow_other"], env={}, mount8=True)
    assert config.allow_other
    assert "read-only" in complaint(options=("rw,allow_other",))


def test_several_sources(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        f"""
[[source]]
name = "a"
url = "s3://one"
endpoint_url = "http://one:9000"
access_key_id = "k"
secret_access_key = "{SECRET}"
[[source]]
name = "b"
url = "gs://two/x"
[source.storage_options]
project = "p"
[sources.c-d]
url = "https://three/"
""",
    )
    config = load(None, file=file, env={"FUSECACHE_SOURCES__C_D__ENGINE": "fsspec"})
    assert [(s.name, s.url) for s in config.sources] == [
        ("a", "s3://one"),
        ("b", "gs://two/x"),
        ("c-d", "https://three/"),
    ]
    assert config.sources[1].storage_options == {"project": "p"}
    assert config.sources[2].engine == "fsspec"
    assert config.secret_values() == ["k", SECRET]
    one = load("b", file=file)
    assert [(s.name, s.url) for s in one.sources] == [("", "gs://two/x")]
    same = load("s3://one/", file=file)
    assert same.sources[0].endpoint_url == "http://one:9000"
    other = load("s3://other", file=file)
    assert other.sources[0].access_key_id is None
    by_option = load("none", options=(f"config={file}",))
    assert len(by_option.sources) == 3
    assert "several sources" in complaint(None, file=file, options=("endpoint_url=http://x",))
    assert "did you mean" in complaint("aa", file=file)


def test_a_source_without_url_lends_its_settings(tmp_path: Path) -> None:
    file = toml(tmp_path, '[source]\nregion = "eu-central-1"\n')
    assert load("s3://x", file=file).sources[0].region == "eu-central-1"
    assert load("s3://x", env={"FUSECACHE_CONFIG": str(file)}).sources[0].region == "eu-central-1"
    assert "line 1" in complaint(None, file=file)
    assert "url is missing" in complaint(None, file=file)


def test_secrets_stay_inside(tmp_path: Path) -> None:
    env = {"FUSECACHE_ACCESS_KEY_ID": "AKIA", "FUSECACHE_SECRET_ACCESS_KEY": SECRET}
    config = load(env=env)
    assert SECRET not in repr(config)
    assert SECRET not in str(config.model_dump())
    private = config.dump_with_secrets()
    assert SECRET.encode() in private
    assert MountConfig.load_with_secrets(private) == config
    assert set(config.secret_values()) == {"AKIA", SECRET}
    with pytest.raises(ConfigError) as caught:
        MountConfig.load_with_secrets(private.replace(b'"concurrency": 16', b'"concurrency": -1'))
    assert SECRET not in str(caught.value)
    with pytest.raises(ValidationError):
        config.threads = 5  # type: ignore[misc]


def test_storage_options_round_trip_and_count_as_secret(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        f'[[source]]\nurl = "hf://x/y"\nstorage_options = {{ token = "{SECRET}", n = 3, a = {{ password = "pw" }} }}',
    )
    config = load(None, file=file)
    assert SECRET not in repr(config)
    assert sorted(config.secret_values()) == ["pw", SECRET]
    assert MountConfig.load_with_secrets(config.dump_with_secrets()) == config


@pytest.mark.parametrize("name", ["access_key_id", "secret_access_key", "session_token", "storage_options"])
def test_secrets_are_refused_on_the_command_line(name: str) -> None:
    text = complaint(options=(f"{name}={SECRET}",))
    assert SECRET not in text
    assert "config file of mode 0600" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("cache_sise=3", "-o cache_sise: unknown option: did you mean cache_size?"),
        ("allow_root", "-o allow_root: unknown option: did you mean allow_other?"),
        ("zzz=1", "-o zzz: unknown option: the nearest is "),
        ("rw", "-o rw: fusecache is a read-only file system"),
        ("threads", "-o threads: needs a value: threads=..."),
        ("threads=x", "-o threads: input should be a valid integer"),
        ("threads=0", "-o threads: input should be greater than or equal to 1"),
        ("verify=never", "-o verify: has to be one of 'start', 'boot', 'always' or 'manifest'"),
        ("cache_size=lots", "-o cache_size: 'lots' is not a size"),
        ("cache_size=0", "cache_size has to be above 0"),
        ("cache_dir=", "-o cache_dir: a path is needed"),
        ("cache_dir=/models/cache", "is inside the mountpoint"),
        ("block_size=3MiB", "-o block_size: 3145728 is not a power of 2"),
        ("umask=9", "-o umask: '9' is not an octal mode"),
        ("uid=nobody-like-this", "-o uid: there is no user 'nobody-like-this'"),
        ("metadata_ttl=soon", "-o metadata_ttl: 'soon' is not a duration"),
        ("endpoint_url=localhost:9000", "-o endpoint_url: not an address like"),
        ("config=", "-o config: a file is needed"),
    ],
)
def test_mistakes_in_options(options: str, text: str) -> None:
    assert text in complaint(options=(options,))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("bucket", "bucket: not a URL like s3://bucket/prefix"),
        ("s3://", "the URL names no bucket"),
        (f"s3://k:{SECRET}@bucket", "holds a password"),
        (None, "no source"),
    ],
)
def test_mistakes_in_the_source(source: str | None, text: str) -> None:
    said = complaint(source)
    assert text in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('# x\ncache_sise = "1"', 2, "cache_sise: unknown option: did you mean cache_size?"),
        ("threads = \n", 1, "threads: malformed TOML: Invalid value"),
        ("a = 1\na = 2", 2, "a: malformed TOML"),
        ("[tuning]\n\nconcurency = 1", 3, "concurency: unknown option: did you mean concurrency?"),
        ("concurrency = 1", 1, "concurrency: belongs below a line [tuning]"),
        ("url = 's3://x'", 1, "url: belongs below a line [[source]]"),
        ("mountpoint = '/x'", 1, "mountpoint: the mountpoint is an argument"),
        ("tuning = 3", 1, "tuning: is a table"),
        ("source = 3", 1, "source: write [[source]]"),
        ("[sources]\na = 3", 2, "a: has to be a table with a url"),
        ("\n\nthreads = 'many'", 3, "threads: input should be a valid integer"),
        ("[tuning]\n'deadline' = '-3'", 2, "deadline: '-3' is not a duration"),
        ("file_mode = 444", 1, 'file_mode: write the octal mode as 0o444 or "0444"'),
        ("[[source]]\nurl='s3://a'\n[[source]]\nurl='s3://b'\nregoin='x'", 5, "regoin: unknown option"),
        ("[[source]]\nurl='s3://a'\n[[source]]\nname='b'\nurl='b'", 5, "url: the source is not a URL"),
        ("[sources.x]\nurl='s3://a'\nname='y'", 3, "name: [sources.x] already says the name"),
        (f"[source]\nurl='s3://a'\nsecret_access_key='{SECRET}'", 1, "access_key_id is missing"),
        (f"[source]\nurl='s3://a'\nsecret_access_key={SECRET}", 3, "secret_access_key: malformed TOML"),
    ],
)
def test_mistakes_in_the_file_name_file_line_and_key(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    file = toml(tmp_path, text)
    said = complaint(None if "source" in text else "s3://bucket", file=file)
    assert f"{file}, line {line}" in said
    assert message in said
    assert SECRET not in said


def test_sources_have_to_be_told_apart(tmp_path: Path) -> None:
    two = "[[source]]\nurl='s3://a'\n[[source]]\nurl='s3://b'\n"
    assert "needs a name" in complaint(None, file=toml(tmp_path, two))
    same = "[[source]]\nname='x'\nurl='s3://a'\n[[source]]\nname='x'\nurl='s3://b'\n"
    assert "two sources are named 'x'" in complaint(None, file=toml(tmp_path, same))
    assert "name" in complaint(None, file=toml(tmp_path, "[[source]]\nname='a/b'\nurl='s3://a'\n"))


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "No such file" in complaint(file=tmp_path / "missing.toml")
    assert "Is a directory" in complaint(file=tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "UTF-8" in complaint(file=tmp_path / "binary")


def test_a_readable_file_with_secrets_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = toml(tmp_path, f"[source]\nurl='s3://a'\naccess_key_id='k'\nsecret_access_key='{SECRET}'\n")
    load(None, file=file)
    assert caplog.text == ""
    file.chmod(0o644)
    load(None, file=file)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        (
            "FUSECACHE_CACHE_SISE",
            "1",
            "FUSECACHE_CACHE_SISE: unknown setting: did you mean FUSECACHE_CACHE_SIZE?",
        ),
        ("FUSECACHE_CONCURRENCY", "1", "did you mean FUSECACHE_TUNING__CONCURRENCY?"),
        ("FUSECACHE_TUNING__CONCURENCY", "1", "did you mean concurrency?"),
        ("FUSECACHE_THREADS", "x", "FUSECACHE_THREADS: input should be a valid integer"),
        ("FUSECACHE_STORAGE_OPTIONS", "x", "FUSECACHE_STORAGE_OPTIONS: has to be a JSON object"),
    ],
)
def test_mistakes_in_the_environment(variable: str, value: str, text: str) -> None:
    assert text in complaint(env={variable: value})


def test_foreign_variables_are_let_be() -> None:
    assert load(env={"FUSECACHE_TEST_RUN": "x", "FUSECACHE_DEBUG": "1", "OTHER": "2"}) == load()
    options = load(env={"FUSECACHE_STORAGE_OPTIONS": '{"anon": true}'}).sources[0].storage_options
    assert options == {"anon": True}


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/u")
    config = load_mount_config("/data/../srv", "mnt", ["cache_dir=c,log_file=~/log"], env={})
    assert config.mountpoint == tmp_path / "mnt"
    assert config.cache_dir == tmp_path / "c"
    assert config.log_file == Path("/home/u/log")
    assert config.sources[0].url == "file:///srv"


def test_shares_are_of_the_disk_that_will_hold_the_cache(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    total = disk.f_blocks * disk.f_frsize
    config = load(options=(f"cache_dir={tmp_path}/not/yet,cache_size=50%,free_space=10%",))
    assert config.cache_limit_bytes() == int(total * 0.5)
    assert config.min_free_bytes() == int(total * 0.1)
    assert load(options=("cache_size=5GiB",)).cache_limit_bytes() == 5 << 30


def test_only_the_default_cache_directory_gets_its_parents_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    env = {"XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    make_default_cache_dir(tmp_path / "disk" / "fusecache", env)
    assert list(tmp_path.iterdir()) == []
    default = default_cache_dir(env)
    make_default_cache_dir(default, env)
    assert default.parent.is_dir()
    assert not default.exists()
