"""Coverage-guided fuzzing of the readers of untrusted files; see `__main__`."""
