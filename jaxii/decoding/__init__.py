"""Chooses the labels of an image from its scores."""
