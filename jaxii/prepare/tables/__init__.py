"""Looks at plain data, images and a label file, and says what it assumes."""
