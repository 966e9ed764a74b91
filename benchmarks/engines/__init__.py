"""How fast engines and loaders start: what is measured, and what measures it."""
