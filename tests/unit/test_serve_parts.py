"""The parts of serving that need neither HTTP nor Ray: arguments, the model's identity, classifiers, rankings."""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pkgutil import resolve_name

import click
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dermray.corpus.ontology import display_names
from dermray.errors import ConfigError, ModelError
from dermray.predict import ClassifierCache, TooManyBuildsError, locate, num_prompts, rank
from dermray.predict.classifier import PROMPT_CHARS, TURN_PROMPTS
from dermray.service.application import find_model
from dermray.service.fleet.command import CONTROLLER_OPTIONS
from dermray.service.http.auth import ADMIN_TOKENS_VARIABLE, TOKENS_VARIABLE, is_loopback
from dermray.service.http.endpoints.embeddings import encode_vector
from dermray.service.http.payload import decode_data_uri
from dermray.service.refusals import Refusal
from dermray.service.settings import ServeArgumentError, ServeConfig, parse_arguments

ROOT = Path(__file__).parents[2]


def folder_with(tmp_path, **provenance):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": {}}))
    if provenance:
        (folder / "dermray.json").write_text(json.dumps(provenance))
    return folder


def test_arguments_of_the_command_line_and_of_yaml_are_the_same():
    line = parse_arguments({"model": "ViT-B-32", "max_batch_size": "8", "limits.items": "4", "labels": "[a, b]"})
    yaml = parse_arguments({"model": "ViT-B-32", "max_batch_size": 8, "limits": {"items": 4}, "labels": ["a", "b"]})
    assert line == yaml
    assert line.limits.items == 4
    assert line.labels == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "model is required"),
        ({"model": "x", "max_batch": "8"}, "unknown key 'max_batch'"),
        ({"model": "x", "max_batch_size": "many"}, "max_batch_size"),
        ({"model": "x", "num_replicas": 0}, "num_replicas"),
        ({"model": "x", "precision": "int4"}, "precision"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_key(arguments, named):
    with pytest.raises(ServeArgumentError) as caught:
        parse_arguments(arguments)
    error = caught.value
    assert named in str(error)
    assert "\n" not in str(error)
    # `serve run` prints a ClickException as one line and exits with its code.
    assert isinstance(error, click.ClickException)
    assert isinstance(error, ConfigError)
    assert error.exit_code == 2
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_folder_tells_its_classes_and_ontology(tmp_path):
    folder = folder_with(tmp_path, classes=["b", "a"])
    (folder / "ontology.json").write_text("{}")
    source = locate(f"local-dir:{folder}")
    assert (source.uri, source.name, source.classes) == (str(folder), "model", ("b", "a"))
    assert source.ontology_uri == f"{folder}/ontology.json"
    assert locate(str(folder), name="n", version="2", alias="champion").version == "2"


def test_classes_that_are_nodes_are_called_by_their_first_synonym():
    nodes = ["melanoma, malignant melanoma", "wart, common", "wart, flat", "acne"]
    assert display_names(nodes) == ("melanoma", "wart, common", "wart, flat", "acne")


def test_a_plain_open_clip_folder_has_no_classes(tmp_path):
    source = locate(str(folder_with(tmp_path)))
    assert (source.classes, source.ontology_uri) == ((), None)


def test_an_architecture_is_a_name():
    assert locate("ViT-B-32").uri == "ViT-B-32"
    assert locate("hf-hub:some/model").uri == "hf-hub:some/model"
    with pytest.raises(ModelError, match="did you mean"):
        locate("ViT-B-3")


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="is not a model folder"):
        locate(str(tmp_path))
    with pytest.raises(ModelError, match="classes must be a list"):
        locate(str(folder_with(tmp_path, classes="melanoma")))


def test_given_labels_and_ontology_replace_the_models_own(tmp_path):
    folder = folder_with(tmp_path, classes=["a"])
    ontology = tmp_path / "tree.json"
    ontology.write_text("{}")
    config = ServeConfig(model=str(folder), labels=("x", "y"), ontology=str(ontology))
    source = find_model(config)
    assert (source.classes, source.ontology_uri) == (("x", "y"), str(ontology))
    with pytest.raises(ConfigError, match="does not exist"):
        find_model(ServeConfig(model=str(folder), ontology=str(tmp_path / "none.json")))


class Builder:
    """Rows of ones; counts what it is asked for, and can be held up or fail."""

    def __init__(self, *, failures: int = 0) -> None:
        self.turns: list[tuple[str, ...]] = []
        self.failures = failures
        self.go = threading.Event()
        self.go.set()

    def __call__(self, names):
        assert self.go.wait(20)
        self.turns.append(tuple(names))
        if len(self.turns) <= self.failures:
            raise ModelError("out of memory")
        return np.ones((len(names), 3), np.float32)


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def built(cache, key, build):
    with cache.asked(*key, build) as future:
        return future.result(20)


def test_a_classifier_is_built_once_per_model_classes_and_templates(executor):
    cache, build = ClassifierCache(executor), Builder()
    for _ in range(3):
        assert built(cache, ("m", ["a", "b"], ["{}"]), build).shape == (2, 3)
    assert build.turns == [("a", "b")]
    for key in (("other", ["a", "b"], ["{}"]), ("m", ["b", "a"], ["{}"]), ("m", ["a", "b"], ["a {}"])):
        built(cache, key, build)
    assert len(build.turns) == 4


def test_requests_at_the_same_time_share_one_build(executor):
    cache, build = ClassifierCache(executor), Builder()
    build.go.clear()
    with contextlib.ExitStack() as stack:
        futures = [stack.enter_context(cache.asked("m", ["a"], ["{}"], build)) for _ in range(5)]
        build.go.set()
        assert len({id(future.result(20)) for future in futures}) == 1
    assert build.turns == [("a",)]


def test_the_least_recently_used_classifier_goes_first_and_none_that_is_asked_for(executor):
    cache, build = ClassifierCache(executor, capacity=2), Builder()
    for name in ("a", "b", "a", "c"):
        built(cache, ("m", [name], ["{}"]), build)
    assert (len(cache), len(build.turns)) == (2, 3)
    built(cache, ("m", ["a"], ["{}"]), build)
    assert len(build.turns) == 3
    with cache.asked("m", ["kept"], ["{}"], build):
        for name in "defg":
            built(cache, ("m", [name], ["{}"]), build)
        num_turns = len(build.turns)
        built(cache, ("m", ["kept"], ["{}"]), build)
        assert len(build.turns) == num_turns
    built(cache, ("m", ["b"], ["{}"]), build)
    assert len(build.turns) == num_turns + 1


def test_a_failed_build_is_tried_again(executor):
    cache, build = ClassifierCache(executor), Builder(failures=1)
    with cache.asked("m", ["a"], ["{}"], build) as future:
        assert isinstance(future.exception(20), ModelError)
    assert built(cache, ("m", ["a"], ["{}"]), build).shape == (1, 3)


def test_builds_take_turns_so_that_a_short_list_does_not_wait_for_a_long_one(executor):
    cache, build = ClassifierCache(executor), Builder()
    build.go.clear()
    long, short = [f"class {number}" for number in range(1000)], ["a", "b"]
    with cache.asked("m", long, ["{}"] * 8, build) as first, cache.asked("m", short, ["{}"] * 8, build) as second:
        build.go.set()
        second.result(20)
        assert first.result(20).shape == (1000, 3)
    assert build.turns[1] == ("a", "b")
    # Every name once, and no turn above what it may cost.
    assert [name for turn in build.turns if turn != ("a", "b") for name in turn] == long
    assert max(map(len, build.turns)) == TURN_PROMPTS // 8


def test_so_many_are_under_construction_and_no_more_while_those_that_are_there_are_given(executor):
    cache, build = ClassifierCache(executor, max_builds=2), Builder()
    built(cache, ("m", ["there"], ["{}"]), build)
    build.go.clear()
    with cache.asked("m", ["a"], ["{}"], build), cache.asked("m", ["b"], ["{}"], build):
        with pytest.raises(TooManyBuildsError), cache.asked("m", ["c"], ["{}"], build):
            pass
        with cache.asked("m", ["a"], ["{}"], build), cache.asked("m", ["there"], ["{}"], build) as future:
            assert future.done()
        build.go.set()
        for name in "ab":
            built(cache, ("m", [name], ["{}"]), build)
    assert built(cache, ("m", ["c"], ["{}"]), build).shape == (1, 3)


def test_a_build_that_nobody_waits_for_stops_and_goes_on_when_it_is_asked_for_again(executor):
    cache, build, names = ClassifierCache(executor, max_builds=1), Builder(), [f"{n}" for n in range(TURN_PROMPTS * 5)]
    build.go.clear()
    with cache.asked("m", names, ["{}"], build):
        pass
    build.go.set()
    # It takes the place of the one that is left: the first turn was under way, and no second one came.
    while True:
        with contextlib.suppress(TooManyBuildsError):
            built(cache, ("m", ["other"], ["{}"]), build)
            break
    assert build.turns in ([tuple(names[:TURN_PROMPTS]), ("other",)], [("other",)])
    assert built(cache, ("m", names, ["{}"]), build).shape == (len(names), 3)
    assert [name for turn in build.turns if turn != ("other",) for name in turn] == names


def test_long_prompts_cost_more():
    assert num_prompts(["a"] * 3, ["{}"] * 2) == 6
    assert num_prompts(["a" * PROMPT_CHARS, "b"], ["{}"]) == 3
    assert num_prompts(["a"], ["{}" + "x" * 8 * PROMPT_CHARS]) == 9


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.floats(0.1, 100))
def test_a_ranking_is_the_softmax_in_order(cosines, scale):
    weights = np.array(cosines, np.float32)[:, None]
    names = [f"c{i}" for i in range(len(cosines))]
    ranking = rank(np.ones(1, np.float32), weights, names, scale)
    logits = scale * np.array(cosines, np.float64)
    expected = np.exp(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    assert sorted(one.label for one in ranking) == sorted(names)
    assert sum(one.probability for one in ranking) == pytest.approx(1)
    for before, after in itertools.pairwise(ranking):
        assert before.probability >= after.probability
    for one in ranking:
        index = int(one.label[1:])
        assert one.probability == pytest.approx(expected[index], abs=1e-9)
        assert one.logit == pytest.approx(logits[index], abs=1e-6)


@given(st.text(max_size=60))
def test_any_text_is_a_data_uri_or_a_refusal(text):
    for uri in (text, f"data:image/png;base64,{text}"):
        with contextlib.suppress(Refusal):
            assert isinstance(decode_data_uri(uri, "image"), bytes)


def test_vectors_as_base64_are_little_endian_whatever_the_input_order():
    vector = np.array([1.5, -2.0], ">f4")
    assert encode_vector(vector, "base64") == encode_vector(vector.astype("<f4"), "base64")
    assert encode_vector(vector, "float") == [1.5, -2.0]


def test_the_deploy_config_is_one_that_ray_serve_and_the_builder_accept():
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    application = ServeDeploySchema.model_validate(content).applications[0]
    assert application.import_path == "serve.app:build"
    assert content["http_options"]["host"] == "127.0.0.1"
    assert content["controller_options"] == CONTROLLER_OPTIONS
    guard = content["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    # A copy of this file from before the application moved names it so.
    assert resolve_name(guard) is resolve_name("serve.proxy:guard")
    config = parse_arguments(application.args)
    assert config.model == "models:/dermray@champion"
    # Serve's own deadline must not cut off the one that answers in our error shape.
    assert content["http_options"]["request_timeout_s"] > config.limits.request_timeout_s


def test_kuberay_gets_the_same_application_with_tokens():
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    service = yaml.safe_load((ROOT / "infra" / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    deployed = yaml.safe_load(service["spec"]["serveConfigV2"])
    # Only the address differs, and there it needs tokens and the names that other pods know it by.
    host = deployed["http_options"].pop("host")
    assert deployed["applications"][0]["args"].pop("allowed_hosts")
    assert deployed == content | {"http_options": {k: v for k, v in content["http_options"].items() if k != "host"}}
    assert not is_loopback(host)
    whole = ServeDeploySchema.model_validate(deployed | {"http_options": {**deployed["http_options"], "host": host}})
    assert whole.http_options.host == host
    parse_arguments(whole.applications[0].args)
    cluster = service["spec"]["rayClusterConfig"]
    groups = cluster["workerGroupSpecs"]
    assert all(one["minReplicas"] <= one["replicas"] <= one["maxReplicas"] for one in groups)
    for group in (cluster["headGroupSpec"], *groups):
        # `ray start` takes its parameters as texts.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        environment = {one["name"]: one for one in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        for secret in ("RAY_AUTH_TOKEN", TOKENS_VARIABLE, ADMIN_TOKENS_VARIABLE):
            assert "secretKeyRef" in environment[secret]["valueFrom"]
        assert int(container["resources"]["limits"]["cpu"]) >= deployed["applications"][0]["args"]["num_cpus"]
