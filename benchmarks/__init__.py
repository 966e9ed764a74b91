"""Side-by-side measurements of fusecache and other ways to a model in a bucket, and the demo.

Everything is started here, on this machine: the S3 server, the mounts, the readers. Contestants take turns
inside one run, and results are ratios of neighbours, since absolute figures of a shared machine drift.
"""
