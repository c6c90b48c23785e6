"""What a model can be scored by: a folder each, with its keys, its needs and its part of the report's page."""
