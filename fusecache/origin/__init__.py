"""Object storage, read-only: list, stat and versioned range reads over fsspec file systems and fast bulk engines."""
