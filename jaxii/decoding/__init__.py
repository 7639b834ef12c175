"""Chooses the labels of an image from its scores."""

from jaxii.decoding.decoders import fit as fit
