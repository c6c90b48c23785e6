"""PanDerm and Hugging Face towers: built, saved and loaded offline; checkpoints load whole, in part, or not at all."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from dermray import models, storage
from dermray.errors import ModelError
from dermray.models import architectures, huggingface, towers, weights
from dermray.models.layout import CONFIG_NAME
from dermray.models.panderm import PanDermVisionTransformer
from tests.conftest import ROOT
from tests.s3 import BUCKET, faulty_s3

SHAPES = json.loads((ROOT / "tests/golden/panderm_base_state_dict_shapes.json").read_text())
JOINT = SHAPES["dermlip_panderm_base_w_pubmed_256"]
NAME = "panderm_tiny_bert"
TEXTS = ["A photo of  melanoma", "", "größe 3 mm &amp; scale " * 40]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(1)
    return models.create(NAME)[0]


@pytest.fixture(scope="module")
def folder(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    models.save(tiny, str(path), model_cfg=models.architecture(NAME), provenance={"corpus_digest": "c"})
    return path


def other(seed: int = 2) -> tuple[nn.Module, State]:
    """A model of the same architecture with other weights, and its state."""
    torch.manual_seed(seed)
    model = models.create(NAME)[0]
    return model, {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(module: nn.Module, state: State) -> None:
    own = module.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], value) for key, value in state.items())


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """The full-size architecture, without memory."""
    with torch.device("meta"):
        return towers.build(models.architecture("panderm_base_pubmed256"))


def joint_state() -> State:
    shapes = {**JOINT["visual"], **JOINT["text"], "logit_scale": JOINT["logit_scale"]}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_the_public_checkpoints_names_and_shapes_are_the_base_models(base: nn.Module) -> None:
    expected = {key: value.shape for key, value in joint_state().items()}
    assert {key: value.shape for key, value in base.state_dict().items()} == expected
    assert len(expected) == len(JOINT["visual"]) + len(JOINT["text"]) + 1


def test_the_public_checkpoint_fills_the_base_model(base: nn.Module) -> None:
    towers.fill(base, joint_state(), source="public")
    old = {**joint_state(), "text.transformer.embeddings.position_ids": torch.empty(1, 512, device="meta")}
    towers.fill(base, old, source="from an older library")
    reshaped = {**joint_state(), "logit_scale": torch.empty(1, device="meta")}
    towers.fill(base, reshaped, source="scale as a vector")


def test_an_error_counts_and_names_what_does_not_fit(base: nn.Module) -> None:
    state = joint_state()
    for layer in range(5):
        del state[f"visual.blocks.{layer}.gamma_1"]
    state["visual.fc_norm.weight"] = torch.empty(768, device="meta")
    state["visual.head.weight"] = torch.empty(7, 768, device="meta")
    with pytest.raises(ModelError) as caught:
        towers.fill(base, state, source="odd.pt")
    message = str(caught.value)
    assert "'odd.pt' do not fit" in message
    assert "5 missing (visual.blocks.0.gamma_1, " in message
    assert "1 unexpected (visual.fc_norm.weight)" in message
    assert "1 of another shape (visual.head.weight [7, 768] instead of [512, 768])" in message
    assert "blocks.4" not in message, "the first few are enough"
    assert "\n" not in message


def test_weights_that_do_not_fit_change_nothing() -> None:
    model, state = other()
    poor = {key: torch.zeros_like(value) for key, value in state.items() if key != "visual.norm.bias"}
    with pytest.raises(ModelError, match=r"1 missing \(visual\.norm\.bias\)"):
        towers.fill(model, poor, source="poor")
    assert_equal(model, state)


@pytest.mark.parametrize("form", ["safetensors", "pt", "ddp", "compiled", "lightning", "folder"])
def test_a_whole_checkpoint_in_any_wrapping(tmp_path: Path, form: str) -> None:
    _, state = other(3)
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "epoch_30.pt")
    if form == "safetensors":
        safetensors.torch.save_file(state, file)
    elif form == "folder":
        file = tmp_path
        torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    else:
        prefix = {"ddp": "module.", "compiled": "module._orig_mod."}.get(form, "")
        wrapped: dict[str, Any] = {prefix + key: value for key, value in state.items()}
        if form != "pt":
            wrapped = {"epoch": 30, "state_dict": wrapped, "optimizer": {"state": {}}}
        if form == "lightning":
            wrapped["args"] = argparse.Namespace(lr=1e-4)
        torch.save(wrapped, file)
    model, _, _ = models.create(NAME, pretrained=str(file))
    assert not model.training
    assert_equal(model, state)


def test_a_checkpoint_of_our_own_training_is_one_too(tmp_path: Path) -> None:
    model, state = other(4)
    torch.save(
        {"step": 3, "model": model.state_dict(), "optimiser": {}, "metrics": {"loss": 1.0}}, tmp_path / "state.pt"
    )
    assert_equal(models.create(NAME, pretrained=str(tmp_path / "state.pt"))[0], state)


def test_a_checkpoint_in_an_object_store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state = other(5)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    storage._remote_filesystem.cache_clear()
    try:
        with faulty_s3() as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
            torch.save(state, tmp_path / "weights.pt")
            storage.upload(tmp_path / "weights.pt", f"s3://{BUCKET}/weights.pt")
            safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
            storage.upload(tmp_path / "weights.safetensors", f"s3://{BUCKET}/weights.safetensors")
            for name in ("weights.pt", "weights.safetensors"):
                read = weights.read(f"s3://{BUCKET}/{name}")
                assert all(torch.equal(read[key], value) for key, value in state.items())
            storage.copy_tree(folder, f"s3://{BUCKET}/language-model")
            with huggingface.language_model_folder(f"s3://{BUCKET}/language-model") as copied:
                assert copied is not None
                assert (copied / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
            with pytest.raises(ModelError, match="does not exist"):
                weights.read(f"s3://{BUCKET}/absent.pt")
    finally:
        storage._remote_filesystem.cache_clear()


@pytest.mark.parametrize("form", ["tower", "joint", "cae", "no head"])
def test_the_vision_tower_alone(tiny: nn.Module, tmp_path: Path, form: str) -> None:
    donor, state = other(6)
    tower = {key: value.clone() for key, value in donor.get_submodule("visual").state_dict().items()}
    stored: dict[str, Any] = tower
    if form == "joint":
        stored = state
    if form in ("cae", "no head"):
        tower = {key: value for key, value in tower.items() if not key.startswith("head.")}
        stored = tower
    if form == "cae":
        stored = {f"encoder.{key}": value for key, value in tower.items()}
        stored |= {"teacher.x": torch.zeros(2), "mask_token": torch.zeros(1), "regresser.y": torch.zeros(3)}
        stored = {"model": stored, "args": argparse.Namespace(model="cae"), "epoch": 499}
    torch.save(stored, tmp_path / "panderm_base.pth")
    torch.manual_seed(1)
    model, _, _ = models.create(NAME, pretrained_image=str(tmp_path / "panderm_base.pth"))
    got = model.state_dict()
    assert all(torch.equal(got[f"visual.{key}"], value) for key, value in tower.items())
    untouched = {
        key: value for key, value in tiny.state_dict().items() if f"{key.removeprefix('visual.')}" not in tower
    }
    assert {"logit_scale", "text.proj.0.weight"} <= untouched.keys()
    assert all(torch.equal(got[key], value) for key, value in untouched.items())


def test_a_vision_tower_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = PanDermVisionTransformer(64, 8, 128, 3, 4, 128).state_dict()
    torch.save(state, tmp_path / "three_layers.pth")
    with pytest.raises(ModelError, match=r"cannot load the model 'panderm_tiny_bert'.*15 missing \(blocks\.3\.gamma_1"):
        models.create(NAME, pretrained_image=str(tmp_path / "three_layers.pth"))


def test_a_plain_vision_tower_takes_a_part_too(tmp_path: Path) -> None:
    torch.manual_seed(8)
    donor = models.create("dermray_tiny")[0].get_submodule("visual").state_dict()
    torch.save(donor, tmp_path / "visual.pt")
    model, _, _ = models.create("dermray_tiny", pretrained_image=str(tmp_path / "visual.pt"))
    assert_equal(model.get_submodule("visual"), donor)


@pytest.mark.parametrize("form", ["encoder", "language model"])
def test_the_language_model_alone(tmp_path: Path, form: str) -> None:
    donor = other(9)[0].get_submodule("text.transformer").state_dict()
    prefix = "bert." if form == "language model" else ""
    stored = {prefix + key: value.clone() for key, value in donor.items()}
    stored |= {f"{prefix}pooler.dense.bias": torch.zeros(96), f"{prefix}embeddings.position_ids": torch.zeros(1, 64)}
    if form == "language model":
        stored |= {"cls.predictions.bias": torch.zeros(1000)}
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    model, _, _ = models.create(NAME, pretrained_text=str(tmp_path))
    assert_equal(model.get_submodule("text.transformer"), donor)


def test_a_language_models_folder_brings_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Without network the hub's name leads nowhere; the downloaded folder has it all."""
    downloaded = tmp_path / "pubmedbert"
    downloaded.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, downloaded)
    tokenizer_json = json.loads((downloaded / "tokenizer.json").read_text())
    vocabulary = tokenizer_json["model"]["vocab"]
    vocabulary["melanoma"], vocabulary["shiny"] = vocabulary["shiny"], vocabulary["melanoma"]
    (downloaded / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    donor = other(9)[0].get_submodule("text.transformer").state_dict()
    safetensors.torch.save_file({key: value.clone() for key, value in donor.items()}, downloaded / "model.safetensors")
    model, _, tokenizer = models.create(NAME, pretrained_text=str(downloaded))
    assert_equal(model.get_submodule("text.transformer"), donor)
    assert not torch.equal(tokenizer(TEXTS), models.tokenizer(NAME)(TEXTS))
    assert torch.equal(models.tokenizer(NAME, str(downloaded))(TEXTS), tokenizer(TEXTS))
    models.save(model, str(tmp_path / "model"), model_cfg=models.architecture(NAME), provenance={})
    assert torch.equal(models.create(str(tmp_path / "model"))[2](TEXTS), tokenizer(TEXTS))


@pytest.mark.timeout(120)
def test_a_language_model_of_more_layers_than_its_weights_is_refused_before_it_is_built(
    folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 50_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    donor = other(9)[0].get_submodule("text.transformer").state_dict()
    safetensors.torch.save_file({key: value.clone() for key, value in donor.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="many times more than their"):
        huggingface.text_tower({"hf_model_name": "a/b"}, 32, tmp_path)


def test_a_clip_text_tower_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pretrained_text fills Hugging Face text towers"):
        models.create("dermray_tiny", pretrained_text=str(tmp_path / "any.pt"))


class Payload:
    """Would make a file if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("key", ["pretrained", "pretrained_image", "pretrained_text"])
def test_pickles_are_not_opened(tmp_path: Path, key: str) -> None:
    torch.save({"state_dict": Payload(tmp_path / "opened")}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="more than tensors and is not opened"):
        models.create(NAME, **{key: str(tmp_path / "evil.pt")})
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"no checkpoint at all", "a text and holds no weights"),
        (b"PK\x03\x04 half a zip", "damaged"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes, reason: str, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=f"weights.{suffix}' is {reason}") as caught:
        weights.read(str(file))
    assert "\n" not in str(caught.value)


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="is no state dict: it holds a list"):
        weights.read(str(tmp_path / "list.pt"))
    torch.save({"a": torch.zeros(1), "lr": 0.1}, tmp_path / "mixed.pt")
    with pytest.raises(ModelError, match="is no state dict: lr is no tensor"):
        weights.read(str(tmp_path / "mixed.pt"))
    with pytest.raises(ModelError, match=r"the name must end in one of \.safetensors, \.pt"):
        weights.read(str(tmp_path / "weights.npz"))
    with pytest.raises(ModelError, match="absent.pt' does not exist"):
        weights.read(str(tmp_path / "absent.pt"))


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_CHECKPOINT_BYTES", 1 << 20)
    torch.save({"a": torch.zeros(1 << 19)}, tmp_path / "large.pt")
    with pytest.raises(ModelError, match="is larger than"):
        weights.read(str(tmp_path / "large.pt"))
    with (
        zipfile.ZipFile(tmp_path / "large.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 16
    with pytest.raises(ModelError, match="unpacks to more than"):
        weights.read(str(tmp_path / "bomb.pt"))


def test_missing_weights_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.pth")
    for key in ("pretrained", "pretrained_image", "pretrained_text"):
        with pytest.raises(ModelError, match="absent.pth' does not exist"):
            models.check(NAME, **{key: absent})
    models.check(NAME)


def test_a_folder_is_whole_and_loads_anywhere(tiny: nn.Module, folder: Path, tmp_path: Path) -> None:
    """Tokeniser and text configuration come from the folder: the architecture's own names lead nowhere here."""
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    config = json.loads((moved / CONFIG_NAME).read_text())
    del config["model_cfg"]["text_cfg"]["hf_config"]
    config["model_cfg"]["text_cfg"] |= {"hf_model_name": "/absent/model", "hf_tokenizer_name": "/absent/tokenizer"}
    (moved / CONFIG_NAME).write_text(json.dumps(config))
    model, transform, tokenizer = models.create(str(moved))
    assert_equal(model, tiny.state_dict())
    assert models.preprocessing(model) == models.preprocessing(tiny)
    assert tuple(transform.transforms[-1].mean) == models.preprocessing(tiny).mean
    _, _, original = models.create(NAME)
    assert torch.equal(tokenizer(TEXTS), original(TEXTS))
    assert torch.equal(models.tokenizer(str(moved))(TEXTS), original(TEXTS))
    again = tmp_path / "again"
    models.save(model, str(again), model_cfg=models.architecture(str(moved)), provenance={"corpus_digest": "c"})
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    assert_equal(models.create(str(again))[0], tiny.state_dict())


def test_open_clip_cannot_load_the_folder_and_says_so(folder: Path) -> None:
    with pytest.raises(TypeError, match="tower"):
        open_clip.create_model(f"local-dir:{folder}")


def test_with_a_plain_vision_tower_open_clip_loads_it_too(folder: Path, tmp_path: Path) -> None:
    """Where it finds the text model's configuration under its name."""
    config = {
        "embed_dim": 32,
        "vision_cfg": models.architecture("dermray_tiny")["vision_cfg"],
        "text_cfg": {"context_length": 16, "hf_model_name": str(folder), "hf_tokenizer_name": str(folder)},
    }
    model = towers.build(config)
    open_clip.model.set_model_preprocess_cfg(model, {**models.create("dermray_tiny")[0].visual.preprocess_cfg})  # type: ignore[union-attr]
    models.save(model, str(tmp_path / "mixed"), model_cfg=config, provenance={})
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'mixed'}")
    ours, _, tokenizer = models.create(str(tmp_path / "mixed"))
    assert_equal(theirs, ours.state_dict())
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'mixed'}")(TEXTS)
    assert torch.equal(tokens, tokenizer(TEXTS))
    torch.testing.assert_close(theirs.eval().encode_text(tokens), ours.encode_text(tokens))  # type: ignore[operator]


def test_the_tokenizer_is_open_clips(folder: Path) -> None:
    ours = models.create(str(folder))[2](TEXTS)
    theirs = HFTokenizer(str(huggingface.PACKAGED_FOLDER / "wordpiece_tiny"), context_length=64)(TEXTS)
    assert torch.equal(ours, theirs)
    assert ours.shape == (3, 64)
    assert ours.dtype == torch.int64
    assert (ours[1] != 0).sum() == 2, "an empty text has its two marks"
    assert (ours[2] != 0).all(), "a long text is cut"
    assert not torch.equal(ours[0], ours[2])


def test_padding_changes_no_text_feature(tiny: nn.Module) -> None:
    tokens = models.tokenizer(NAME)(TEXTS[:2])
    longest = int((tokens != 0).sum(1).max())
    with torch.inference_mode():
        full = tiny.encode_text(tokens)  # type: ignore[operator]
        trimmed = tiny.encode_text(tokens[:, :longest])  # type: ignore[operator]
    torch.testing.assert_close(full, trimmed, atol=1e-6, rtol=0)
    assert (full[0] - full[1]).abs().max() > 1e-4


def test_a_model_without_network_needs_its_tokenizer_only_when_it_reads(tmp_path: Path) -> None:
    config = copy.deepcopy(models.architecture(NAME))
    config["text_cfg"] |= {"hf_tokenizer_name": str(tmp_path / "absent")}
    model = towers.build(config)
    assert model.encode_text(torch.ones(1, 8, dtype=torch.int64)).shape == (1, 128)
    with pytest.raises(ModelError, match="cannot load the tokeniser of the text model '.*absent'"):
        model.tokenizer(["text"])
    with pytest.raises(ModelError, match="cannot load the tokeniser"):
        models.save(model, str(tmp_path / "model"), model_cfg=config, provenance={})
    assert not (tmp_path / "model").exists()


def test_published_configurations_are_understood() -> None:
    published = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16, "pretrain_path": "/x.pth"},
        "text_cfg": {"context_length": 256, "hf_model_name": "neuml/pubmedbert-base-embeddings"},
    }
    expected = {"tower": "panderm", "image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    assert architectures.published_form(published, name="")["vision_cfg"] == expected
    del published["vision_cfg"]["pretrain_path"]  # type: ignore[attr-defined]
    by_name = architectures.published_form(published, name="redlessone/DermLIP_PanDerm-base-w-PubMed-256")
    assert by_name["vision_cfg"] == expected
    assert architectures.published_form(published, name="redlessone/DermLIP_ViT-B-16") == published


def test_activation_checkpointing_gives_the_same_gradients(tiny: nn.Module) -> None:
    model = copy.deepcopy(tiny).train()
    visual = model.get_submodule("visual")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)  # type: ignore[operator]
        model.zero_grad()
        visual(images).square().sum().backward()
        gradients.append(
            {name: value.grad.clone() for name, value in visual.named_parameters() if value.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert "blocks.0.attn.q_bias" in gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_sizes_that_do_not_divide_are_refused() -> None:
    for sizes in ((30, 8, 64, 1, 4), (32, 8, 64, 1, 5), (32, 8, 6, 1, 3)):
        with pytest.raises(ModelError, match="PanDerm tower"):
            PanDermVisionTransformer(*sizes, output_dim=8)
