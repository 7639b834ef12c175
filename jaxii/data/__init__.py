"""Prepared datasets as batches of NumPy arrays; never imports JAX."""
