"""Export of a checkpoint to files that run without jaxii."""
