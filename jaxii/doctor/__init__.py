"""Checks of a machine before it trains anything."""
