"""Where objects come from: list, stat and versioned range reads over fsspec file systems and a fast bulk engine."""
