"""One loaded model at work without Ray or HTTP: bad images, equal vectors, full queues, damaged weights."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from dermray.errors import ModelError
from dermray.evaluate.concept_terms import Prompts
from dermray.evaluate.concepts import presence_scores
from dermray.serving import locate
from serve.engine import BATCHES_AHEAD, Engine
from serve.errors import Refusal
from serve.settings import LimitsConfig, ServeConfig
from tests.serving import animated_gif, bomb_png, photograph, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("engine") / "tiny"))


def engine_of(folder, **limits):
    settings = ServeConfig(
        model=folder, device="cpu", max_batch_size=8, batch_wait_ms=20, limits=LimitsConfig(**limits)
    )
    return Engine(locate(folder), settings)


@pytest.fixture(scope="module")
def engine(folder):
    return engine_of(folder)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero_byte"),
        (b"no image", "not_an_image"),
        (photograph()[:700], "truncated"),
        (bomb_png(), "too_many_pixels"),
        (animated_gif(), "unsupported_format"),
    ],
    ids=["empty", "text", "truncated", "bomb", "animated-gif"],
)
def test_one_bad_image_among_32_is_named_and_nothing_is_embedded(engine, data, reason):
    images = [photograph(seed) for seed in range(31)]
    embedded = asyncio.run(engine.embed([*images[:9], data, *images[9:]], ["a"]))
    assert [(one.index, one.reason) for one in embedded.rejections] == [(9, reason)]
    assert len(embedded.images) == len(embedded.texts) == 0
    assert asyncio.run(engine.embed(images[:1], [])).images.shape == (1, 128)


def test_the_smallest_image_has_a_vector(engine):
    embedded = asyncio.run(engine.embed([photograph(size=(1, 1), kind="PNG")], []))
    assert np.linalg.norm(embedded.images[0]) == pytest.approx(1, abs=1e-5)


def test_a_photograph_lies_as_its_exif_says(engine):
    upright = Image.open(io.BytesIO(photograph(size=(96, 60), kind="PNG")))
    # The camera was turned: stored on its side, with the note that 90 degrees clockwise make it upright.
    lying, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(lying, "PNG", exif=exif)
    stored, other = io.BytesIO(), io.BytesIO()
    upright.save(stored, "PNG")
    upright.transpose(Image.Transpose.ROTATE_90).save(other, "PNG")
    vectors = asyncio.run(engine.embed([stored.getvalue(), lying.getvalue(), other.getvalue()], [])).images
    assert float(vectors[0] @ vectors[1]) >= 0.9999
    assert float(vectors[0] @ vectors[2]) < 0.9999


def test_equal_input_gives_equal_vectors_whatever_it_was_batched_with(engine):
    photographs = [photograph(seed) for seed in range(12)]
    texts = ["acne", "a long text on psoriasis " * 20, *(f"word {i}" for i in range(10))]

    async def main():
        alone = await engine.embed(photographs[:1], texts[:1])
        together = await asyncio.gather(
            *(engine.embed([one], [two]) for one, two in zip(photographs, texts, strict=True))
        )
        return alone, together

    alone, together = asyncio.run(main())
    assert max(together[0].timing.batch_sizes) > 1
    assert float(alone.images[0] @ together[0].images[0]) >= 0.9999
    assert float(alone.texts[0] @ together[0].texts[0]) >= 0.9999


def test_concepts_are_scored_as_the_evaluation_scores_them(engine):
    names, prompts, encoder = ["plaque", "scale"], Prompts.load(), engine._encoder
    annotated = asyncio.run(engine.annotate(photograph(3), names))
    image = encoder.encode_images([photograph(3)])
    references = encoder.encode_texts(prompts.references)[:, None]
    for one in annotated.concepts:
        target = encoder.encode_texts(prompts.targets(one.concept)).reshape(len(references), -1, image.shape[1])
        assert one.score == pytest.approx(float(presence_scores(image, target, references)[0]), abs=1e-6)
    assert [one.score for one in annotated.concepts] == sorted((one.score for one in annotated.concepts), reverse=True)


def test_a_full_queue_is_429_at_once_and_empties_again(folder):
    engine = engine_of(folder, queued_requests=3)

    async def main():
        asked = [asyncio.create_task(engine.embed([photograph()], [])) for _ in range(10)]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(main())
    refused = [one for one in answers if isinstance(one, Refusal)]
    assert len(refused) == 7
    assert {(one.status_code, one.code) for one in refused} == {(429, "queue_full")}
    assert len(asyncio.run(engine.embed([photograph()], [])).images) == 1


def test_decoding_is_a_few_batches_ahead_and_no_more(folder):
    """Many more images than fit are asked for at once; all are answered, and few are held decoded at any time."""
    engine = engine_of(folder)
    room, held = engine._decoders.room, []
    compute = engine._image_batches._compute

    def watched(pixels):
        held.append(room.num_held)
        return compute(pixels)

    engine._image_batches._compute = watched

    async def main():
        return await asyncio.gather(*(engine.embed([photograph(n)] * 16, []) for n in range(8)))

    assert [len(one.images) for one in asyncio.run(main())] == [16] * 8
    assert max(held) == BATCHES_AHEAD * 8
    assert room.num_held == 0


def test_weights_with_nan_do_not_come_up_and_turn_a_probe_red(folder, tmp_path):
    with pytest.raises(ModelError, match="no usable answer"):
        engine_of(str(save_tiny_model(tmp_path / "nan", damaged=True)))
    engine = engine_of(folder)
    asyncio.run(engine.probe())
    weights = next(engine._encoder._model.visual.parameters()).data
    whole = weights.clone()
    weights.fill_(float("nan"))
    for question in (engine.probe(), engine.embed([photograph()], []), engine.check(0.0)):
        with pytest.raises(ModelError):
            asyncio.run(question)
    # One that answered a moment ago is not asked again.
    asyncio.run(engine.check(3600.0))
    weights.copy_(whole)
    asyncio.run(engine.probe())
