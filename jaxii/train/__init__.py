"""The training engine: mesh, optimizer, state, step, stages, checkpoints, loop."""
