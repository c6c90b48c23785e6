"""What is known of an encoder where none is loaded: by the driver's records, and by tasks that read kept vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16"]
WITHOUT_TEXTS = "{} is an image encoder and takes no texts"


@dataclass(frozen=True)
class EncoderInfo:
    """What made a vector: enough to decide whether two vectors may be compared."""

    name: str
    embedding_dim: int
    image_size: int
    # of a text, in tokens; 0 where the model takes no texts
    context_length: int
    # SHA-256 of the weights file, or of names and values of all tensors where a model has no folder.
    model_digest: str
    # SHA-256 of the canonical JSON of the model's preprocessing and of `DECODE_RULES`.
    preprocessing_digest: str
    parameters: int
