"""A checkpoint as files that run without jaxii."""
