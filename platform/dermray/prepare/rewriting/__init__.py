"""Captions rewritten or taken apart by a language model behind an OpenAI-compatible endpoint. Off by default."""
