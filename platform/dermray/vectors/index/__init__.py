"""A prepared corpus as vectors: embeddings in Parquet, and an index that finds the nearest. No torch to search."""

from dermray.vectors.index.vectors import Hit, VectorIndex

__all__ = ["Hit", "VectorIndex"]
