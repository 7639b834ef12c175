"""Measurements of jaxii, alone and against its peers; run by hand, not by pytest."""

from jaxii.cli.start import keep_freed_memory
from jaxii.distributed.xla_flags import set_flags

# As every command does.
set_flags()
keep_freed_memory()
