"""The public checkpoints, by hub id and as downloaded folders, in the layouts their authors publish; small widths."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import open_clip
import pytest
import safetensors.torch
import torch
from torch import nn

from dermray import models
from dermray.errors import ModelError
from dermray.models import huggingface
from dermray.models.hub import environment as environment_of_workers
from dermray.vectors.encoder import Encoder
from tests.corpora import MODEL_CFG, jpeg

PREPROCESS_CFG = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
SAFETENSORS, PICKLED = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
VIT, PANDERM, MAKE = "DermLIP_ViT-B-16", "DermLIP_PanDerm-base-w-PubMed-256", "MAKE"
# Published id → whose it is.
OWNERS = {VIT: "redlessone", PANDERM: "redlessone", MAKE: "xieji-x"}
PUBMEDBERT = "neuml/pubmedbert-base-embeddings"


def published(name: str) -> tuple[dict[str, Any], nn.Module]:
    """The `model_cfg` as its authors write it, and a model of that architecture."""
    torch.manual_seed(3)
    if name != PANDERM:
        return MODEL_CFG, open_clip.CLIP(**MODEL_CFG)
    ours = models.architecture("panderm_tiny_bert")
    vision = {key: ours["vision_cfg"][key] for key in ("image_size", "layers", "width", "patch_size", "head_width")}
    text = {"context_length": 64, "hf_model_name": PUBMEDBERT, "hf_tokenizer_name": PUBMEDBERT}
    config = {
        "embed_dim": ours["embed_dim"],
        "vision_cfg": {**vision, "pretrain_path": "/home/author/panderm_bb_data6_checkpoint-499.pth"},
        "text_cfg": {**text, "hf_pooler_type": "mean_pooler"},
    }
    return config, models.create("panderm_tiny_bert")[0]


def write(folder: Path, name: str, weights: str) -> nn.Module:
    """A downloaded repository; beside PanDerm's lie the files of its text model."""
    config, model = published(name)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS_CFG}))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if weights == SAFETENSORS:
        safetensors.torch.save_file(state, str(folder / weights))
    else:
        torch.save(state, folder / weights)
    if name == PANDERM:
        shutil.copytree(huggingface.PACKAGED_FOLDER / "wordpiece_tiny", folder, dirs_exist_ok=True)
        text_config = models.architecture("panderm_tiny_bert")["text_cfg"]["hf_config"]
        (folder / "config.json").write_text(json.dumps(text_config))
    return model.eval()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network; the folder of the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def assert_same(made: tuple[nn.Module, Any, Any], expected: nn.Module) -> None:
    """The same image and text features as the model that was written."""
    model, transform, tokenizer = made
    size = models.preprocessing(model).size
    pixels = torch.from_numpy(Encoder(model, transform, tokenizer, name="n").preprocess(jpeg((200, 60, 50))))[None]
    assert pixels.shape == (1, 3, size, size)
    tokens = tokenizer(["This is a skin image of melanoma"])
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_image(pixels), expected.encode_image(pixels))  # type: ignore[operator]
        torch.testing.assert_close(model.encode_text(tokens), expected.encode_text(tokens))  # type: ignore[operator]


@pytest.mark.parametrize("weights", [SAFETENSORS, PICKLED])
@pytest.mark.parametrize("name", OWNERS)
def test_a_downloaded_folder_loads_without_network(
    offline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, weights: str
) -> None:
    folder = tmp_path / name
    expected = write(folder, name, weights)
    assert_same(models.create(str(folder)), expected)
    assert_same(models.create(f"local-dir:{folder}"), expected)
    encoder = Encoder.load(str(folder), device="cpu")
    assert encoder.info.name == name
    # open_clip says that of every model whose weights we read.
    assert "randomly" not in caplog.text
    assert encoder.info.model_digest == hashlib.sha256((folder / weights).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [VIT, MAKE])
def test_a_hub_id_loads_from_what_was_fetched_before(offline: Path, tmp_path: Path, name: str) -> None:
    repository = offline / f"models--{OWNERS[name]}--{name}"
    expected = write(repository / "snapshots" / "0123abcd", name, PICKLED)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    hub_id = f"hf-hub:{OWNERS[name]}/{name}"
    assert models.architecture(hub_id) == MODEL_CFG
    assert_same(models.create(hub_id), expected)


class _Hub(SimpleHTTPRequestHandler):
    """The hub's way of handing out a file: `/ORG/NAME/resolve/main/FILE`, with the commit and a digest of the file."""

    asked: ClassVar[list[str]] = []

    def translate_path(self, path: str) -> str:
        """Without what the hub puts between a repository and its file."""
        return super().translate_path(path.replace("/resolve/main/", "/"))

    def send_head(self) -> Any:
        """Answer HEAD, and the beginning of GET."""
        self.asked.append(f"{self.command} {self.path}")
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A hub on this machine: its address, and the folder of its repositories."""
    folder = tmp_path / "hub-of-this-machine"
    folder.mkdir()
    _Hub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


@pytest.mark.long
def test_a_hub_id_is_downloaded_once(hub: tuple[str, Path], tmp_path: Path) -> None:
    """Over HTTP, in a process of its own: the hub's address is settled when its library is imported."""
    address, repositories = hub
    name = f"{OWNERS[VIT]}/{VIT}"
    expected = write(repositories / name, VIT, PICKLED)
    code = (
        "import sys, torch\n"
        "from dermray import models\n"
        "from dermray.models import weights\n"
        f"torch.save(models.create('hf-hub:{name}')[0].state_dict(), sys.argv[1])\n"
        # As for a tower that open_clip cannot build, or one that starts from a checkpoint.
        f"torch.save(weights.read('hf-hub:{name}'), sys.argv[2])"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    made = [tmp_path / "model.pt", tmp_path / "weights.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, made)], env=environment, check=True, timeout=120)
    for file in made:
        state = torch.load(file, weights_only=True)
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in expected.state_dict().items())
    fetched = [line.rpartition("/")[2] for line in _Hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert sorted(fetched) == ["open_clip_config.json", PICKLED]
    assert any(line.startswith("HEAD") and line.endswith(SAFETENSORS) for line in _Hub.asked)


CHECK = """
import json, sys
import open_clip
from dermray import models
from dermray.errors import ModelError
from dermray.models import hub
# A second of patience instead of several: it is on this machine.
hub.REACH_WITHIN_S = 1
for arguments in json.loads(sys.argv[1]):
    try:
        models.check(*arguments)
    except ModelError as error:
        print("refused", error)
"""
OPENAI = ("ViT-B-32-quickgelu", "openai")
OPENAI_FOLDER = "timm/vit_base_patch32_clip_224.openai"


def check(address: str, home: Path, *models: tuple[str, ...]) -> str:
    """What a driver does at the door, in a process of its own; what it says."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", CHECK, json.dumps(models)]
    return subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True).stdout


def test_weights_of_a_tag_are_fetched_at_the_door_and_taken_from_the_cache_then(
    hub: tuple[str, Path], tmp_path: Path
) -> None:
    address, repositories = hub
    (repositories / OPENAI_FOLDER).mkdir(parents=True)
    (repositories / OPENAI_FOLDER / SAFETENSORS).write_bytes(b"weights")
    assert "refused" not in check(address, tmp_path / "home", OPENAI)
    asked = len(_Hub.asked)
    assert [line for line in _Hub.asked if line.startswith("GET") and line.endswith(SAFETENSORS)]
    # As workers do it.
    code = (
        f"import open_clip; print(open(open_clip.download_pretrained(open_clip.get_pretrained_cfg(*{OPENAI}))).read())"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), **environment_of_workers()}
    taken = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert taken.stdout == "weights\n"
    assert len(_Hub.asked) == asked, "a worker asks nothing"
    # And so does another driver while the hub is away.
    assert "refused" not in check("http://127.0.0.1:9", tmp_path / "home", OPENAI)


@pytest.mark.parametrize("answers", [pytest.param("refused", marks=pytest.mark.long), "hanging"])
def test_a_hub_out_of_reach_is_told_within_seconds(tmp_path: Path, answers: str) -> None:
    """The hub's library alone tries for a minute and more of each, and `check` would end that."""
    asked = [OPENAI, ("ViT-B-32", "hf-hub:some/weights"), ("hf-hub:some/model",)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if answers == "refused":
            server.close()
        said = check(f"http://127.0.0.1:{port}", tmp_path / "home", *asked).splitlines()
    assert len(said) == len(asked)
    for refusal in said:
        assert refusal.startswith("refused cannot ")
        assert "Without network, download" in refusal


@pytest.mark.parametrize("name", OWNERS)
def test_without_network_the_error_says_how_to_point_at_a_folder(offline: Path, name: str) -> None:
    with pytest.raises(
        ModelError, match=rf"hf-hub:{OWNERS[name]}/{name}.*Without network, download the model's folder"
    ) as e:
        models.create(f"hf-hub:{OWNERS[name]}/{name}")
    assert "open_clip_config.json and open_clip_model.safetensors or open_clip_pytorch_model.bin" in str(e.value)
    assert "give its path" in str(e.value)


def test_the_published_text_model_is_known_by_its_name(offline: Path, tmp_path: Path) -> None:
    """The published folder of DermLIP-PanDerm names PubMedBERT and need not hold its config.json."""
    tower_config = huggingface._config({"hf_model_name": "NeuML/pubmedbert-base-embeddings"}, tmp_path)
    assert (tower_config.model_type, tower_config.hidden_size, tower_config.num_hidden_layers) == ("bert", 768, 12)
    with pytest.raises(ModelError, match=r"cannot load the configuration of the text model 'some/other'.*config\.json"):
        huggingface._config({"hf_model_name": "some/other"}, tmp_path)


def test_any_open_clip_name_builds(offline: Path) -> None:
    model, _, tokenizer = models.create("RN50")
    assert tokenizer(["a nevus"]).shape == (1, 77)
    assert models.preprocessing(model).size == 224
