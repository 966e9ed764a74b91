"""Object listings as a directory tree: names, attributes, stable inode numbers and versions, all from memory."""
