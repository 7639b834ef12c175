"""From label files and images to batches of NumPy arrays; JAX is never imported here."""
