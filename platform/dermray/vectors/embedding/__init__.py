"""Vectors of many images and texts: computed once by Ray Data over a pool of encoders, kept as Parquet parts."""
