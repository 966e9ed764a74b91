"""The kernel's formats and numbers."""
