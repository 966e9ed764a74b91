"""The access trace: names that programs look up, and files that they open, read and map."""
