"""The figures of a run: the FLOP model against counting by hand, the stopwatch, the verdict, the printed line."""

from __future__ import annotations

import time

import pytest
import torch

from dermray import models
from dermray.train import speed
from dermray.train.objectives.contrastive.cost import flop_model
from dermray.train.progress import ProgressPrinter, StepRecord

CPU = torch.device("cpu")


def test_flops_of_the_published_base_model_are_those_known() -> None:
    """open_clip's profile of ViT-B-16: 35.13 GFLOP for an image, 5.96 for a text (without attention's products)."""
    model, _, _ = models.create("ViT-B-16")
    counted = flop_model(model, image_size=224, context_length=77)
    assert counted.image / 1e9 == pytest.approx(35.13, rel=0.02)
    assert counted.text / 1e9 == pytest.approx(5.96, rel=0.06)
    whole, half = counted.of_step(10, 77), counted.of_step(10, 38.5)
    assert whole == pytest.approx(30 * (counted.image + counted.text))
    assert whole - half == pytest.approx(15 * counted.text)
    assert next(model.parameters()).device == CPU, "the model itself stays where it is"


def test_flops_of_a_language_model_are_those_counted_by_hand() -> None:
    model, _, _ = models.create("panderm_tiny_bert")
    counted = flop_model(model, image_size=64, context_length=64)
    layers, width, hidden, length = 2, 96, 384, 64
    products = 4 * width * width + 2 * width * hidden
    attention = 2 * length * width
    projection = 96 * 112 + 112 * 128
    assert counted.text == 2 * (layers * length * (products + attention) + projection)


def test_a_cpu_has_no_peak() -> None:
    assert speed.peak_flops(CPU) is None


def test_the_stopwatch_tells_waits_from_steps_and_pauses() -> None:
    watch = speed.Stopwatch(10, 8, CPU)
    time.sleep(0.2)  # the first batch does not count
    for number in range(4):
        if number:
            time.sleep(0.02)
        watch.batch_came()
        time.sleep(0.03 if number < 3 else 0.1)
        watch.step_done()
        if number == 1:
            with watch.paused():
                time.sleep(0.1)
    figures = watch.lap(14)
    assert figures["data_wait_share"] == pytest.approx(0.06 / 0.25, abs=0.12)
    assert figures["pause_share"] == pytest.approx(0.1 / 0.35, abs=0.12)
    assert 0.03 <= figures["step_time_p50_s"] < 0.1 <= figures["step_time_p99_s"]
    assert figures["samples_per_s"] == pytest.approx(8 / figures["step_time_s"])
    watch.batch_came()
    watch.step_done()
    again = watch.lap(15)
    assert again["pause_share"] == 0


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, "limited by computation (100% of the time)"),
        ({"data_wait_share": 0.6, "communication_share": 0.2}, "limited by data (60% of the time)"),
        ({"data_wait_share": 0.1, "communication_share": 0.3}, "limited by communication (30% of the time)"),
        ({"pause_share": 0.4}, "limited by validation and checkpoints (40% of the time)"),
        ({"data_wait_share": 0.1}, "limited by computation (90% of the time)"),
    ],
)
def test_the_verdict_names_the_largest_share(figures: dict[str, float], expected: str) -> None:
    assert speed.verdict(figures).startswith(expected)


def test_a_verdict_is_printed_when_it_changes() -> None:
    lines: list[str] = []
    printer = ProgressPrinter(lines.append)
    figures = {"loss": 1.0, "samples_per_s": 10.0, "data_wait_share": 0.5, "mfu": 0.41, "skipped_steps": 2.0}
    for step, verdict in enumerate(["limited by data (50%)", "limited by data (51%)", "limited by computation (90%)"]):
        printer(StepRecord(step + 1, 9, figures, verdict))
    assert [line.strip() for line in lines if "limited" in line] == [
        "limited by data (50%)",
        "limited by computation (90%)",
    ]
    assert "MFU 41%" in lines[0]
    assert "skipped 2" in lines[0]
    assert printer.verdict == "limited by computation (90%)"
