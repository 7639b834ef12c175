"""Reads images and a label file of unknown layout, and notes the assumptions made."""
