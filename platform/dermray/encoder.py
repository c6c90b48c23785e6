"""The encoder under the name that others import it by; it lives in `dermray.vectors.encoder`."""

from dermray.vectors.encoder import Encoder

__all__ = ["Encoder"]
