"""Reads label files and images and writes a prepared dataset; no JAX."""
