"""Where a node's flights get blocks from other nodes, and what it gives to them."""
