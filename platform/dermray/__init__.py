"""DermRay: from a dermatology image-text corpus to a served, tracked, evaluated vision-language model."""

__version__ = "0.1.0"
