"""What a command does before its settings are known to be right, and before it says its first line: next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dermray import cluster, entry
from dermray.commands import embed, evaluate, export, leakage, pretrain
from tests.corpora import write_model, write_prepared_corpus

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "mlflow", "pandas", "open_clip", "matplotlib", "sklearn")
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
# Commands that take long, with the keys that each needs.
LONG = {
    "jobs.prepare": ["source=csv", "input=raw", "output=out"],
    "jobs.pretrain": ["corpus=corpus", "output=out"],
    "jobs.evaluate": ["model=model", "corpus=corpus", "output=out"],
    "jobs.compare": ["reports=[a,b]", "output=out"],
    "jobs.embed": ["model=model", "corpus=corpus", "output=out"],
    "jobs.index": ["embeddings=embeddings", "output=out"],
    "jobs.export": ["corpus=corpus", "output=out", "format=parquet"],
    "jobs.leakage": ["corpus=corpus", "against=[other]", "output=out"],
    "tune.sweep": [
        *(f"recipe={ROOT / 'jobs/configs/demo.yaml'}", "corpus=corpus", "output=out"),
        *("--config", str(ROOT / "tune/spaces/demo.yaml")),
    ],
}
PROGRAM = """
import importlib, json, sys
heavy, modules, commands = json.loads(sys.argv[1])
found = {}

def loaded():
    return [name for name in heavy if name in sys.modules]

for name in modules:
    importlib.import_module(name)
    found["import of " + name] = loaded()

from dermray import entry

class Begun(BaseException):
    pass

def begin(job, what):
    raise Begun

entry.begin = begin
for name, arguments in commands.items():
    try:
        sys.modules[name].main(arguments)
        found["first line of " + name] = ["none"]
    except Begun:
        found["first line of " + name] = loaded()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What of the heavy packages was loaded after each step, in one process."""
    given = [HEAVY, [*(f"jobs.{name}" for name in JOBS), "tune.sweep"], LONG]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}", json.dumps(given)]
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    document: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.mark.parametrize("command", [*(f"jobs.{name}" for name in JOBS), "tune.sweep"])
def test_settings_are_read_before_anything_heavy_is_imported(found: dict[str, list[str]], command: str) -> None:
    assert found[f"import of {command}"] == []


@pytest.mark.parametrize("command", LONG)
def test_a_long_job_says_its_first_line_before_anything_heavy_is_imported(
    found: dict[str, list[str]], command: str
) -> None:
    assert found[f"first line of {command}"] == []


CHECKS = """
import sys
from dermray import models
from dermray.config import parse
from dermray.train import pretrain
from dermray.train.settings import PretrainConfig
folder = sys.argv[1]
print(models.architecture(folder)["embed_dim"], "open_clip" in sys.modules)
pretrain.check(parse(PretrainConfig, sys.argv[2:]))
print("open_clip" in sys.modules)
"""


def test_a_trainings_driver_checks_a_model_folder_without_open_clip(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    write_prepared_corpus(tmp_path / "corpus", {"train": 16})
    keys = [f"model={model}", f"corpus={tmp_path / 'corpus'}", "output=out", "train.global_batch_size=8"]
    command = [sys.executable, "-c", CHECKS, str(model), *keys]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.split() == ["32", "False", "False"], done.stderr


def test_a_split_that_there_is_not_is_a_wrong_value_and_found_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, model = f"corpus={tmp_path / 'corpus'}", f"model={write_model(tmp_path / 'model')}"
    write_prepared_corpus(tmp_path / "corpus", {"train": 16, "val": 8})
    trained = [model, corpus, "train.global_batch_size=8"]
    asked = {
        pretrain: [[*trained, "data.split=tran"], [*trained, "validation.every_steps=1", "validation.split=vla"]],
        evaluate: [[model, corpus, "split=vla"]],
        embed: [[model, corpus, "splits=[train,vla]"]],
        export: [[corpus, "format=parquet", "splits=[vla]"]],
        leakage: [[corpus, f"against={tmp_path / 'corpus'}#vla"], [corpus, "against=[x]", "splits=[vla]"]],
    }
    monkeypatch.setattr(cluster, "connect", lambda _: pytest.fail("a cluster was started"))
    keys = [f"output={tmp_path / 'out'}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    for job, commands in asked.items():
        for arguments in commands:
            assert entry.run_job(lambda job=job, given=arguments: job.main([*given, *keys])) == 2, arguments  # type: ignore[misc]
            assert "has no split '" in capsys.readouterr().err
