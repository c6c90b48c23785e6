"""The examples of docs/serving.md, run by the shell as they are pasted, on a photograph as a telephone takes them."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from dermray.vectors.index import VectorIndex
from dermray.vectors.index.vectors import build
from tests.serving import DummyBackend, listening, save_embeddings

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"
# Those of the roll-out need a registry: tests/integration has them.
EXAMPLES = [
    command
    for block in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    for command in re.split(r"\n(?=curl |\{ printf|serve |ray |python |export |\n)", block)
    if "curl localhost" in command and "admin" not in command and "Authorization" not in command
]


def large_photograph() -> bytes:
    """A JPEG of some 5 MB."""
    pixels = np.random.default_rng(0).integers(0, 256, (1900, 2500, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=93)
    assert 4.5e6 < buffer.tell() < 6e6
    return buffer.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "photo.jpg").write_bytes(large_photograph())
    save_embeddings(folder / "embeddings")
    build(str(folder / "embeddings"), str(folder / "index"))
    index = VectorIndex.load(str(folder / "index"))
    with listening(create_app(Catalogue.of(DummyBackend()), LimitsConfig(), index=index)) as url:
        yield url, folder


def test_the_guide_has_examples_of_every_question():
    text = "\n".join(EXAMPLES)
    assert len(EXAMPLES) >= 9
    assert {"classify", "concepts", "search", "embeddings", "models"} <= set(re.findall(r"/v1/(\w+)", text))
    assert sum("photo.jpg" in example for example in EXAMPLES) >= 7


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works_as_it_is_pasted(place, example):
    url, folder = place
    command = example.replace("localhost:8000", url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "error" not in answer, answer
    assert answer["object"] in ("list", "classification", "concepts")
