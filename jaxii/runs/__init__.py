"""One run: its folder, its checkpoints, and its parts."""
