"""One loaded model at work without Ray or HTTP: bad images, equal vectors, full queues, damaged weights."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import BaseModel, Field

from dermray.errors import ModelError
from dermray.evaluate.concepts import presence_scores
from dermray.predict import locate
from dermray.predict.classifier import TURN_PROMPTS
from dermray.predict.concept_terms import Prompts
from dermray.service.engine import decoding
from dermray.service.engine.answers import Rejection, Timing
from dermray.service.engine.backend import VERBS, Backend
from dermray.service.engine.engine import BATCHES_AHEAD, Engine, max_ongoing
from dermray.service.engine.verb import Pass, Verb
from dermray.service.engine.verbs.embed import OF_IMAGES
from dermray.service.fleet.catalogue import Catalogue, Served, Slot
from dermray.service.fleet.replica import LocalBackend
from dermray.service.http import routes
from dermray.service.http.asking import ImageEndpoint
from dermray.service.http.routes import create_app
from dermray.service.http.schemas import ImageRequest, Texts
from dermray.service.refusals import Refusal
from dermray.service.settings import LimitsConfig, ServeConfig
from tests.serving import LOCAL, animated_gif, bomb_png, data_uri, photograph, save_tiny_model


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
    names, prompts, encoder = ["plaque", "scale"], Prompts.load(), engine.encoder
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
    compute = engine._batches_of(OF_IMAGES)._compute

    def watched(pixels):
        held.append(room.num_held)
        return compute(pixels)

    engine._batches_of(OF_IMAGES)._compute = watched

    async def main():
        return await asyncio.gather(*(engine.embed([photograph(n)] * 16, []) for n in range(8)))

    assert [len(one.images) for one in asyncio.run(main())] == [16] * 8
    assert max(held) == BATCHES_AHEAD * 8
    assert room.num_held == 0


def test_what_a_class_list_may_cost_is_bounded_before_anything_is_computed(folder):
    engine = engine_of(folder, prompts=100)
    for labels, templates in (
        ([f"c{n}" for n in range(26)], ["{}"] * 4),
        (["c" * 8000], ["{}"] * 4),
        (["a"] * 13, None),
    ):
        with pytest.raises(Refusal) as caught:
            asyncio.run(engine.classify(photograph(), labels, templates))
        assert (caught.value.status_code, caught.value.code) == (400, "too_many_prompts")
    assert len(engine._classifiers) == 1
    assert len(asyncio.run(engine.classify(photograph(), [f"c{n}" for n in range(25)], ["{}"] * 4)).ranking) == 25


def test_the_models_own_list_costs_what_it_costs(tmp_path):
    engine = engine_of(str(save_tiny_model(tmp_path / "own", [f"class {n}" for n in range(20)])), prompts=100)
    assert len(asyncio.run(engine.classify(photograph(), [f"class {n}" for n in range(20)], None)).ranking) == 20


@pytest.mark.parametrize("question", ["classify", "annotate"])
def test_nothing_is_built_for_an_image_that_is_refused(engine, question):
    num_classifiers, encode = len(engine._classifiers), engine.encoder.encode_texts
    engine.encoder.encode_texts = None
    arguments = {"classify": (["never", "built"], None), "annotate": (["plaque", "scale", "ulcer"],)}
    try:
        answer = asyncio.run(getattr(engine, question)(b"", *arguments[question]))
    finally:
        engine.encoder.encode_texts = encode
    assert answer.rejection.reason == "zero_byte"
    assert len(engine._classifiers) == num_classifiers


class Held:
    """An encoder's texts, held up until they may go on; counts the calls."""

    def __init__(self, engine):
        while engine._classifiers._num_builds:
            # The model's own list is prepared from the start.
            time.sleep(0.01)
        self.go, self.calls, self._encode = threading.Event(), 0, engine.encoder.encode_texts
        engine.encoder.encode_texts = self

    def __call__(self, texts):
        self.calls += 1
        assert self.go.wait(20)
        return self._encode(texts)


def test_new_class_lists_are_prepared_a_few_at_a_time_and_known_ones_answered_meanwhile(folder):
    engine = engine_of(folder, pending_classifiers=2)
    asyncio.run(engine.classify(photograph(), ["known", "list"], None))
    held = Held(engine)

    async def main():
        slow = [asyncio.create_task(engine.classify(photograph(), [f"new {n}"], None)) for n in range(2)]
        while not held.calls or engine._classifiers._num_builds < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal) as caught:
            await engine.classify(photograph(), ["one more"], None)
        known = await engine.classify(photograph(), ["known", "list"], None)
        held.go.set()
        return caught.value, known, [len(one.ranking) for one in await asyncio.gather(*slow)]

    refusal, known, answered = asyncio.run(asyncio.wait_for(main(), 30))
    assert (refusal.status_code, refusal.code, refusal.retry) == (429, "queue_full", True)
    assert (len(known.ranking), answered) == (2, [1, 1])


def test_requests_that_wait_for_one_new_class_list_leave_room_for_others(folder):
    engine = engine_of(folder)
    held, room = Held(engine), max_ongoing(ServeConfig(model=folder, max_batch_size=8)) // 2

    async def main():
        asked = [asyncio.create_task(engine.classify(photograph(), ["a", "new list"], None)) for _ in range(room + 3)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
        assert len((await engine.embed([photograph()], [])).images) == 1
        held.go.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(asyncio.wait_for(main(), 30))
    assert sum(isinstance(one, Refusal) and one.status_code == 429 for one in answers) == 3
    assert held.calls == 1


def test_a_class_list_is_given_up_with_its_request(folder):
    engine = engine_of(folder)
    held, labels = Held(engine), [f"class {number}" for number in range(900)]

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.classify(photograph(), labels, None), 1)
        held.go.set()
        while engine._classifiers._num_builds:
            await asyncio.sleep(0.01)
        calls = held.calls
        assert len((await engine.classify(photograph(), labels, None)).ranking) == 900
        return calls

    # One turn was under way; what it made is not made again.
    assert asyncio.run(asyncio.wait_for(main(), 60)) == 1
    assert held.calls == -(-900 // (TURN_PROMPTS // 8))


def test_a_probe_goes_through_decoding_and_a_health_check_returns_before_it_ends(folder):
    engine = engine_of(folder, request_timeout_s=2)
    decode, go = engine._decoders._preprocess, threading.Event()

    def hangs(data):
        assert go.wait(20)
        return decode(data)

    async def main():
        engine._decoders._preprocess = hangs
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.check(0.0), 0.2)
        # A text needs no decoding and proves nothing.
        await engine.embed([], ["a"])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.check(3600.0), 0.2)

        async def check_until_it_fails():
            for _ in range(10):
                await asyncio.wait_for(engine.check_soon(3600.0), 2)

        with pytest.raises(ModelError, match="has not answered for 2 s"):
            await check_until_it_fails()
        go.set()
        await asyncio.wait_for(engine.check_soon(0.0), 20)
        while engine._probe is not None:
            await engine.check_soon(0.0)
        await asyncio.wait_for(engine.check(3600.0), 0.2)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_weights_with_nan_do_not_come_up_and_turn_a_probe_red(folder, tmp_path):
    with pytest.raises(ModelError, match="no usable answer"):
        engine_of(str(save_tiny_model(tmp_path / "nan", damaged=True)))
    engine = engine_of(folder)
    asyncio.run(engine.probe())
    weights = next(engine.encoder._model.visual.parameters()).data
    whole = weights.clone()
    weights.fill_(float("nan"))
    for question in (engine.probe(), engine.embed([photograph()], []), engine.check(0.0)):
        with pytest.raises(ModelError):
            asyncio.run(question)
    # One that answered a moment ago is not asked again.
    asyncio.run(engine.check(3600.0))
    weights.copy_(whole)
    asyncio.run(engine.probe())


def test_an_image_too_elongated_for_the_model_is_400(engine):
    app = create_app(Catalogue([Slot(Served(LocalBackend(engine), None))]), LimitsConfig())
    thin = photograph(size=(30_000, 1), kind="PNG")
    with TestClient(app, base_url=LOCAL) as client:
        answers = [
            client.post("/v1/embeddings", json={"input": ["a", data_uri(thin)]}),
            client.post("/v1/classify", json={"image": data_uri(thin)}),
            client.post("/v1/classify", files={"image": ("thin.png", thin, "image/png")}),
        ]
        well = client.post("/v1/embeddings", json={"input": data_uri(photograph())})
    assert [(one.status_code, one.json()["error"]["code"]) for one in answers] == [(400, "too_elongated")] * 3
    assert well.status_code == 200


@dataclass(frozen=True)
class Measured:
    """What the verb below says of an image."""

    red: float
    above: tuple[str, ...]
    timing: Timing
    rejection: Rejection | None = None


class MeasureRequest(ImageRequest):
    """Above which marks?"""

    above: Texts | None = Field(None, description="names of marks")


class MeasureResponse(BaseModel):
    """How red an image is."""

    red: float
    above: list[str]


REDNESS = Pass("images", lambda encoder, pixels: [float(one[0].mean()) for one in pixels], lambda red: None)


async def measure(engine, image, above):
    ride = await engine.ride((REDNESS, [image]))
    if ride.rejections:
        return Measured(0.0, (), ride.timing, ride.rejections[0])
    return Measured(ride.of_images[0], tuple(above), ride.timing)


def test_a_new_verb_is_one_declaration_and_its_endpoint(engine, monkeypatch):
    """The line that `Backend` needs is the only one elsewhere; access, forms, refusals and counters come with it."""
    monkeypatch.setattr(Backend, "measure", Verb(measure, needs=("images",)), raising=False)
    endpoint = ImageEndpoint(
        name="measure",
        summary="How red?",
        description="",
        verb=Backend.measure,
        request=MeasureRequest,
        response=MeasureResponse,
        question=lambda body, served, limits: (body.above,),
        content=lambda said, served: {"red": said.red, "above": said.above},
    )
    app = create_app(Catalogue.of(LocalBackend(engine)), LimitsConfig())
    app.include_router(endpoint.router())
    with TestClient(app, base_url=LOCAL) as client:
        form = {"files": {"image": photograph()}, "data": {"above": "a, b"}}
        answers = [client.post("/v1/measure", **form), client.post("/v1/measure", json={"image": data_uri(b"none")})]
        counted = client.get("/metrics").text
    pixels = engine.encoder.preprocess(photograph())
    assert answers[0].json()["red"] == pytest.approx(float(pixels[0].mean()))
    assert answers[0].json()["above"] == ["a", "b"]
    assert (answers[1].status_code, answers[1].json()["error"]["code"]) == (400, "not_an_image")
    assert 'dermray_requests_total{route="/v1/measure",status="200"} 1.0' in counted
    assert all(getattr(Backend, name).name == name for name in (*VERBS, "measure"))


def test_readyz_is_503_while_every_decode_thread_hangs(folder, monkeypatch):
    """Also once their callers were told `too_slow`; when the threads come back, it is ready again."""
    engine, freed = engine_of(folder), threading.Event()
    decode = engine._decoders._decode

    def hanging(data):
        freed.wait(60)
        return decode(data)

    monkeypatch.setattr(decoding, "DECODE_LIMIT_S", 0.2)
    monkeypatch.setattr(routes, "PROBE_TIMEOUT_S", 0.5)
    engine._decoders._decode = hanging
    app = create_app(Catalogue([Slot(Served(LocalBackend(engine), None))]), LimitsConfig())
    with TestClient(app, base_url=LOCAL) as client:
        try:
            stuck = client.post("/v1/embeddings", json={"input": [data_uri(photograph(n)) for n in range(2)]})
            assert (stuck.status_code, stuck.json()["error"]["code"]) == (400, "too_slow")
            assert engine._decoders.num_stuck == 2
            assert [client.get(path).status_code for path in ("/readyz", "/readyz", "/healthz")] == [503, 503, 200]
        finally:
            freed.set()
        until = time.monotonic() + 30
        # One thread that is free again will do for an answer.
        while (engine._decoders.num_stuck or client.get("/readyz").status_code != 200) and time.monotonic() < until:
            time.sleep(0.01)
        assert client.get("/readyz").status_code == 200
    assert engine._decoders.num_stuck == 0
