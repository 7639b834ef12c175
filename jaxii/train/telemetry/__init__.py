"""Logs, progress display and trackers of training."""
