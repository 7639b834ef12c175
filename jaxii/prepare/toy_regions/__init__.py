"""The embedded dataset, drawn at first use."""
