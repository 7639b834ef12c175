"""Losses, the schedules of their weights, and the objective that is optimised."""
