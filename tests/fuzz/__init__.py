"""Coverage-guided fuzzing of what reads the files of strangers; see `__main__`."""
