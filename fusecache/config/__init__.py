"""Every setting of a mount: one model, read from a TOML file, FUSECACHE_* variables and -o options.

Pure but for reading the file and asking the cache directory's file system for its size; raises ConfigError.
"""

from fusecache.config.load import load_mount_config
from fusecache.config.model import (
    MountConfig,
    SourceConfig,
    Tuning,
    default_cache_dir,
    default_runtime_dir,
    make_default_cache_dir,
)
from fusecache.config.peers import PeerSettings, is_loopback, split_address
from fusecache.config.units import format_size, parse_amount, parse_duration, parse_size

__all__ = [
    "MountConfig",
    "PeerSettings",
    "SourceConfig",
    "Tuning",
    "default_cache_dir",
    "default_runtime_dir",
    "format_size",
    "is_loopback",
    "load_mount_config",
    "make_default_cache_dir",
    "parse_amount",
    "parse_duration",
    "parse_size",
    "split_address",
]
