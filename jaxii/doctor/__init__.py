"""What a machine is like before anything is trained on it."""
