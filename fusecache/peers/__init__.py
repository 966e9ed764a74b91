"""Other nodes: who is there, which stripes are whose, and the protocol between them."""
