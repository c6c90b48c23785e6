"""The encoder: unit vectors that depend on their input alone, and digests that tell models apart."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from dermray import models
from dermray.errors import ImageError, ModelError
from dermray.vectors.encoder import Encoder
from tests.corpora import RGB, jpeg, write_model

IMAGES = [jpeg(colour, width=50 + 7 * seed, seed=seed) for seed, colour in enumerate([*RGB.values()] * 3)]
TEXTS = [f"a {colour} patch, case {number}" + " itchy" * number for colour in RGB for number in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.load(str(folder), device="cpu")


def test_vectors_are_unit_float32(encoder):
    for vectors, num in ((encoder.encode_images(IMAGES), len(IMAGES)), (encoder.encode_texts(TEXTS), len(TEXTS))):
        assert vectors.dtype == np.float32
        assert vectors.shape == (num, encoder.info.embedding_dim)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batch_size_changes_nothing(encoder, batch_size):
    np.testing.assert_allclose(
        encoder.encode_images(IMAGES, batch_size=batch_size), encoder.encode_images(IMAGES), atol=1e-5
    )
    np.testing.assert_allclose(
        encoder.encode_texts(TEXTS, batch_size=batch_size), encoder.encode_texts(TEXTS), atol=1e-5
    )


def test_order_is_kept(encoder):
    whole = encoder.encode_images(IMAGES, batch_size=4)
    for row, data in enumerate(IMAGES):
        assert whole[row] @ encoder.encode_images([data])[0] > 0.9999
    assert len(np.unique(whole.round(4), axis=0)) == len(IMAGES)


def test_equals_open_clip(encoder, folder):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in IMAGES])
        images = model.encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode_images(IMAGES), images, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts, atol=1e-5)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_threads_get_the_same(encoder):
    alone = encoder.encode_images(IMAGES), encoder.encode_texts(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: encoder.encode_images(IMAGES), range(6)))
        texts = list(pool.map(lambda _: encoder.encode_texts(TEXTS), range(6)))
    for vectors in images:
        np.testing.assert_allclose(vectors, alone[0], atol=1e-6)
    for vectors in texts:
        np.testing.assert_allclose(vectors, alone[1], atol=1e-6)


def test_nothing_in_nothing_out(encoder):
    assert encoder.encode_images([]).shape == (0, 32)
    assert encoder.encode_texts([]).shape == (0, 32)
    assert encoder.encode_pixels(np.zeros((0, 3, 32, 32), dtype=np.float32)).shape == (0, 32)


def test_info(encoder, folder):
    info = encoder.info
    assert (info.name, info.embedding_dim, info.image_size, info.context_length) == ("tiny", 32, 32, 24)
    assert info.model_digest == hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()


def test_digests_tell_weights_and_preprocessing_apart(encoder, folder, tmp_path):
    other = Encoder.load(str(write_model(tmp_path / "other", seed=1)), device="cpu").info
    assert other.model_digest != encoder.info.model_digest
    assert other.preprocessing_digest == encoder.info.preprocessing_digest
    again = Encoder.load(f"local-dir:{folder}", device="cpu").info
    assert again.model_digest == encoder.info.model_digest
    squashed = tmp_path / "squashed"
    write_model(squashed)
    config = squashed / "open_clip_config.json"
    config.write_text(config.read_text().replace('"shortest"', '"squash"'))
    assert Encoder.load(str(squashed), device="cpu").info.preprocessing_digest != encoder.info.preprocessing_digest


def test_bf16_is_close(encoder, folder):
    half = Encoder.load(str(folder), device="cpu", precision="bf16")
    vectors = half.encode_images(IMAGES)
    assert vectors.dtype == np.float32
    assert (vectors * encoder.encode_images(IMAGES)).sum(axis=1).min() > 0.99


def test_bad_image_is_an_image_error(encoder):
    with pytest.raises(ImageError) as caught:
        encoder.encode_images([IMAGES[0], b"not an image"])
    assert caught.value.reason == "not_an_image"


def test_bad_names_are_model_errors(folder, tmp_path):
    with pytest.raises(ModelError, match="precision 'fp16' is unknown"):
        Encoder.load(str(folder), precision="fp16")
    with pytest.raises(ModelError):
        Encoder.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["dermray_tiny", "panderm_tiny_bert"])
def test_short_texts_run_short_and_give_the_vectors_of_the_full_length(name):
    model, transform, tokenizer = models.create(name)
    encoder = Encoder(model, transform, tokenizer, name=name, device="cpu")
    texts = ["acne", "a skin image of melanoma", "plaque with silvery scale " * 40, ""]
    with torch.inference_mode():
        full = torch.nn.functional.normalize(model.eval().encode_text(tokenizer(texts)), dim=-1).numpy()
    together = encoder.encode_texts(texts)
    alone = np.concatenate([encoder.encode_texts([text]) for text in texts])
    np.testing.assert_allclose(together, full, atol=1e-5)
    np.testing.assert_allclose(alone, full, atol=1e-5)
