"""What `benchmarks/serve.py` is made of: the servers that it compares, the load on them, and who used the cores."""
