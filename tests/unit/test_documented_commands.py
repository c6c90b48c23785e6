"""Every command that the documents show is one that its job takes: no key is misspelt, gone, or of another type."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RECIPES = sorted([*(ROOT / "jobs" / "configs").glob("*.yaml"), *(ROOT / "tune").rglob("*.yaml")])
COMMAND = re.compile(r"python ((?:jobs|tune)/\w+\.py)([^\n`]*)")
# What stands for more of the same, and for what the reader's own sweep has left.
PLACEHOLDERS = {"[key=value …]": "", "--config OUTPUT/best.yaml": "model=URI"}


def commands(file: Path) -> list[tuple[str, str]]:
    """`(script, arguments)` of each command, its continued lines joined and its comment left out."""
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    return [(script, rest.partition(" #")[0]) for script, rest in COMMAND.findall(text)]


def test_there_are_as_many_as_anyone_would_see() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.parametrize("file", [*PAGES, *RECIPES], ids=lambda file: str(file.relative_to(ROOT)))
def test_the_job_takes_its_documented_arguments(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for script, arguments in commands(file):
        for placeholder, value in PLACEHOLDERS.items():
            arguments = arguments.replace(placeholder, value)
        job = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        try:
            code = job.main([*shlex.split(arguments), "--print-config"])
        except SystemExit as end:
            code = end.code
        assert code == 0, f"{script} {arguments}: {capsys.readouterr().err}"
