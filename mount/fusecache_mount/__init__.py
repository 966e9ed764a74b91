"""The FUSE program, installed as `fusecache_mount`: a thin shell around the fetching.

It holds all that knows the kernel: the device channel and FUSE passthrough, the pyfuse3 operations, inodes
and open files, the keeper that outlives a crashed daemon, the mount(8) helper, and the only table from domain
errors to errno. Nothing in fusecache/ imports it: the command line starts its programs as subprocesses.
"""
