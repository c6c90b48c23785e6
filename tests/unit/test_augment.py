"""Augmentation: boxes inside the image, everything decided by (seed, epoch, sample), captions drawn by weight."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.ingest import augment

scales = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair)))


def captions(*aspects: str) -> list[dict[str, str]]:
    return [{"aspect": aspect, "text": f"{aspect} {number}"} for number, aspect in enumerate(aspects)]


@given(st.integers(1, 700), st.integers(1, 700), scales, st.integers(0, 2**32))
@settings(deadline=None, max_examples=300)
def test_the_box_is_inside_the_image_and_not_empty(
    height: int, width: int, scale: tuple[float, float], seed: int
) -> None:
    top, left, box_height, box_width = augment.crop_box(np.random.default_rng(seed), height, width, scale)
    assert box_height >= 1
    assert box_width >= 1
    assert 0 <= top <= height - box_height
    assert 0 <= left <= width - box_width


@given(st.integers(200, 260), st.integers(200, 260), st.integers(0, 2**32))
@settings(deadline=None)
def test_area_and_ratio_are_those_of_the_recipe(height: int, width: int, seed: int) -> None:
    scale = (0.3, 0.5)
    _, _, box_height, box_width = augment.crop_box(np.random.default_rng(seed), height, width, scale)
    # Half a pixel of rounding on either side.
    assert box_height * box_width >= scale[0] * height * width - (box_height + box_width)
    assert box_height * box_width <= scale[1] * height * width + (box_height + box_width)
    assert 3 / 4 * 0.97 <= box_width / box_height <= 4 / 3 * 1.03


def test_a_strip_without_an_admissible_box_gets_its_centre() -> None:
    random = np.random.default_rng(0)
    assert augment.crop_box(random, 30, 3000, (0.9, 1.0)) == (0, 1480, 30, 40)
    assert augment.crop_box(random, 3000, 30, (0.9, 1.0)) == (1480, 0, 40, 30)


def test_boxes_are_spread_over_the_image() -> None:
    boxes = [augment.crop_box(augment.generator(0, 0, s), 64, 64, (0.2, 0.3)) for s in range(500)]
    tops, lefts, heights, widths = np.array(boxes).T
    for starts, sizes in ((tops, heights), (lefts, widths)):
        assert starts.min() == 0
        assert (starts + sizes).max() == 64
        assert 0.4 < ((starts + sizes / 2) / 64).mean() < 0.6


@pytest.mark.parametrize("shape", [(20, 30), (64, 64), (200, 90)])
def test_the_crop_has_the_size_asked_for_and_keeps_flat_colours(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), (10, 120, 240), np.uint8)
    for flip in (0.0, 1.0):
        done = augment.crop_and_resize(image, np.random.default_rng(1), size=32, scale=(0.2, 1.0), horizontal_flip=flip)
        assert done.shape == (32, 32, 3)
        assert done.dtype == np.uint8
        assert done.flags.c_contiguous
        np.testing.assert_array_equal(done, np.broadcast_to(image[0, 0], done.shape))


def test_flip_mirrors_and_has_its_probability() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)

    def crop(sample: int, flip: float) -> np.ndarray:
        random = augment.generator(0, 0, sample)
        return augment.crop_and_resize(image, random, size=16, scale=(0.5, 1.0), horizontal_flip=flip)

    np.testing.assert_array_equal(crop(3, 1.0), crop(3, 0.0)[:, ::-1])
    flipped = sum(bool((crop(s, 0.25) != crop(s, 0.0)).any()) for s in range(400))
    assert 60 < flipped < 140


def test_a_sample_is_treated_the_same_whoever_does_it_and_otherwise_in_another_epoch() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    several = captions("raw", "ontology", "concept", "raw", "raw")

    def treat(seed: int, epoch: int, sample: int) -> tuple[bytes, str]:
        random = augment.generator(seed, epoch, sample)
        pixels = augment.crop_and_resize(image, random, size=16, scale=(0.2, 1.0), horizontal_flip=0.5)
        return pixels.tobytes(), augment.choose_caption(several, {"raw": 1.0, "ontology": 1.0}, random)

    alone = treat(1, 2, 30)
    treat(1, 2, 29)
    assert treat(1, 2, 30) == alone
    assert len({alone[0], treat(1, 2, 31)[0], treat(1, 3, 30)[0], treat(2, 2, 30)[0]}) == 4


def test_captions_are_drawn_by_the_weight_of_their_aspect() -> None:
    offered = captions("raw", "ontology", "raw", "concept", "raw")
    weights = {"raw": 3.0, "ontology": 1.0}
    drawn = Counter(augment.choose_caption(offered, weights, augment.generator(0, 0, sample)) for sample in range(4000))
    assert "concept 3" not in drawn
    assert drawn["ontology 1"] == pytest.approx(1000, abs=120)
    for number in (0, 2, 4):
        assert drawn[f"raw {number}"] == pytest.approx(1000, abs=120)


@given(
    st.lists(st.sampled_from(["raw", "ontology", "concept"]), min_size=1, max_size=6),
    st.dictionaries(st.sampled_from(["raw", "ontology", "concept"]), st.just(0.0) | st.floats(1e-6, 1e6), min_size=1),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_caption_of_a_weighted_aspect_is_chosen_and_else_the_first(
    aspects: list[str], weights: dict[str, float], seed: int
) -> None:
    offered = captions(*aspects)
    chosen = augment.choose_caption(offered, weights, np.random.default_rng(seed))
    admissible = [c["text"] for c in offered if weights.get(c["aspect"], 0) > 0]
    if admissible:
        assert chosen in admissible
    else:
        assert chosen == offered[0]["text"]
