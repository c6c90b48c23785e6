"""Raw corpus in, prepared corpus out, on Ray."""
