"""What is recomputed, laid out otherwise or compiled gives the same losses and gradients; nothing changes its name."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

from dermray import models
from dermray.train import numerics
from dermray.train.settings import PretrainConfig, TrainConfig

TOWERS = {"dermray_tiny": (48, {4, 2}), "panderm_tiny_bert": (64, {4, 2})}


class Operations(TorchDispatchMode):
    """Counts what is computed, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def collected_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What blocks are compiled to from now on, traced and cut as on a GPU but run without a C++ compiler."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    torch.compiler.reset()
    return graphs


def made(name: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model, _, _ = models.create(name)
    numerics.prepare(model.train(), TrainConfig(**settings))
    return model


def gradients(model: nn.Module, context_length: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, 64, 64, generator=random)
    tokens = torch.randint(1, 900, (4, context_length), generator=random)
    torch.manual_seed(2)
    image, text, scale = model(pixels, tokens)[:3]
    nn.functional.cross_entropy(scale * image @ text.T, torch.arange(4)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TOWERS)
def test_both_towers_are_found(name: str) -> None:
    stacks = numerics.residual_stacks(models.create(name)[0])
    assert {len(blocks) for blocks in stacks} == TOWERS[name][1]
    assert len(stacks) == 2


def test_blocks_with_batch_norm_are_left_alone() -> None:
    block = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3)]
    assert numerics.residual_stacks(nn.Sequential(*block)) == []


@pytest.mark.parametrize(("share", "expected"), [(0, []), (0.5, [1, 3]), (0.25, [3]), (1, [0, 1, 2, 3])])
def test_recomputed_blocks_are_spread(share: float, expected: list[int]) -> None:
    assert numerics.recomputed(4, share) == expected


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"grad_checkpointing": 1.0},
        {"grad_checkpointing": 0.5},
        {"grad_checkpointing": 1.0, "grad_checkpointing_keeps": "products"},
        {"channels_last": True},
    ],
)
def test_the_gradients_stay(name: str, settings: dict[str, object]) -> None:
    plain, changed = made(name), made(name, **settings)
    assert plain.state_dict().keys() == changed.state_dict().keys()
    length = TOWERS[name][0]
    expected, actual = gradients(plain, length), gradients(changed, length)
    assert expected.keys() == actual.keys()
    exact = "grad_checkpointing" in settings
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=0 if exact else 1e-5, rtol=0 if exact else 1e-4)


def test_recomputed_blocks_do_run_twice() -> None:
    model = made("dermray_tiny", grad_checkpointing=0.5)
    calls = [0, 0, 0, 0]

    def count(number: int) -> None:
        calls[number] += 1

    for number, block in enumerate(numerics.residual_stacks(model)[0]):
        block.get_submodule("mlp").register_forward_pre_hook(lambda *_, number=number: count(number))
    gradients(model, 48)
    assert calls == [1, 2, 1, 2]


@pytest.mark.parametrize("name", TOWERS)
def test_products_are_kept_and_nothing_else(name: str) -> None:
    """Of a block whose products are kept, the second pass computes all but these."""
    counts = []
    for settings in ({"grad_checkpointing_keeps": "products"}, {}, {"grad_checkpointing": 0}):
        model = made(name, **{"grad_checkpointing": 1.0, **settings})
        with Operations() as operations:
            gradients(model, TOWERS[name][0])
        counts.append(operations.counts)
    kept, run_again, once = counts
    assert sum(run_again[op] - once[op] for op in numerics.PRODUCTS) > 0
    assert {op: kept[op] for op in numerics.PRODUCTS} == {op: once[op] for op in numerics.PRODUCTS}
    norm = torch.ops.aten.native_layer_norm.default
    assert kept[norm] == run_again[norm] > once[norm]


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("keeps", ["nothing", "products"])
def test_blocks_are_compiled_that_are_recomputed(name: str, keeps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = collected_graphs(monkeypatch)
    length = TOWERS[name][0]
    expected = gradients(made(name), length)
    settings = {"grad_checkpointing": 0.5, "grad_checkpointing_keeps": keeps, "compile": True}
    actual = gradients(made(name, **settings), length)
    assert len(graphs) == 4, "of each tower a block as it is and one that is recomputed; equal blocks share"
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-6, rtol=1e-4)


def test_texts_of_every_form_meet_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and validation; beyond torch's limit of eight forms blocks would no longer be compiled."""
    graphs = collected_graphs(monkeypatch)
    settings = {"grad_checkpointing": 1.0, "grad_checkpointing_keeps": "products", "compile": True}
    model = made("panderm_tiny_bert", **settings)
    for train in (True, False):
        model.train(train)
        with torch.set_grad_enabled(train):
            model.encode_image(torch.zeros(2, 3, 64, 64))  # type: ignore[operator]
            for num_texts, length, num_words in ((4, 24, 20), (3, 32, 20), (1, 40, 20), (2, 48, 48), (1, 56, 56)):
                tokens = torch.zeros(num_texts, length, dtype=torch.int64)
                tokens[:, :num_words] = 7
                model.encode_text(tokens)  # type: ignore[operator]
    assert len(graphs) > 8


def test_channels_last_reaches_the_tower() -> None:
    model = made("dermray_tiny", channels_last=True)
    seen: list[bool] = []
    convolution = model.get_submodule("visual.conv1")
    convolution.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    gradients(model, 48)
    assert seen == [True]


def test_a_worker_computes_with_the_threads_it_is_given() -> None:
    before = torch.get_num_threads()
    try:
        for asked in (1, 2):
            config = PretrainConfig(corpus="c", output="o", threads_per_worker=asked)
            numerics.settle(config, torch.device("cpu"))
            assert torch.get_num_threads() == asked
    finally:
        torch.set_num_threads(before)
