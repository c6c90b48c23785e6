"""Configuration: precedence, messages that name the key, exit code 2, help that lists everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from dermray import config
from dermray.config import Config
from dermray.errors import ConfigError
from dermray.train.settings import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]


class Inner(Config):
    rate: float = Field(0.5, gt=0, description="a rate")
    names: tuple[str, ...] = Field((), description="some names")


class Outer(Config):
    uri: str = Field(description="where")
    count: int = Field(3, ge=1, description="how many")
    flag: bool = Field(False, description="whether")
    weights: dict[str, float] = Field({"a": 1.0}, description="weights")
    inner: Inner = Inner()


def test_precedence_is_defaults_then_file_then_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("uri: from-file\ncount: 5\ninner: {rate: 0.25}\n")
    parsed = config.parse(Outer, ["--config", str(file), "count=7", "inner.names=[x, y]"])
    assert (parsed.uri, parsed.count, parsed.inner.rate, parsed.inner.names) == ("from-file", 7, 0.25, ("x", "y"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["uri=x", "cuont=3"], "unknown key 'cuont', did you mean 'count'"),
        (["uri=x", "inner.rat=3"], "unknown key 'inner.rat', did you mean 'inner.rate'"),
        (["uri=x", "innr.rate=3"], "unknown key 'innr', did you mean 'inner'[?]"),
        (["uri=x", "count=many"], "count: input should be a valid integer.*'many'"),
        (["uri=x", "count=on"], "count: a number is wanted, got 'on'"),
        (["uri=x", "inner.rate=true"], "inner.rate: a number is wanted, got 'true'"),
        (["uri=x", "weights.a=yes"], "weights.a: a number is wanted, got 'yes'"),
        (["uri=x", "count=0"], "count: input should be greater than or equal to 1, got 0"),
        (["uri=x", "inner=3"], "inner: input should be .*got 3"),
        (["uri=x", "rate=3"], "unknown key 'rate', did you mean 'inner.rate'"),
        (["count=3"], "uri is required"),
        (["uri=x", "--nonsense"], "cannot read the argument '--nonsense'"),
        (["--config", "absent.yaml", "uri=x"], "config file 'absent.yaml' does not exist"),
        (["uri=x", "count=[1"], "count: cannot read the value"),
        (["uri=x", "inner..rate=1"], "'inner..rate' is not a key"),
    ],
)
def test_errors_are_one_line_that_names_the_key(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.parse(Outer, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a\n- b\n", "key: [unclosed\n", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        config.parse(Outer, ["--config", str(file), "uri=x"])


def test_scientific_notation_and_numbers_as_text():
    parsed = config.parse(Outer, ["uri=2024", "inner.rate=1e-4"])
    assert parsed.uri == "2024"
    assert parsed.inner.rate == 1e-4


@pytest.mark.parametrize("text", ["demo: prepare", "2024-01-01", "- a"])
def test_what_yaml_would_read_into_a_bare_text_stays_text(text):
    assert config.parse(Outer, [f"uri={text}"]).uri == text


@given(
    st.integers(1, 10**6),
    st.floats(1e-6, 1e3),
    st.booleans(),
    st.dictionaries(st.text("abc", min_size=1), st.floats(0, 9)),
)
def test_what_is_printed_parses_to_the_same(tmp_path_factory, count, rate, flag, weights):
    original = Outer(uri="u", count=count, flag=flag, weights=weights, inner=Inner(rate=rate))
    file = tmp_path_factory.mktemp("config") / "c.yaml"
    file.write_text(original.to_yaml())
    assert config.parse(Outer, ["--config", str(file)]) == original


def test_help_lists_every_key_with_type_default_and_text():
    text = config.help_text(Outer, called="python x.py", description="d")
    for expected in ("uri (str)", "[required]", "inner.rate (float)", "a rate", "[0.5]", "count (int)", "how many"):
        assert expected in text


def test_every_key_of_every_entry_point_is_described():
    from dermray.evaluate.settings import EvaluateConfig
    from dermray.prepare.settings import PrepareConfig

    for entry in (PretrainConfig, PrepareConfig, EvaluateConfig):
        rows = list(config._describe(entry))
        assert [key for key, _, _, text in rows if not text] == []


@pytest.mark.parametrize("job", ["prepare", "pretrain", "evaluate", "register", "synthesize", "demo"])
def test_entry_points_refuse_before_ray_starts(job, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    refused = run("no_such_key=1")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "unknown key 'no_such_key'" in refused.stderr or "is required" in refused.stderr
    assert not (tmp_path / "mlflow.db").exists()


def test_print_config_is_complete_yaml(tmp_path):
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "--config", str(ROOT / "jobs/configs/demo.yaml")]
    done = subprocess.run(
        [*command, "corpus=c", "output=o", "--print-config"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    tree = yaml.safe_load(done.stdout)
    assert tree["corpus"] == "c"
    assert tree["optim"]["lr"] == 1e-3
    assert PretrainConfig.model_validate(tree).model == "dermray_tiny"


def test_a_uri_is_absolute_and_not_blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Places(Config):
        corpus: config.Uri = Field(description="where it is")
        cache: config.Uri | None = None

    monkeypatch.chdir(tmp_path)
    places = config.parse(Places, ["corpus=below", "cache=s3://bucket/answers/"])
    assert (places.corpus, places.cache) == (str(tmp_path / "below"), "s3://bucket/answers")
    assert config.parse(Places, ["corpus=/data", "cache="]).cache is None
    with pytest.raises(ConfigError, match="corpus: must not be blank"):
        config.validate(Places, {"corpus": ""})
