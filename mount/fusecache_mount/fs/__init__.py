"""The file system: pyfuse3's operations, open files and their journal."""
