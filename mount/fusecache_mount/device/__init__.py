"""The FUSE device: its channel, splice, and the backing files of passthrough."""
