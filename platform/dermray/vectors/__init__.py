"""From bytes and texts to vectors: the encoder, many at once on Ray, kept beside their model, searched."""
