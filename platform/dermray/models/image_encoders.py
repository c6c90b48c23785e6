"""Towers for images alone, from folders as timm and transformers save them, and PanDerm's; what they hold is never run.

    timm           config.json with `architecture` and `pretrained_cfg`, and model.safetensors
    transformers   config.json with `model_type`, preprocessor_config.json, and model.safetensors
    panderm        config.json with `"tower": "panderm"` (`PanDermConfig`), and model.safetensors
                   in PanDerm's names or CAE's

The image transform is the one that the folder describes, made by its own library. A classifier's head is left out. The
vector of an image is timm's pooled features; of transformers `pooler_output`, or the first token where the weights have
no pooler; of PanDerm the class token, or the mean of its patches (`pooling`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dermray import storage
from dermray.errors import ModelError
from dermray.image_bounds import MAX_ENLARGED_PIXELS
from dermray.models import bounds, layout, panderm_encoder, weights

CONFIG_NAME, PROCESSOR_NAME = layout.LIBRARY_NAMES
WEIGHTS_NAME = layout.SAFE_WEIGHTS_NAME
ADAPTER_NAME = "adapter_config.json"
# Width and height of the picture that every encoder is tried with: no square, so that it must become one.
PICTURE = (67, 49)
ImageTransform = Callable[[Any], Tensor]


class ImageEncoder(nn.Module):
    """A tower with the part of open_clip's interface that needs no texts.

    Attributes:
        visual: the tower; image_size: side of its input in pixels; resized_side: what the shorter side of an image is
            brought to before the crop; preprocessing: what the transform does, JSON-serialisable.
    """

    def __init__(
        self, visual: nn.Module, pool: Callable[[Any], Tensor], *, sides: tuple[int, int], preprocessing: dict[str, Any]
    ) -> None:
        super().__init__()
        self.visual = visual
        self._pool = pool
        self.image_size, self.resized_side = sides
        self.preprocessing = preprocessing

    def encode_image(self, images: Tensor) -> Tensor:
        """Preprocessed images, float32 `[N, 3, S, S]`, to vectors, `[N, D]`."""
        return self._pool(self.visual(images))


def load(path: Path) -> tuple[ImageEncoder, ImageTransform, None]:
    """The encoder in a local folder, on the CPU in float32, its transform, and no tokeniser.

    The transform takes a PIL image to float32 `[3, S, S]`.

    Raises:
        ModelError: an unknown architecture, files that are missing, weights that do not fit, or images that are
            prepared otherwise than the tower takes them.
    """
    config = storage.read_object(str(path / CONFIG_NAME))
    if not (path / WEIGHTS_NAME).exists():
        raise ModelError(f"{path} has no {WEIGHTS_NAME}")
    try:
        bounds.require_sizes(config, source=CONFIG_NAME)
        library = layout.library_of(config)
        if library == "timm":
            encoder, transform = _timm(config, weights.read(str(path / WEIGHTS_NAME)))
        elif library == "panderm":
            encoder, transform = _panderm(config, weights.read(str(path / WEIGHTS_NAME)))
        else:
            _require_of_itself(config)
            with _quiet():
                encoder, transform = _transformers(path)
        _try_out(encoder, transform, path)
        return encoder, transform, None
    except ModelError:
        raise
    except Exception as error:  # what both libraries raise at foreign configurations has no common base
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"cannot build the image encoder of {path}: {type(error).__name__}: {reason}") from error


def _require_of_itself(config: Any) -> None:
    """Refuse what has transformers ask timm or a hub for more: another library's tower, code to compute attention by.

    Raises:
        ModelError: a configuration, or one inside it, does so.
    """
    if isinstance(config, list):
        for one in config:
            _require_of_itself(one)
    if not isinstance(config, dict):
        return
    if str(config.get("model_type")).startswith("timm_"):
        raise ModelError(f"{CONFIG_NAME} names a tower of timm inside one of transformers; save it with timm")
    for key, value in config.items():
        if "attn_implementation" in key and "/" in str(value):
            raise ModelError(f"{CONFIG_NAME} names code of a hub, {key}={value!r}, which is not run")
        _require_of_itself(value)


@torch.inference_mode()
def _try_out(encoder: ImageEncoder, transform: ImageTransform, path: Path) -> None:
    """One picture from end to end: what does not fit together is told here, not at the first image of a job.

    Raises:
        ModelError: what the transform gives is not what the encoder takes, or no vector comes out.
    """
    side, resized = encoder.image_size, encoder.resized_side
    if side < 1 or resized < 1 or max(side, resized) ** 2 > MAX_ENLARGED_PIXELS:
        raise ModelError(f"{path}: images would be brought to {resized} and cut to {side} pixels a side")
    pixels = transform(Image.new("RGB", PICTURE, (200, 140, 110)))
    if pixels.dtype != torch.float32 or tuple(pixels.shape) != (3, side, side):
        given = f"{pixels.dtype} {list(pixels.shape)}".removeprefix("torch.")
        raise ModelError(f"{path}: images would be prepared as {given}, and must be as float32 [3, {side}, {side}]")
    vectors = encoder.encode_image(pixels[None])
    if vectors.ndim != 2 or not vectors.isfinite().all():
        raise ModelError(f"{path}: no vector of finite numbers comes out for an image, but {list(vectors.shape)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of the weights that a head of another task has: what matters is looked at here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _timm(config: dict[str, Any], state: dict[str, Tensor]) -> tuple[ImageEncoder, ImageTransform]:
    import timm
    from timm.data import create_transform, resolve_data_config

    described, arguments = config.get("pretrained_cfg") or {}, dict(config.get("model_args") or {})
    # The head is left out.
    arguments.pop("num_classes", None)
    if not timm.is_model(config["architecture"]):
        raise ModelError(f"timm {timm.__version__} knows no architecture {config['architecture']!r}")
    # What is not an architecture's own: among them files to load, which a folder must not choose.
    foreign = sorted(set(arguments) & set(inspect.signature(timm.create_model).parameters))
    if foreign:
        raise ModelError(f"model_args of {CONFIG_NAME} may not hold {', '.join(foreign)}")
    # No classes: the pooled features come out. `pretrained_cfg_overlay` takes the folder's word for its input.
    build = functools.partial(
        timm.create_model,
        config["architecture"],
        pretrained=False,
        num_classes=0,
        pretrained_cfg_overlay=described,
        **arguments,
    )
    # Without memory first: a folder may describe more than there is.
    held = bounds.Size.of_state(state)
    outline = bounds.outlined(build, held)
    if outline is not None:
        weights.require_fit(outline, _without_head(state, outline), source=WEIGHTS_NAME)
    with bounds.filled_by(held):
        tower = build()
    weights.load(tower, _without_head(state, tower), source=WEIGHTS_NAME)
    data = resolve_data_config(pretrained_cfg=tower.pretrained_cfg, model=tower)
    size = int(data["input_size"][-1])
    preprocessing = {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
    encoder = ImageEncoder(
        tower, _as_it_is, sides=(size, math.ceil(size / data["crop_pct"])), preprocessing={"timm": preprocessing}
    )
    return encoder.eval(), create_transform(**data, is_training=False)


def _without_head(state: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
    """The weights of a timm model without those of its classifier."""
    heads = tower.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    dropped = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    return {key: value for key, value in state.items() if not (dropped and key.startswith(dropped))}


def _panderm(document: dict[str, Any], state: dict[str, Tensor]) -> tuple[ImageEncoder, ImageTransform]:
    tower, transform, config = panderm_encoder.build(document, state)
    sides, preprocessing = (config.image_size, config.side_before_crop), {"panderm": config.preprocessing()}
    return ImageEncoder(tower, _as_it_is, sides=sides, preprocessing=preprocessing).eval(), transform


def _transformers(path: Path) -> tuple[ImageEncoder, ImageTransform]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    if not (path / PROCESSOR_NAME).exists():
        raise ModelError(f"{path} has no {PROCESSOR_NAME}: how its images are prepared is not known")
    if (path / ADAPTER_NAME).exists():
        # transformers applies it where peft is installed, and the weights' digest does not hold it.
        raise ModelError(f"{path} has an adapter ({ADAPTER_NAME}): merge it into the weights")
    # Code that a folder brings is not run, and nothing is unpickled. The library renames what older versions saved.
    safely = {"local_files_only": True, "trust_remote_code": False}
    processor = AutoImageProcessor.from_pretrained(path, **safely)
    config = AutoConfig.from_pretrained(path, **safely)
    # As the next line builds it, too: without memory.
    with torch.device("meta"), bounds.filled_by(bounds.Size.of_file(path / WEIGHTS_NAME)):
        AutoModel.from_config(config, trust_remote_code=False)
    tower, told = AutoModel.from_pretrained(path, use_safetensors=True, output_loading_info=True, **safely)
    if tower.main_input_name != "pixel_values":
        raise ModelError(f"{path} holds a {tower.config.model_type} model, which is no encoder of images alone")
    without_pooler = {key for key in told["missing_keys"] if key.startswith("pooler.")}
    missing = sorted(set(told["missing_keys"]) - without_pooler)
    if missing or told["mismatched_keys"]:
        wrong = [*missing, *(str(one[0]) for one in told["mismatched_keys"])]
        raise ModelError(f"{len(wrong)} weights of {path} are missing or of another shape: {', '.join(wrong[:4])}")

    def transform(image: Any) -> Tensor:
        return torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"][0])

    settings = json.loads(processor.to_json_string())
    pool = _first_token if without_pooler else _pooled
    encoder = ImageEncoder(tower.float(), pool, sides=_sides(settings), preprocessing={"transformers": settings})
    return encoder.eval(), transform


def _as_it_is(output: Any) -> Tensor:
    return output


def _pooled(output: Any) -> Tensor:
    # [N, D], or [N, D, 1, 1] of a convolutional tower
    return output.pooler_output.flatten(1)


def _first_token(output: Any) -> Tensor:
    # [N, L, D] → [N, D]
    return output.last_hidden_state[:, 0]


def _sides(settings: dict[str, Any]) -> tuple[int, int]:
    """Of the input, and of the image before the crop, from a processor's settings.

    `{"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}` → `(224, 256)`.
    """
    resized = max(_numbers(settings.get("size")), default=0)
    cropped = max(_numbers(settings.get("crop_size")), default=0) if settings.get("do_center_crop") else resized
    if not cropped or not resized:
        raise ModelError(f"{PROCESSOR_NAME} names no size that images are brought to")
    return cropped, resized


def _numbers(size: Any) -> list[int]:
    values = size.values() if isinstance(size, dict) else [size]
    return [int(value) for value in values if isinstance(value, int | float)]
