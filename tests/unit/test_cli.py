"""`dermray NAME`: every job by its name, and each script of `jobs/` and `tune/` the same."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dermray import cli, extensions
from dermray.evaluate.predictors import kinds as predictors
from dermray.evaluate.tasks import kinds as tasks
from tests.conftest import ROOT

SCRIPTS = [path for path in (*(ROOT / "jobs").glob("*.py"), *(ROOT / "tune").glob("*.py")) if path.stem != "demo"]


@pytest.fixture(autouse=True)
def _own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])


def test_the_console_script_is_it() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="dermray")
    assert script.load() is cli.main
    for module in ("dermray", "dermray.cli"):
        done = subprocess.run([sys.executable, "-m", module, "nonsense"], capture_output=True, text=True, check=False)
        assert (done.returncode, "there is no command 'nonsense'" in done.stderr) == (2, True), module


def test_a_misspelt_key_of_a_named_objective_is_told_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["pretrain", "objective.kind=tests.rotation:OBJECTIVE", "objective.sides=8", "corpus=a", "output=b"])
    assert "unknown key 'objective.sides', did you mean 'objective.side'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "names"),
    [("evaluate", (*tasks.ours(), *predictors.ours())), ("pretrain", extensions.folders("dermray.train.objectives"))],
)
def test_help_names_every_folder_of_ours(
    command: str, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert not [name for name in names if name not in said]


def test_every_command_has_a_script_that_is_the_same() -> None:
    assert sorted(path.stem for path in SCRIPTS) == cli.names()
    for path in SCRIPTS:
        alias = importlib.import_module(f"{path.parent.name}.{path.stem}")
        assert alias.main is importlib.import_module(f"dermray.commands.{path.stem}").main
        assert f"the same as `dermray {path.stem}`" in (alias.__doc__ or "")


def test_help_lists_them_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in cli.names():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 3


@pytest.mark.parametrize(("name", "script"), [("prepare", "jobs/prepare.py"), ("sweep", "tune/sweep.py")])
def test_usage_and_errors_name_what_was_called(name: str, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    of_command = capsys.readouterr().out
    assert of_command.startswith(f"usage: dermray {name} [--config")
    called = [sys.executable, str(ROOT / script), "--help"]
    of_script = subprocess.run(called, capture_output=True, text=True, check=True).stdout
    assert of_script == of_command.replace(f"dermray {name}", f"python {script}", 1)
    with pytest.raises(SystemExit, match="2"):
        cli.main([name, "nonsense=1"])
    assert capsys.readouterr().err.startswith(f"dermray {name}: ")


def test_a_job_runs_and_its_exit_code_is_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"output={tmp_path / 'raw'}", "num_images=2", "num_processes=1"]
    assert cli.main(["synthesize", *arguments]) == 0
    assert len(list((tmp_path / "raw").rglob("*.jpg"))) == 2
    capsys.readouterr()
    assert cli.main(["prepare", "source=csv", f"input={tmp_path / 'none'}", f"output={tmp_path / 'corpus'}"]) != 0
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("name", "advice"), [("pretain", "did you mean pretrain? "), ("x/../y", "")])
def test_an_unknown_command_is_refused(name: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == f"error: there is no command {name!r}; {advice}`dermray --help` lists them\n"
