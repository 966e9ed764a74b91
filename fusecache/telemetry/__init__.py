"""Logs, metrics, and the summary of an access trace."""
