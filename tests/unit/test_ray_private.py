"""What is used of Ray's private parts is there, and is used in one file alone."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace

import pytest
import ray

from dermray import ray_private
from dermray.ray_private import Part
from tests.conftest import ROOT

PRIVATE = re.compile(r"\bray(?:\.\w+)*\.(?:_private|_internal|_raylet|_common)\b|\bray\.train\.v2\b")


@pytest.mark.parametrize("part", ray_private.PARTS, ids=lambda part: part.name)
def test_this_version_of_ray_has_what_is_used_of_its_private_parts(part: Part) -> None:
    part.get()
    assert part.why


@pytest.mark.parametrize("name", ray_private.LOGGERS)
def test_loggers_that_are_quietened_are_those_of_modules_that_are_there(name: str) -> None:
    assert importlib.util.find_spec(name) is not None, f"Ray {ray.__version__} has no module {name} that would log"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            replace(ray_private.GROUP_CLEANER, name="ray.train.v2.gone:Cleaner"),
            "Cleaner .to go without .* is not there",
        ),
        (replace(ray_private.SIGINT_HANDLER, name="ray.train.torch:TorchTrainer._gone"), "_gone .* is not there: "),
        (replace(ray_private.PORT_REUSE, parameters=("port",)), "takes sock now, not port"),
    ],
)
def test_another_version_of_ray_is_refused_by_a_sentence(changed: Part, message: str) -> None:
    with pytest.raises(ImportError, match=f"Ray {ray.__version__} is another than DermRay .*{message}") as refused:
        changed.get()
    assert "\n" not in str(refused.value)


def test_private_parts_of_ray_are_named_in_one_file() -> None:
    users = {
        str(file.relative_to(ROOT))
        for folder in ("platform", "serve", "jobs", "tune")
        for file in (ROOT / folder).rglob("*.py")
        if PRIVATE.search(file.read_text(encoding="utf-8"))
    }
    assert users == {"platform/dermray/ray_private.py"}
