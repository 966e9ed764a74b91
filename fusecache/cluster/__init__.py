"""A node of a cluster: gets blocks from the others, and gives them its own."""
