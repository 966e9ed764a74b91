"""Watches what is read, and proposes what is to be fetched ahead."""
