"""The access trace: what programs look up, open, read and map."""
