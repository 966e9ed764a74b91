"""Recordings of the order in which models are read."""
