"""Rules of the house that no compiler keeps: what may import what, sizes, and that `platform/` shadows nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "platform"
SHELLS = ("jobs", "tune", "serve")
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 600
# Room → packages of others that it must not know, by any road through our own modules.
FORBIDDEN = {
    "dermray.corpus": {"ray", "torch", "mlflow"},
    "dermray.export.work": {"ray", "torch", "mlflow"},
    "dermray.losses": {"ray", "mlflow"},
    "dermray.models": {"ray", "mlflow"},
    "dermray.ingest.plan": {"ray", "torch", "mlflow"},
    "dermray.ingest.schedule": {"ray", "torch", "mlflow"},
    # A worker process that decodes is to be ready in a second.
    "dermray.ingest.decoding": {"ray", "torch", "mlflow"},
    "dermray.reporting": {"ray", "torch", "mlflow"},
    "dermray.tuning.space": {"ray", "torch", "mlflow"},
    # Processes of Ray's load these once a trial, and models take seconds to import.
    "dermray.tuning.mailbox": {"torch", "mlflow"},
    "dermray.tuning.reports": {"torch", "mlflow"},
}
INGEST_PLAN_MAY_IMPORT = {"numpy", "dermray.corpus.manifest", "dermray.errors"}


def python_files() -> list[Path]:
    """Every Python file of the project."""
    folders = [SOURCE / "dermray", *(ROOT / name for name in (*SHELLS, "tests", "benchmarks", "infra"))]
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def text_files() -> Iterator[Path]:
    """Every file that may hold text, outside version control and what is made."""
    made = {".git", ".venv", "demo-output", "mlartifacts", "mlruns", "output", "__pycache__"}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in made and not name.endswith((".egg-info", "_cache"))]
        for name in files:
            if Path(name).suffix in {".py", ".toml", ".txt", ".yaml", ".yml", ".md", ".cfg", ".ini", ".sh", ""}:
                yield Path(folder) / name


@cache
def modules() -> dict[str, Path]:
    """Our importable modules by name."""
    found = {}
    for file in (SOURCE / "dermray").rglob("*.py"):
        parts = list(file.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(module: str, *, lazy: bool = True) -> frozenset[str]:
    """Modules that a module of ours names in import statements; `lazy`: also inside functions."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if lazy else at_import(tree.body):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the full name"
            name = node.module or ""
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                found.add(inner if inner in modules() else name)
    return frozenset(found)


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, type-checking blocks left out."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                yield from at_import([n for n in getattr(node, name, []) if isinstance(n, ast.stmt)])


def reachable(module: str) -> dict[str, list[str]]:
    """Everything a module imports, at import and through ours, with the road to it."""
    roads = {module: [module]}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in modules():
            continue
        parents = {name.rpartition(".")[0]} & modules().keys()
        for target in imports(name, lazy=name == module) | parents:
            if target not in roads:
                roads[target] = [*roads[name], target]
                waiting.append(target)
    return roads


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_rooms_know_only_what_they_may(room: str) -> None:
    members = [name for name in modules() if name == room or name.startswith(f"{room}.")]
    assert members, f"there is no {room}"
    for member in members:
        for target, road in reachable(member).items():
            assert target.partition(".")[0] not in FORBIDDEN[room], " → ".join(road)


def test_the_plan_of_an_epoch_is_pure() -> None:
    outside = {name for name in imports("dermray.ingest.plan") if name.partition(".")[0] not in sys.stdlib_module_names}
    assert outside <= INGEST_PLAN_MAY_IMPORT


def test_only_tracking_imports_mlflow() -> None:
    importers = {name for name in modules() if any(i.partition(".")[0] == "mlflow" for i in imports(name))}
    assert importers
    assert {name for name in importers if not name.startswith("dermray.tracking")} == set()


def test_only_drivers_call_tracking() -> None:
    # A trial is a driver of its own: it starts its own training or evaluation, under a run of its own.
    drivers = {"dermray.tuning.trial", "dermray.tuning.evaluations"}
    callers = {name for name in modules() if any(i.startswith("dermray.tracking") for i in imports(name))}
    assert {name for name in callers if not name.startswith("dermray.tracking")} <= drivers


def test_the_library_imports_none_of_its_shells() -> None:
    for name in modules():
        assert not {i.partition(".")[0] for i in imports(name)} & {*SHELLS, "tests", "benchmarks"}, name


def test_there_are_no_import_circles() -> None:
    done: set[str] = set()

    def visit(name: str, road: list[str]) -> None:
        assert name not in road, " → ".join([*road[road.index(name) :], name])
        if name in done:
            return
        for target in imports(name, lazy=False):
            if target in modules() and target != name:
                visit(target, [*road, name])
        done.add(name)

    for module in modules():
        visit(module, [])


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_readable(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    tree = ast.parse(text)
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long
    if text.strip() and not file.is_relative_to(ROOT / "tests"):
        assert ast.get_docstring(tree), "a module says what it is in its first line"


def test_no_file_names_a_package_index() -> None:
    # Written in parts, so that this file does not name one either.
    hosts = ("pypi" + r"\.org", "pythonhosted" + r"\.org", "index" + "-url", "index" + "_url")
    pattern = re.compile("|".join(hosts))
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in text_files()
        if (match := pattern.search(file.read_text(encoding="utf-8", errors="replace")))
    ]
    assert not found


def test_platform_is_no_package() -> None:
    assert not (SOURCE / "__init__.py").exists(), "it would shadow the standard library's module"


@pytest.mark.parametrize("path", ["platform", ""], ids=["PYTHONPATH=platform", "as installed"])
def test_platform_and_dermray_import_from_the_root(path: str) -> None:
    code = (
        "import platform, dermray, dermray.config\n"
        "assert platform.system(), platform\n"
        "print(platform.__file__)\nprint(dermray.__file__)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = path
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    standard, ours = done.stdout.split()
    assert not Path(standard).is_relative_to(ROOT / "platform")
    assert Path(ours).resolve() == (SOURCE / "dermray" / "__init__.py").resolve()
