"""CAE v2 beside its published figures: any sizes, nothing computed for what is masked, initial weights, drop path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dermray.errors import ModelError
from dermray.losses import MaskedLatentAlignmentLoss
from dermray.models.cae import CaeV2, drop_path_rates, reordered, visible_then_masked
from dermray.models.panderm import Mlp, PatchEmbedding


def model_of(image_size: int = 24, patch_size: int = 4, width: int = 32, teacher_width: int = 20) -> CaeV2:
    torch.manual_seed(0)
    return CaeV2(image_size, patch_size, width, 2, 4, 2, teacher_width)


def mask_of(num_images: int, num_patches: int, num_masked: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    keys = torch.rand(num_images, num_patches, generator=generator)
    return keys.argsort(dim=1).argsort(dim=1) < num_masked


@pytest.mark.parametrize(("image_size", "patch_size", "width"), [(24, 4, 32), (28, 14, 16), (16, 16 // 4, 64)])
def test_any_size_gives_unit_vectors_in_the_order_class_visible_masked(image_size, patch_size, width) -> None:
    model, num_patches = model_of(image_size, patch_size, width), (image_size // patch_size) ** 2
    mask = mask_of(3, num_patches, num_patches // 2)
    images = torch.randn(3, 3, image_size, image_size)
    prediction = model(images, mask)
    assert prediction.shape == (3, 1 + num_patches, 20)
    torch.testing.assert_close(prediction.norm(dim=2), torch.ones(3, 1 + num_patches))
    torch.testing.assert_close(model(images, mask.long(), num_masked=num_patches // 2), prediction)
    # What is masked is not seen.
    hidden = (
        mask.view(3, image_size // patch_size, -1).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    )
    torch.testing.assert_close(model(images + 9.0 * hidden[:, None], mask), prediction)
    assert not torch.allclose(model(images + 9.0 * ~hidden[:, None], mask), prediction, atol=1e-3)


def encoder_flops(model: CaeV2, num_masked: int) -> int:
    num_patches = model.rd_pos_embed.shape[1] - 1
    order = visible_then_masked(mask_of(2, num_patches, num_masked))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = model.encoder.embed(torch.zeros(2, 3, 24, 24), order[:, : num_patches - num_masked])
        model.encoder.forward_blocks(x)
    return counter.get_total_flops()


def test_the_encoder_computes_nothing_for_masked_patches() -> None:
    model = model_of()
    width, patch = 32, 3 * 4 * 4
    for num_visible in (9, 18, 27):
        tokens = num_visible + 1
        # A multiply-add is two: patches; per block queries, keys, values, projection, MLP, and attention.
        blocks = tokens * (12 * width * width) + 2 * tokens * tokens * width
        assert encoder_flops(model, 36 - num_visible) == 2 * 2 * (num_visible * patch * width + 2 * blocks)
    # And the whole model no more than that, its regressor and its head.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, 24, 24), mask_of(2, 36, 18))
    # Keys and values of all patches, queries, projection and MLP of the masked ones, attention of these to all.
    block = 2 * 36 * width * width + 18 * 10 * width * width + 2 * 18 * 36 * width
    beside = 2 * 2 * (2 * block + 37 * width * 20)
    assert counter.get_total_flops() == encoder_flops(model, 18) + beside


def test_patches_that_are_seen_are_embedded_as_among_all() -> None:
    embedding, images = PatchEmbedding(4, 16), torch.randn(2, 3, 12, 12)
    visible = torch.tensor([[8, 0, 4], [1, 2, 3]])
    whole = embedding(images)
    torch.testing.assert_close(embedding(images, visible), torch.stack([whole[n][visible[n]] for n in range(2)]))


def test_targets_are_brought_into_the_same_order() -> None:
    tokens = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    assert reordered(tokens, mask)[:, :, 0].tolist() == [[0, 1, 3, 2, 4], [5, 8, 9, 6, 7]]


def test_masks_that_do_not_fit_are_refused() -> None:
    model, images = model_of(), torch.zeros(2, 3, 24, 24)
    unequal = mask_of(2, 36, 5)
    unequal[1, int((~unequal[1]).nonzero()[0])] = True
    with pytest.raises(ModelError, match="as many masked patches: image 0 has 5, others 6"):
        model(images, unequal)
    for count in (0, 36):
        with pytest.raises(ModelError, match=f"{count} of 36 patches are masked"):
            model(images, mask_of(2, 36, count))
    with pytest.raises(ModelError, match=r"the mask is \[2, 35\], and must be \[2, 36\]"):
        model(images, mask_of(2, 35, 5))


def test_initial_weights_are_those_of_cae_v2() -> None:
    torch.manual_seed(0)
    model = CaeV2(32, 8, 64, 3, 4, 2, 48, layer_scale=1e-5)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "gamma" in name:
            assert (value == 1e-5).all()
        elif "norm" in name:
            assert (value == 1).all()
        elif value.ndim == 2:
            limit = (6 / sum(value.shape)) ** 0.5
            assert 0.98 * limit < value.abs().max() <= limit, name
    for name in ("mask_token", "encoder.cls_token", "encoder.patch_embed.proj.weight"):
        assert 0.01 < state[name].abs().max() <= 0.02
    assert torch.equal(state["rd_pos_embed"], state["encoder.pos_embed"])
    assert {name for name, value in model.named_parameters() if not value.requires_grad} == {
        "rd_pos_embed",
        "encoder.pos_embed",
    }


def test_mlps_become_as_wide_as_those_of_the_weights() -> None:
    narrow, model = model_of(), model_of()
    for module in [*narrow.modules()]:
        for name, child in module.named_children():
            if isinstance(child, Mlp):
                setattr(module, name, Mlp(child.fc1.in_features, 2 * child.fc1.in_features))
    model.load_state_dict(narrow.state_dict())
    images, mask = torch.randn(2, 3, 24, 24), mask_of(2, 36, 12)
    torch.testing.assert_close(model(images, mask), narrow(images, mask))


def test_a_branch_that_is_left_out_of_an_image_leaves_the_others_alone() -> None:
    assert drop_path_rates(0.2, 3, 2) == [0, 0, 0.1, 0.1, 0.2, 0.2, 0, 0, 0.2, 0.2]
    model, images, mask = model_of(), torch.randn(2, 3, 24, 24), mask_of(2, 36, 12)
    kept = torch.ones(2, 8)
    torch.testing.assert_close(model(images, mask, kept=kept), model(images, mask))
    for branch in range(8):
        kept = torch.ones(2, 8)
        kept[1, branch] = 0
        given, whole = model(images, mask, kept=kept), model(images, mask)
        torch.testing.assert_close(given[0], whole[0])
        assert not torch.equal(given[1], whole[1])


def test_weights_of_the_loss_are_factors() -> None:
    prediction, target = torch.nn.functional.normalize(torch.randn(2, 3, 10, 6), dim=-1)
    mask = mask_of(3, 9, 4)
    distances = 1 - (prediction * target).sum(-1)
    whole = MaskedLatentAlignmentLoss()(prediction, target, mask)
    torch.testing.assert_close(whole, distances.mean())
    masked, visible = MaskedLatentAlignmentLoss(1.0, 0.0), MaskedLatentAlignmentLoss(0.0, 1.0)
    parts = masked(prediction, target, mask), visible(prediction, target, mask)
    torch.testing.assert_close(parts[0], distances[:, -4:].sum() / 30)
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(
        MaskedLatentAlignmentLoss(2.0, 0.5)(prediction, target, mask), 2 * parts[0] + parts[1] / 2
    )
