"""The encoder's preprocessing equals the published one, pixel for pixel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import open_clip
import pytest
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from dermray.encoder import Encoder
from tests.corpora import MODEL_CFG

FOLDER = Path(__file__).parent
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.fixture(scope="module")
def arrays():
    with np.load(FOLDER / "preprocessing.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def pixels(arrays):
    settings = PreprocessCfg(size=224)
    model = open_clip.CLIP(**{**MODEL_CFG, "vision_cfg": {**MODEL_CFG["vision_cfg"], "image_size": 224}})
    open_clip.model.set_model_preprocess_cfg(model, vars(settings))
    transform = image_transform_v2(settings, is_train=False)
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    encoder = Encoder(model, transform, tokenizer, name="tiny", device="cpu")
    buffer = io.BytesIO()
    Image.fromarray(arrays["image_uint8"]).save(buffer, "PNG")
    return encoder.preprocess(buffer.getvalue())


def test_resize_and_crop_are_exact(pixels, arrays):
    levels = np.rint((pixels * STD + MEAN) * 255.0).transpose(1, 2, 0)
    np.testing.assert_array_equal(levels.astype(np.uint8), arrays["eval_resized_cropped_uint8"])


def test_normalised_output(pixels, arrays):
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(
        pixels[:, 96:128, 96:128], arrays["eval_output_float32_patch_rows96_128_cols96_128"], atol=1e-5, rtol=0
    )
    np.testing.assert_allclose(pixels, arrays["eval_output_float16"].astype(np.float32), atol=2e-3, rtol=0)
