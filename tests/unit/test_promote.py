"""Promotion on real reports in a real registry: refused, allowed, written down, rolled back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dermray import storage, tracking
from dermray.commands import promote
from dermray.config import TrackingConfig
from dermray.errors import ConfigError, TrackingError
from dermray.evaluate import predictions
from dermray.evaluate.statistics.metrics import classification
from dermray.release import gate
from tests.lineage import Chain

# Value, low, high.
CHAMPION = {"accuracy": (0.60, 0.58, 0.62), "median_rank": (20.0, 19.0, 21.0)}
BETTER = {"accuracy": (0.65, 0.63, 0.67), "median_rank": (18.0, 17.0, 19.0)}
WORSE_RANK = {"accuracy": (0.65, 0.63, 0.67), "median_rank": (24.0, 23.0, 25.0)}
WITHOUT_INTERVAL = {"accuracy": (0.7, None, None), "median_rank": (1.0, None, None)}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("promote")
    chain = Chain(folder, TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"))
    chain.prepare()
    for seed, metrics in enumerate((CHAMPION, BETTER, WORSE_RANK, WITHOUT_INTERVAL)):
        model = chain.pretrain(f"m{seed + 1}", seed=seed, licence="CC-BY-NC-4.0" if seed == 1 else "CC-BY-4.0")
        chain.register(model, chain.evaluate(model, metrics), alias="null")
    return chain


def run(chain: Chain, *arguments: str) -> int:
    return promote.main(["name=derm", f"tracking.uri={chain.config.uri}", *arguments])


def holder(chain: Chain, alias: str = "champion") -> str:
    return str(tracking.client(chain.config).get_model_version_by_alias("derm", alias).version)


def test_a_champion_falls_only_to_what_is_not_worse_and_comes_back(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(chain, "candidate=1", "--dry-run") == 0
    with pytest.raises(Exception, match="not found"):
        holder(chain)
    assert run(chain, "candidate=1") == 0
    assert holder(chain) == "1"
    with pytest.raises(TrackingError, match=r"zero_shot.median_rank may be worse by 5.4142, more than the margin"):
        run(chain, "candidate=3")
    with pytest.raises(TrackingError, match="has no interval; evaluate it with bootstrap=1000"):
        run(chain, "candidate=4")
    with pytest.raises(TrackingError, match="version 1 has the alias already"):
        run(chain, "candidate=1")
    assert run(chain, "candidate=3", "--dry-run") == 1
    assert "worse zero_shot.median_rank: 20.0000 → 24.0000" in capsys.readouterr().out
    assert holder(chain) == "1"
    # Deciding by accuracy alone, it is better.
    assert run(chain, "candidate=3", "metrics=[zero_shot.accuracy]", "--dry-run") == 0
    assert run(chain, "candidate=2") == 0
    assert holder(chain) == "2"
    client = tracking.client(chain.config)
    experiment = client.get_experiment_by_name(chain.config.experiment).experiment_id
    last, *_ = client.search_runs([experiment], "tags.`dermray.kind` = 'promote' AND attributes.status = 'FINISHED'")
    audit = json.loads(Path(client.download_artifacts(last.info.run_id, "promotion.json")).read_text())
    assert (audit["before"], audit["after"], audit["is_allowed"]) == ("1", "2", True)
    assert {one["name"] for one in audit["differences"]} == {"zero_shot.accuracy", "zero_shot.median_rank"}
    assert run(chain, "roll_back=true") == 0
    assert holder(chain) == "1"
    with pytest.raises(TrackingError, match="version 1 was the first"):
        run(chain, "roll_back=true")


def test_keys_that_a_roll_back_does_not_look_at_are_refused(chain: Chain) -> None:
    with pytest.raises(
        ConfigError, match="candidate, margin: no effect with roll_back=true, which gives champion back"
    ):
        run(chain, "roll_back=true", "candidate=2", "margin=0.1")


def test_an_alias_called_null_is_none(chain: Chain) -> None:
    assert tracking.client(chain.config).get_registered_model("derm").aliases.keys().isdisjoint({"null", "None", ""})


def test_where_less_is_better_less_becomes_champion(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    def add(model: str) -> str:
        folder = chain.folder / model
        chain.register(folder / "model", folder / "report", name="ranked", metric="zero_shot.median_rank")
        client = tracking.client(chain.config)
        return str(client.get_model_version_by_alias("ranked", "champion").version)

    assert [add(model) for model in ("m1", "m3", "m2")] == ["1", "1", "3"]
    assert "before 20.0000" in capsys.readouterr().out


def test_scores_of_other_samples_are_not_compared(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """A split that the model was trained on, or the first few samples, say nothing about a champion of the whole."""
    first = chain.folder / "m1"
    chain.register(first / "model", first / "report", name="splits")
    document = storage.read_object(str(first / "report" / "report.json"))
    for number, (key, value, told) in enumerate(
        [
            ("split", "train", "another split (val, now train)"),
            ("num_samples", 2, "another number of samples (4, now 2)"),
        ]
    ):
        corpus = {"num_samples": 4, **document["corpus"], key: value}
        name = f"splits{number}"
        for folder, said in (("whole", {"num_samples": 4, **document["corpus"]}), ("part", corpus)):
            storage.write_json(chain.folder / name / folder / "report.json", {**document, "corpus": said})
            capsys.readouterr()
            chain.register(first / "model", chain.folder / name / folder, name=name)
        assert f"without a comparison: version 1 was scored on {told}" in capsys.readouterr().out
    whole = {"": gate.Scored("x", document)}
    part = {"": gate.Scored("x", {**document, "config": {"max_samples": 2}})}
    assert gate.mismatches(whole, part) == ["max_samples is 2, the champion's None"]


def test_data_that_forbid_commercial_use_keep_a_model_from_production(chain: Chain) -> None:
    with pytest.raises(TrackingError, match=r"commercial use of version 2 is forbidden \(licence: CC-BY-NC-4.0\)"):
        run(chain, "candidate=2", "alias=production")
    assert run(chain, "candidate=1", "alias=production") == 0
    assert run(chain, "candidate=2", "alias=production", "allow_non_commercial=true") == 0
    assert holder(chain, "production") == "2"


def test_a_model_of_another_kind_takes_no_alias(chain: Chain) -> None:
    client = tracking.client(chain.config)
    client.set_registered_model_alias("derm", "kept", "1")
    client.set_model_version_tag("derm", "2", "dermray.kind", "image_encoder")
    try:
        with pytest.raises(
            TrackingError, match="the champion is a model of the kind clip, and this one is of the kind"
        ):
            run(chain, "candidate=2", "alias=kept")
    finally:
        client.set_model_version_tag("derm", "2", "dermray.kind", "clip")
    # A champion of before there were kinds is clip.
    client.delete_model_version_tag("derm", "1", "dermray.kind")
    assert run(chain, "candidate=2", "alias=kept") == 0


def test_another_benchmark_or_a_report_that_was_changed_is_no_ground(chain: Chain) -> None:
    report = gate.load_report(str(chain.folder / "m1" / "report"))
    document = report[""].document
    other = {"": gate.Scored("x", {**document, "corpus": {**document["corpus"], "digest": "f" * 64}})}
    (reason,) = gate.mismatches(report, other)
    assert reason.startswith("corpus digest is ffffffffffff…, the champion's ")
    file = chain.folder / "m3" / "report" / "report.json"
    said = file.read_text()
    file.write_text(said.replace("0.65", "0.95"))
    try:
        with pytest.raises(TrackingError, match="is not the report that the model was registered with"):
            run(chain, "candidate=3", "alias=other")
    finally:
        file.write_text(said)


def test_the_interval_of_a_difference() -> None:
    champion, candidate = ({"value": v, "low": v - 0.03, "high": v + 0.03} for v in (0.5, 0.54))
    assert gate.interval_of("a", champion, candidate, 1.0) == pytest.approx(
        (0.04, 0.04 - 0.03 * 2**0.5, 0.04 + 0.03 * 2**0.5)
    )
    assert gate.interval_of("a", champion, candidate, -1.0)[0] == pytest.approx(-0.04)


def test_saved_predictions_are_compared_in_pairs(tmp_path: Path) -> None:
    """Two models that fail on nearly the same samples: that of the difference is narrower than their own intervals."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    right = random.random(400) < 0.7
    better = right.copy()
    better[np.flatnonzero(~right)[:20]] = True
    found = {}
    for name, correct in (("champion", right), ("candidate", better)):
        said = np.where(correct, labels, 1 - labels)
        probabilities = np.eye(2, dtype=np.float32)[said] * 0.8 + 0.1
        folder = tmp_path / name
        origin = predictions.Origin("zero_shot", "val", "c" * 64, name, "p")
        saved = predictions.ClassPredictions([str(n) for n in range(400)], labels, probabilities, ("a", "b"))
        predictions.write(storage.join(folder, predictions.path_of("zero_shot")), saved, origin)
        metrics = classification(probabilities, labels, bootstrap=200)
        section = {
            "predictions": predictions.path_of("zero_shot"),
            "metrics": {"accuracy": asdict(metrics["accuracy"]), "mine": asdict(metrics["accuracy"])},
        }
        document = {
            "model": {"model_digest": name},
            "corpus": {"digest": "c" * 64, "split": "val"},
            "tasks": {"zero_shot": section},
        }
        storage.write_json(folder / "report.json", document)
        found[name] = gate.load_report(str(folder))
    assert gate.mismatches(found["champion"], found["candidate"]) == []
    paired, unpaired = gate.compare(found["champion"], found["candidate"], margin=0.01)
    assert (paired.name, paired.method, unpaired.method) == ("zero_shot.accuracy", "paired", "unpaired")
    assert paired.difference == pytest.approx(unpaired.difference) == pytest.approx(0.05)
    assert paired.low > 0.01 > unpaired.low
    (back,) = gate.compare(found["candidate"], found["champion"], margin=0.01, metrics=["zero_shot.accuracy"])
    assert back.is_worse
    assert (back.low, back.high) == pytest.approx((-paired.high, -paired.low))
