"""Looks at plain data, pictures and a label file, and says what it assumes."""
