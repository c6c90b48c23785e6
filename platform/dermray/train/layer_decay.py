"""Learning rates that fall from the head towards the pixels, as PanDerm is fine-tuned (after BEiT, arXiv 2106.08254).

Names are those of a PanDerm tower: `cls_token`, `pos_embed`, `mask_token`, `patch_embed.*`, `blocks.I.*`; whatever else
there is (`fc_norm.*`, `head.*`) stands above the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dermray.errors import ConfigError

_EMBEDDING = ("cls_token", "pos_embed", "mask_token")
# Without weight decay, whatever their shape.
_EXEMPT = ("cls_token", "pos_embed")


def scales(names: Sequence[str], *, num_layers: int, decay: float) -> list[float]:
    """What the rate of each parameter is multiplied with: `decay^(num_layers + 1 - layer)`.

    The embedding is layer 0, block i layer i + 1, everything else layer `num_layers + 1`, whose factor is 1. Two blocks
    and a decay of 0.5: `["cls_token", "blocks.1.norm1.bias", "head.weight"]` → `[0.125, 0.5, 1.0]`.

    Args:
        names: of the parameters.
        num_layers: blocks of the tower.
        decay: factor from one layer to the one below it, above 0 and at most 1.

    Raises:
        ConfigError: another decay, or the name of a block that a tower of so many blocks has not.
    """
    if not 0 < decay <= 1:
        raise ConfigError(f"layer decay {decay} must be above 0 and at most 1, 1 for one rate everywhere")
    return [decay ** (num_layers + 1 - _layer(name, num_layers)) for name in names]


def decayed(names_and_shapes: Iterable[tuple[str, Sequence[int]]]) -> list[bool]:
    """Whether weights shrink, by name and shape: all but scalars, vectors, biases, class token and positions."""
    return [len(shape) > 1 and not name.endswith(".bias") and name not in _EXEMPT for name, shape in names_and_shapes]


def _layer(name: str, num_layers: int) -> int:
    first, _, rest = name.partition(".")
    if name in _EMBEDDING or first == "patch_embed":
        return 0
    if first != "blocks":
        return num_layers + 1
    block = rest.partition(".")[0]
    if not block.isdecimal() or int(block) >= num_layers:
        raise ConfigError(f"parameter {name} is of no block of a tower of {num_layers}; num_layers must be its blocks")
    return int(block) + 1
