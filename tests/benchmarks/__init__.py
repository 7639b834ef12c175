"""Measurements of jaxii, alone and against its peers; run by hand, not by pytest."""
