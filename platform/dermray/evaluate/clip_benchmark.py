"""LAION's CLIP_benchmark on our models: `python -m dermray.evaluate.clip_benchmark eval --model_type dermray …`.

CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark, `pip install clip-benchmark`) has its own data sets, scores and
command line; all that it lacks is a way to load a model folder of ours, PanDerm's towers among them. Its images go
through the model's own transform; ours are also turned upright and brought to sRGB first (`dermray.images`).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import nn

from dermray import models
from dermray.errors import ConfigError

MODEL_TYPE = "dermray"


def load_model(
    model_name: str, pretrained: str | None = None, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Any, Any]:
    """A model as CLIP_benchmark's loaders give it.

    Args:
        model_name: what `dermray.models.create` takes: a folder, a hub id, a name.
        pretrained: for a name; empty: random weights. Folders and hub ids bring theirs.
        cache_dir: not used; Hugging Face's own variables say where downloads go.
        device: where the model goes.

    Returns:
        `(model, image_transform, tokenizer)`.

    Raises:
        ModelError: as `models.create`.
    """
    model, image_transform, tokenizer = models.create(model_name, pretrained or None)
    return model.to(device), image_transform, tokenizer


def register() -> None:
    """Make `--model_type dermray` known to CLIP_benchmark in this process.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from clip_benchmark import models as registry
        from clip_benchmark.metrics import zeroshot_classification
    except ImportError as error:
        raise ConfigError(f"CLIP_benchmark is not there ({error}); pip install clip-benchmark") from None
    registry.TYPE2FUNC[MODEL_TYPE] = load_model
    if MODEL_TYPE not in registry.MODEL_TYPES:
        registry.MODEL_TYPES.append(MODEL_TYPE)
    # Its accuracy (1.6.2) calls float() on an array of one element, which NumPy refuses since 2.4.
    zeroshot_classification.float = _number


def _number(value: Any) -> float:
    return float(np.asarray(value).item())


def main() -> int:
    """CLIP_benchmark's own command line, with our models."""
    register()
    from clip_benchmark import cli

    cli.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
