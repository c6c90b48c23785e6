"""A registry alias that moves under a served model: followed without a lost request, refused when damaged, left."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from dermray.client import Client
from dermray.release.golden import Golden
from dermray.vectors.encoder import Encoder
from tests.serving import data_uri, photograph, replica_pids, running, save_tiny_model

pytestmark = pytest.mark.ray
ALIAS = "models:/dermray@champion"
TOKEN = "a-token-of-an-administrator"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[MlflowClient, str]:
    """Three versions: two sound ones with golden embeddings, one with NaN weights."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("dermray")
    for number, damaged in ((1, False), (2, False), (3, True)):
        model = str(save_tiny_model(folder / f"v{number}", seed=number, damaged=damaged))
        if not damaged:
            Golden.make(Encoder.load(model, device="cpu")).save(model)
        client.create_model_version("dermray", source=model)
    client.set_registered_model_alias("dermray", "champion", "1")
    return client, uri


@pytest.fixture(scope="module")
def url(ray_cluster: None, registry: tuple[MlflowClient, str]) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DERMRAY_SERVE_ADMIN_TOKENS", TOKEN)
        with running(model=ALIAS, device="cpu", **{"tracking.uri": registry[1], "rollout.poll_s": 0}) as url:
            yield url


class Load:
    """A client that asks without pause in the background, and what it was answered."""

    def __init__(self, url: str) -> None:
        self.answers: list[tuple[int, str]] = []
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        body = {"input": [data_uri(photograph()), "psoriasis"]}
        with httpx.Client(base_url=self._url, headers=HEADERS, timeout=60) as client:
            while not self._stop.is_set():
                answer = client.post("/v1/embeddings", json=body)
                self.answers.append((answer.status_code, answer.headers["X-DermRay-Model-Version"]))

    def wait_for(self, version: str) -> None:
        seen = len(self.answers)
        while version not in {one for _, one in self.answers[seen:]}:
            time.sleep(0.01)


def change(url: str, what: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/admin/models/dermray/{what}", headers=HEADERS, timeout=60)


def change_when_possible(url: str, what: str) -> dict[str, Any]:
    while (answer := change(url, what)).status_code in (500, 503):
        time.sleep(0.2)
    return answer.json()


def wait_until_all_gateways_answer_with(url: str, version: str) -> None:
    """Each is asked some time; what one was told reaches the other at once."""
    deadline_s, num_alike = time.monotonic() + 10, 0
    while num_alike < 20:
        card = httpx.get(f"{url}/v1/models", headers=HEADERS, timeout=60).json()["data"][0]
        num_alike = num_alike + 1 if card["model_info"]["version"] == version else 0
        assert time.monotonic() < deadline_s, "a gateway still answers with another version"


def recorded(client: MlflowClient) -> list[tuple[str, ...]]:
    experiment = client.search_experiments()[0].experiment_id
    runs = client.search_runs([experiment], "tags.`dermray.kind` = 'rollout'", order_by=["start_time ASC"])
    return [tuple(run.data.tags[f"rollout.{key}"] for key in ("event", "from", "to")) for run in runs]


def test_the_alias_is_followed_under_load_and_left_again(url, registry):
    client, _ = registry
    with Load(url) as load:
        load.wait_for("1")
        assert change(url, "rollback").status_code == 409
        client.set_registered_model_alias("dermray", "champion", "2")
        followed = change(url, "refresh").json()
        assert (followed["event"], followed["version"], followed["previous"]) == ("followed", "2", "1")
        assert {one["name"]: one["passed"] for one in followed["checks"]} == dict.fromkeys(
            ("smoke", "repeats", "golden"), True
        )
        load.wait_for("2")
        client.set_registered_model_alias("dermray", "champion", "3")
        refused = change(url, "refresh").json()
        assert (refused["event"], refused["version"]) == ("refused", "2")
        assert [one["name"] for one in refused["checks"] if not one["passed"]] == ["loads"]
        load.wait_for("2")
        back = change(url, "rollback").json()
        assert (back["event"], back["version"]) == ("rolled_back", "1")
        load.wait_for("1")
    assert str(client.get_model_version_by_alias("dermray", "champion").version) == "1"
    assert {status for status, _ in load.answers} == {200}
    wait_until_all_gateways_answer_with(url, "1")
    assert recorded(client) == [("followed", "1", "2"), ("refused", "2", "3"), ("rolled_back", "2", "1")]


@pytest.mark.long
def test_processes_that_begin_anew_know_which_version_answers(url, registry):
    """A gateway and the owner of the roll-out are killed after a change; what was built at the start is old."""
    client, _ = registry
    before = recorded(client)
    client.set_registered_model_alias("dermray", "champion", "2")
    assert change(url, "refresh").json()["version"] == "2"
    wait_until_all_gateways_answer_with(url, "2")
    killed = [replica_pids("gateway")[0], *replica_pids("rollout")]
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    with Client(url, token=TOKEN) as asking:
        while any(pid in (*replica_pids("gateway"), *replica_pids("rollout")) for pid in killed) or (
            len(replica_pids("gateway")),
            len(replica_pids("rollout")),
        ) != (2, 1):
            assert asking.models()[0]["model_info"]["version"] == "2"
        for _ in range(40):
            assert asking.models()[0]["model_info"]["version"] == "2"
        back = change_when_possible(url, "rollback")
        assert (back["event"], back["version"]) == ("rolled_back", "1")
    wait_until_all_gateways_answer_with(url, "1")
    assert recorded(client) == [*before, ("followed", "1", "2"), ("rolled_back", "2", "1")]


def num_in_progress(url: str) -> float:
    """Over all gateways, the question itself included."""
    text = httpx.get(f"{url}/metrics", headers=HEADERS, timeout=60).text
    return sum(map(float, re.findall(r"^dermray_requests_in_progress{.*} (\S+)$", text, re.M)))


def test_shutdown_finishes_what_was_accepted(url):
    """The last test of this server: it ends it while a request that takes seconds is under way."""
    from ray import serve

    labels = [f"condition number {i} of a long list" for i in range(700)]
    answers: list[httpx.Response] = []
    body = {"image": data_uri(photograph()), "labels": labels}
    asked = {"headers": HEADERS, "timeout": 120}
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/classify", json=body, **asked)))
    asking.start()
    while num_in_progress(url) < 2:
        assert asking.is_alive(), "the request was answered before it could be interrupted"
    serve.delete("dermray-test")
    asking.join(120)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["ranking"]) == 700
