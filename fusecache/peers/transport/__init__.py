"""The protocol between nodes, both ends."""
