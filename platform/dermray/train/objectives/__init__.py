"""What a run learns: one folder each, found by its name."""
