"""From mount to unmount: launching, keeper, daemon, control service."""
