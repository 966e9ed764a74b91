"""Which nodes there are, and which stripes are whose."""
