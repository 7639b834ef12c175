"""Evaluation of trained networks: metrics, decoding, predictions and provenance."""
