"""Following an alias: the gate, the change, the way back, over a registry and a fleet without MLflow or weights."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow import MlflowClient
from ray.exceptions import ActorDiedError, RayTaskError

from dermray import models
from dermray.errors import ModelError, TrackingError
from dermray.predict import ModelSource
from dermray.release.golden import GOLDEN_NAME, Check, Golden, examine
from dermray.service.fleet import rollout
from dermray.service.fleet.catalogue import Served, Slot
from dermray.service.fleet.following import AskedChanges, Follower
from dermray.service.fleet.registry import MlflowRegistry
from dermray.service.fleet.rollout import Rollout, Rollouts
from dermray.service.refusals import Refusal
from dermray.service.settings import parse_arguments
from dermray.vectors.encoder import Encoder
from serve.app import build
from tests.serving import DummyBackend, save_tiny_model

URI = "models:/dummy@champion"


class FakeRegistry:
    def __init__(self) -> None:
        self.version = "3"
        self.records: list[tuple[str, str | None, str | None]] = []
        self.away = False
        self.remembered: str | None = None
        self.fetched = 0

    def version_at(self, uri):
        if self.away:
            raise TrackingError("the registry is away")
        return self.version

    def resolve(self, uri, name=None):
        self.fetched += 1
        return source_of(self.version)

    def point(self, uri, version):
        assert uri == URI
        self.version = version

    def before(self, uri, source):
        return source_of(self.remembered) if self.remembered else None

    def record(self, uri, answers, event, before, after, checks):
        assert answers.version == (before if event == "refused" else after)
        self.records.append((event, before, after))


class FakeFleet:
    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.examined: list[str] = []

    async def examine(self, source):
        self.examined.append(source.version)
        return [Check("smoke", source.version not in self.fails, "…")]


def source_of(version: str) -> ModelSource:
    return ModelSource(uri=f"/models/{version}", name="dummy", version=version, alias="champion")


@pytest.fixture
def parts():
    registry, fleet = FakeRegistry(), FakeFleet()
    return registry, fleet, Rollout(source_of("3"), fleet, registry, URI)


def test_an_alias_that_stays_changes_nothing(parts):
    registry, fleet, rollout = parts
    assert asyncio.run(rollout.look()).event == "unchanged"
    assert fleet.examined == registry.records == []


def test_a_version_that_passes_is_followed_and_can_be_left_again(parts):
    registry, _fleet, rollout = parts
    registry.version = "4"
    outcome = asyncio.run(rollout.look())
    assert (outcome.event, outcome.version, outcome.previous) == ("followed", "4", "3")
    assert (rollout.standing.current.version, rollout.standing.previous.version) == ("4", "3")
    back = asyncio.run(rollout.roll_back())
    assert (back.event, back.version, registry.version) == ("rolled_back", "3", "3")
    assert asyncio.run(rollout.look()).event == "unchanged"
    assert registry.records == [("followed", "3", "4"), ("rolled_back", "4", "3")]


def test_a_version_that_fails_is_refused_once_and_tried_again_on_request(parts):
    registry, fleet, rollout = parts
    registry.version, fleet.fails = "4", {"4"}
    assert asyncio.run(rollout.look()).event == "refused"
    assert asyncio.run(rollout.look()).event == "unchanged"
    assert rollout.standing.current.version == "3"
    # A look at a version that is known fetches none of its files.
    assert (fleet.examined, registry.fetched) == (["4"], 1)
    fleet.fails = set()
    assert asyncio.run(rollout.look(again=True)).event == "followed"
    assert registry.records == [("refused", "3", "4"), ("followed", "3", "4")]


def test_a_version_of_another_kind_is_refused_unloaded(parts):
    registry, fleet, _ = parts
    rollout = Rollout(replace(source_of("3"), kind="image_encoder"), fleet, registry, URI)
    registry.version = "4"
    outcome = asyncio.run(rollout.look())
    assert (outcome.event, outcome.version) == ("refused", "3")
    (check,) = outcome.checks
    assert (check.name, check.detail) == (
        "kind",
        "a model of the kind clip, and one of the kind image_encoder is served",
    )
    assert (fleet.examined, registry.records) == ([], [("refused", "3", "4")])


def test_there_is_no_way_back_before_the_first_change(parts):
    with pytest.raises(Refusal) as caught:
        asyncio.run(parts[2].roll_back())
    assert caught.value.status_code == 409


def test_after_a_restart_the_records_tell_the_version_before(parts):
    registry, fleet, rollout = parts
    registry.remembered, fleet.fails = "2", {"2"}
    assert asyncio.run(rollout.roll_back()).event == "refused"
    assert (rollout.standing.current.version, registry.version) == ("3", "3")
    fleet.fails = set()
    back = asyncio.run(rollout.roll_back())
    assert (back.event, back.version, back.previous, registry.version) == ("rolled_back", "2", "3", "2")
    assert fleet.examined == ["2", "2"]
    assert registry.records == [("refused", "3", "2"), ("rolled_back", "3", "2")]


def test_a_registry_that_is_away_costs_a_look_not_the_service(parts):
    registry, _fleet, rollout = parts
    registry.away = True

    async def main():
        polling = asyncio.create_task(rollout.poll(0.001))
        while not registry.away:
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        registry.away, registry.version = False, "4"
        while rollout.standing.current.version != "4":
            await asyncio.sleep(0.001)
        polling.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))


class Calls:
    """A Serve handle on something in this process, which may be away for a while."""

    def __init__(self, target):
        self.target = target

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments: self._call(method, arguments))

    async def _call(self, method, arguments):
        if self.target is None:
            raise ActorDiedError
        try:
            return await getattr(self.target, method)(*arguments)
        except Refusal as error:
            raise RayTaskError("roll_back", "", error) from None


class Local:
    async def start(self, source):
        backend = DummyBackend()
        backend.model = replace(backend.model, version=source.version)
        return backend


async def gateway(owner):
    """What a gateway has of the roll-out: its slot, its follower, and the task that follows."""
    follower = Follower(owner, {"dummy": Local()})
    source = (await follower.begin())["dummy"].current
    slot = Slot(Served(await Local().start(source), None, source))
    return slot, follower, asyncio.create_task(follower.follow({"dummy": slot}))


async def until(says):
    while not says():
        await asyncio.sleep(0.005)


def owner_of(registry, poll_s=0.0):
    return Rollouts({"dummy": Rollout(source_of("3"), FakeFleet(), registry, URI)}, poll_s)


def test_what_one_gateway_is_asked_reaches_the_other_and_is_recorded_once():
    registry = FakeRegistry()

    async def main():
        owner = Calls(owner_of(registry))
        (first, asked, _), (second, _, _) = await gateway(owner), await gateway(owner)
        with pytest.raises(Refusal) as caught:
            await AskedChanges(asked, "dummy").roll_back()
        assert caught.value.status_code == 409
        registry.version = "4"
        assert (await AskedChanges(asked, "dummy").look(again=True)).event == "followed"
        assert first.current.model.version == "4"
        before = second.current
        await until(lambda: second.current.model.version == "4")
        # What a request holds is the version it began with.
        assert before.model.version in ("3", "4")
        assert (await AskedChanges(asked, "dummy").roll_back()).event == "rolled_back"
        await until(lambda: second.current.model.version == "3")
        assert (first.current.model.version, registry.version) == ("3", "3")

    asyncio.run(asyncio.wait_for(main(), 20))
    assert registry.records == [("followed", "3", "4"), ("rolled_back", "4", "3")]


def test_an_owner_that_begins_anew_takes_over_what_gateways_keep(monkeypatch):
    """The process dies after a change, and a gateway with it: nobody goes back, nothing is recorded twice."""
    monkeypatch.setattr(rollout, "SETTLE_S", 1.5)
    # A real call ends with the process that was asked; here it ends by itself.
    monkeypatch.setattr(rollout, "WAIT_S", 0.2)
    registry = FakeRegistry()

    async def main():
        owner = Calls(owner_of(registry))
        (first, asked, _), (_, _, dies) = await gateway(owner), await gateway(owner)
        registry.version = "4"
        await AskedChanges(asked, "dummy").look(again=True)
        dies.cancel()
        owner.target = None
        with pytest.raises(Refusal) as caught:
            await AskedChanges(asked, "dummy").roll_back()
        assert caught.value.status_code == 503
        # It looks at the alias all the time, but not before it has heard which version answers.
        owner.target = owner_of(registry, poll_s=0.001)
        third, _, _ = await gateway(owner)
        await until(lambda: third.current.model.version == "4")
        await asyncio.sleep(1.6)
        assert (await AskedChanges(asked, "dummy").roll_back()).version == "3"
        await until(lambda: third.current.model.version == first.current.model.version == "3")

    asyncio.run(asyncio.wait_for(main(), 20))
    assert registry.records == [("followed", "3", "4"), ("rolled_back", "4", "3")]


def test_what_goes_up_and_where_aliases_point_is_told_to_mlflow(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("tiny")
    for number in (1, 2):
        client.create_model_version("tiny", source=str(save_tiny_model(tmp_path / str(number), seed=number)))
    client.set_registered_model_alias("tiny", "champion", "2")
    arguments = {"model": "models:/tiny@champion", "tracking.uri": uri}
    build(arguments)
    (run,) = client.search_runs(["1"], "tags.`dermray.kind` = 'deploy'")
    assert run.info.run_name == "deploy tiny version 2"
    assert run.data.tags["model_alias"] == "champion"
    registry = MlflowRegistry(parse_arguments(arguments))
    registry.point("models:/tiny@champion", "1")
    assert registry.version_at("models:/tiny@champion") == "1"
    with pytest.raises(TrackingError, match="did not move"):
        registry.point("models:/tiny@champion", "9")
    # Started once more, with nothing in memory: the runs tell what answered before, under this name and alias.
    build(arguments)
    served = registry.resolve("models:/tiny@champion")
    before = registry.before("models:/tiny@champion", served)
    assert (before.version, before.alias, before.uri) == ("2", "champion", str(tmp_path / "2"))
    registry.record("models:/tiny@champion", replace(served, version="7"), "followed", "1", "7", ())
    assert registry.before("models:/tiny@champion", replace(served, version="7")).version == "1"
    assert registry.before("models:/tiny@champion", replace(served, name="other")) is None


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("gate") / "tiny")
    return folder, Encoder.load(str(folder), device="cpu")


def test_golden_embeddings_come_back_as_they_were_written(encoder):
    folder, model = encoder
    assert Golden.load(str(folder)) is None
    Golden.make(model).save(str(folder))
    golden = Golden.load(str(folder))
    checks = examine(model, golden)
    assert [(one.name, one.passed) for one in checks] == [("smoke", True), ("repeats", True), ("golden", True)]
    assert "1.000000" in checks[2].detail
    (folder / GOLDEN_NAME).write_text('{"texts": []}')
    with pytest.raises(ModelError, match="damaged"):
        Golden.load(str(folder))


def test_the_gate_sees_moved_weights_and_nan(encoder):
    _, model = encoder
    golden = Golden.make(model)
    moved = replace(golden, image_vectors=np.roll(golden.image_vectors, 1, axis=1))
    assert [one.passed for one in examine(model, moved)] == [True, True, False]
    # Vectors of another preprocessing are no measure.
    other = examine(model, replace(moved, preprocessing_digest="other"))[2]
    assert other.passed
    assert "not compared" in other.detail
    broken, transform, tokenizer = models.create("dermray_tiny")
    next(broken.visual.parameters()).data.fill_(float("nan"))
    damaged = Encoder(broken, transform, tokenizer, name="nan", device="cpu")
    assert not examine(damaged, None)[0].passed
