"""What a mount tells about itself: logs and metrics."""
