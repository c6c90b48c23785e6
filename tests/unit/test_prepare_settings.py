"""The keys of jobs/prepare.py."""

from __future__ import annotations

import pytest
import yaml

from dermray.config import load, parse, validate
from dermray.errors import ConfigError
from dermray.prepare.settings import PrepareConfig

NEEDED = ["source=csv", "input=raw", "output=prepared"]


def test_defaults_and_overrides() -> None:
    config = parse(PrepareConfig, [*NEEDED, "split.val=0.2", "split.test=0.1", "columns.image=path"])
    assert config.split == {"val": 0.2, "test": 0.1}
    assert config.columns.image == "path"
    assert config.max_dropped_fraction == 0.01
    assert config.input.startswith("/")
    assert parse(PrepareConfig, NEEDED).split == {"val": 0.1}
    assert parse(PrepareConfig, [*NEEDED, "split=test"]).split == "test"
    assert parse(PrepareConfig, ["source=csv", "input=s3://bucket/raw/", "output=out"]).input == "s3://bucket/raw"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source=derm2m", "there are: csv, derm1m, derm1m_agentaug, derm7pt"),
        ("split=Test", "'Test' is not a split name"),
        ("split=0.1", "'0.1' is not a split name"),
        ("split.val=1.5", "must lie between 0 and 1"),
        ("split={val: 0.7, test: 0.7}", "at most 1 in all"),
        ("split.train=0.5", "train is what they leave"),
        ("output=raw", "must be another folder than input"),
        ("image_size=0", "image_size"),
        ("max_pixels=999999999999", "max_pixels"),
        ("colums.image=x", "did you mean 'columns'"),
        ("no_such_key=1", "unknown key 'no_such_key'; --help"),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PrepareConfig, [*NEEDED, override])


def test_help_and_printed_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(PrepareConfig, ["--help"], prog="jobs/prepare.py", description="")
    printed = capsys.readouterr().out
    for key in ("source (str)", "columns.image (str)", "max_dropped_fraction (float)", "split ("):
        assert key in printed
    config = parse(PrepareConfig, NEEDED)
    assert validate(PrepareConfig, yaml.safe_load(config.to_yaml())) == config


def test_what_a_shard_hangs_on() -> None:
    base = parse(PrepareConfig, NEEDED)
    same = parse(PrepareConfig, [*NEEDED, "num_fetch_threads=2", "max_tasks=3", "seed=4"])
    other = parse(PrepareConfig, [*NEEDED, "jpeg_quality=80"])
    assert same.transform() == base.transform()
    assert same.content() != base.content()
    assert other.transform() != base.transform()
    assert "output" not in base.content()
