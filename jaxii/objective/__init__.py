"""Losses, their weights over time, and the one number that is optimised."""
