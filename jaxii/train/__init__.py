"""The training engine: optimizer, state, step, stages, checkpoints and loop."""
