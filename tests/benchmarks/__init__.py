"""Measurements of jaxii, alone and against its peers; run by hand, not by pytest."""

from jaxii.cli.start import keep_freed_memory

# As every command does.
keep_freed_memory()
