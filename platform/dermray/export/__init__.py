"""Prepared corpus in, the layouts of other programs out, on Ray Data."""
