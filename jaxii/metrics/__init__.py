"""Metrics as sums over images."""
