"""From label files and images to batches of NumPy arrays; no JAX in here."""
