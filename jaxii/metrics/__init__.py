"""Metrics as sums over images."""

from jaxii.metrics.f_beta import f_beta as f_beta
