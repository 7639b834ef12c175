"""HTML reports and the comparison of runs."""
