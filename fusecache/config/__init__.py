"""Every setting of a mount: one model, read from a TOML file, FUSECACHE_* variables and -o options.

Pure but for reading the file and asking the cache directory's file system for its size; raises ConfigError.
"""
