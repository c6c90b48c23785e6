"""What may go and what must stay: every reason to keep something, and each alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dermray import tracking
from dermray.commands import collect_garbage as job
from dermray.config import TrackingConfig
from dermray.errors import TrackingError
from dermray.tracking.needed import Needed, _uris
from dermray.tracking.spool import Spool
from tests.lineage import Chain, ChainConfig

METRICS = {"accuracy": (0.5, 0.4, 0.6)}
OLD_S = 30 * 86_400


class OutputConfig(ChainConfig):
    output: str
    pretrained: str | None = None


def write(file: Path, text: str = "x", *, age_s: float = OLD_S) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def training(root: Path, name: str, *, finished: bool = True, age_s: float = OLD_S) -> Path:
    output = root / name
    for step in (5, 10):
        write(output / "checkpoints" / f"step-{step:08d}" / "state.pt", age_s=age_s)
        write(output / "checkpoints" / f"step-{step:08d}" / "manifest.json", "{}", age_s=age_s)
    write(output / "ray-train" / "attempt-1" / "note", age_s=age_s)
    write(output / "model" / "open_clip_config.json", "{}", age_s=age_s)
    if finished:
        write(output / "summary.json", "{}", age_s=age_s)
    return output


@pytest.fixture(autouse=True)
def spool_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DERMRAY_SPOOL", str(tmp_path / "spool"))
    return tmp_path / "spool"


def test_only_what_nothing_needs_goes(tmp_path: Path, spool_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    chain = Chain(tmp_path / "chain", config)
    chain.prepare()
    root = tmp_path / "runs"
    names = ("useless", "my named runs", "running", "at work", "unfinished", "champion", "young")
    outputs = {
        name: training(root, name, finished=name != "unfinished", age_s=60 if name == "young" else OLD_S)
        for name in names
    }
    write(root / "sweep" / "best.yaml")
    write(root / "sweep" / "tune" / "experiment" / "events")
    write(root / "sweep" / "trials" / "t0" / "trial.json", '{"status": "stopped"}')
    write(root / "sweep" / "trials" / "t0" / "checkpoints" / "step-00000005" / "state.pt")
    write(root / "sweep" / "trials" / "t1" / "trial.json", '{"status": "unfinished"}')
    write(root / "sweep" / "trials" / "t1" / "checkpoints" / "step-00000005" / "state.pt")
    write(root / "useless" / "model" / ".weights.abc.part")
    named = outputs["my named runs"] / "checkpoints" / "step-00000005"
    warm = OutputConfig(output=str(root / "later"), pretrained=str(named))
    with tracking.run(config, kind="pretrain", name="warm start", resolved=warm):
        pass
    with tracking.run(
        config, kind="pretrain", name="champion", resolved=OutputConfig(output=str(outputs["champion"]))
    ) as current:
        trained = current.id
    model = chain.pretrain("a")
    version = chain.register(model, chain.evaluate(model, METRICS))
    client = tracking.client(config)
    client.set_model_version_tag("derm", version, "dermray.training_run_id", trained)
    live = client.create_run(client.get_experiment_by_name("dermray").experiment_id, run_name="live").info.run_id
    client.log_param(live, "output", str(outputs["running"]))

    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    spool = Spool.begin(spool_folder, "0" * 32)
    spool.append({"kind": "begin", "params": {"output": str(outputs["at work"])}})
    arguments = [f"roots=[{root}]", f"tracking.uri={config.uri}"]
    assert job.main(arguments) == 0
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before, (
        "a dry run removes nothing"
    )
    lines = capsys.readouterr().out.splitlines()
    kept = {line.partition(f"{root}/")[2].partition(":")[0]: line for line in lines if line.startswith("kept")}
    assert "warm start) names it" in kept["my named runs/checkpoints/step-00000005"]
    assert "(live) is RUNNING" in kept["running/checkpoints/step-00000010"]
    assert "a job of this machine" in kept["at work/ray-train"]
    assert "has the alias champion" in kept["champion/ray-train"]
    assert "written lately" in kept["young/checkpoints/step-00000005"]

    assert job.main([*arguments, "dry_run=false"]) == 0
    gone = {str(file.relative_to(root)) for file in before if not file.exists()}
    assert gone == {
        *(f"useless/checkpoints/step-{step:08d}/{name}" for step in (5, 10) for name in ("state.pt", "manifest.json")),
        *(f"my named runs/checkpoints/step-00000010/{name}" for name in ("state.pt", "manifest.json")),
        "useless/ray-train/attempt-1/note",
        "my named runs/ray-train/attempt-1/note",
        "useless/model/.weights.abc.part",
        "sweep/tune/experiment/events",
        "sweep/trials/t0/checkpoints/step-00000005/state.pt",
    }


def test_nothing_goes_while_mlflow_does_not_know_everything(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    spool = Spool.begin(tmp_path / "spool", "k")
    spool.append({"kind": "begin"})
    spool.close()
    arguments = [f"roots=[{tmp_path}]", f"tracking.uri={config.uri}"]
    with pytest.raises(TrackingError, match="holds what MLflow has not yet been told; run jobs/deliver.py"):
        job.main(arguments)
    spool.path.unlink()
    with pytest.raises(TrackingError, match="out of reach .*: start it, or give another address"):
        job.main([*arguments, "tracking.uri=http://127.0.0.1:9"])


@pytest.mark.parametrize(
    "value",
    [
        "/data/my runs, new/it's/step-5",
        "/data/my runs, new/it's/step-5/",
        """['s3://b/c', "/data/my runs, new/it's/step-5"]""",
        """{'uri': "/data/my runs, new/it's/step-5", 'weight': 2}""",
    ],
)
def test_a_path_with_blanks_commas_and_quotes_in_a_parameter_is_needed(value: str) -> None:
    needs = Needed(dict.fromkeys(_uris(value), "it"))
    assert needs.reason("/data/my runs, new/it's/step-5") == "it"
    assert needs.reason("/data/my runs, new/it's") == "it"
    assert not needs.reason("/data/other")
