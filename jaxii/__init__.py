"""jaxii: multi-label image classification in JAX, from label files to a submission."""
