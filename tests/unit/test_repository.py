"""Rules of the house that no compiler keeps: what may import what, sizes, and that `platform/` shadows nothing."""

from __future__ import annotations

import ast
import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from docs import house
from docs.house import imports
from tests.conftest import ROOT

SOURCE = ROOT / "platform"
SHELLS = ("jobs", "tune", "serve")
# Docstrings are not counted among a function's lines.
MAX_FUNCTION_LINES, MAX_PARAMETERS = 70, 8
# Their parameters are those that a published computation is asked by.
FIXED_SIGNATURES = {"losses/make/loss.py": "objective", "models/cae.py": "__init__"}
MEDIAN_FUNCTION_LINES, MOST_FUNCTION_LINES = 8, 22
MAX_FILE_LINES, MAX_TEST_FILE_LINES = 450, 600
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
    "dermray.ingest.views": {"ray", "torch", "mlflow"},
    "dermray.train.objectives.contrastive.views": {"ray", "torch", "mlflow"},
    "dermray.train.objectives.masked_latent.views": {"ray", "torch", "mlflow"},
    "dermray.reporting": {"ray", "torch", "mlflow"},
    "dermray.tuning.space": {"ray", "torch", "mlflow"},
    # Processes of Ray's load these once a trial or part, and models take seconds to import.
    "dermray.vectors.index.embed": {"torch", "mlflow"},
    # Reports are compared, and aliases moved, by what stands in files.
    "dermray.evaluate.comparison": {"ray", "torch", "mlflow"},
    "dermray.release.gate": {"ray", "torch", "mlflow"},
    "dermray.evaluate.statistics": {"ray", "mlflow"},
    "dermray.prepare.shard": {"ray", "scipy", "torch", "mlflow"},
    "dermray.train.pretrain": {"open_clip", "mlflow"},
    "dermray.tuning.trial": {"open_clip"},
    "dermray.tuning.sweep": {"open_clip"},
    "dermray.release.verification": {"torch"},
    # What answers over HTTP is tested without a cluster, and what asks a model without HTTP.
    "dermray.service.http": {"ray", "mlflow"},
    "dermray.service.engine": {"ray", "mlflow"},
    "dermray.tuning.mailbox": {"torch", "mlflow"},
    "dermray.tuning.reports": {"torch", "mlflow"},
}
INGEST_PLAN_MAY_IMPORT = {"numpy", "dermray.corpus.manifest", "dermray.errors"}


def python_files() -> list[Path]:
    """Every Python file of the project."""
    folders = [SOURCE / "dermray", *(ROOT / name for name in (*SHELLS, "tests", "benchmarks", "infra", "docs"))]
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
    """The library's importable modules by name."""
    return {name: file for name, file in house.modules().items() if file.is_relative_to(SOURCE)}


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
    # So is the builder of a service, and the one process that follows an alias.
    drivers = {"dermray.tuning.trial", "dermray.tuning.evaluations", "dermray.service.fleet.registry"}
    callers = {name for name in modules() if any(i.startswith("dermray.tracking") for i in imports(name))}
    rooms = ("dermray.tracking", "dermray.release", "dermray.commands")
    assert {name for name in callers if not name.startswith(rooms)} <= drivers


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


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """Of each function its name, its lines without the docstring, and its parameters without `self`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            spans = [(node.lineno, node.end_lineno or 0)]
            if ast.get_docstring(node) is not None:
                spans.append((node.body[0].lineno, node.body[0].end_lineno or 0))
            whole, *docstring = (last - first + 1 for first, last in spans)
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            yield node.name, whole - sum(docstring), len(names) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_readable(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    is_test = file.is_relative_to(ROOT / "tests")
    assert text.count("\n") <= (MAX_TEST_FILE_LINES if is_test else MAX_FILE_LINES)
    assert not [f"{name}: {lines} lines" for name, lines, _ in functions(file) if lines > MAX_FUNCTION_LINES]
    if not is_test:
        fixed = next((name for end, name in FIXED_SIGNATURES.items() if file.as_posix().endswith(end)), None)
        many = [f"{name}: {count} parameters" for name, _, count in functions(file) if count > MAX_PARAMETERS]
        assert not [each for each in many if each.partition(":")[0] != fixed]
        assert not text.strip() or ast.get_docstring(ast.parse(text)), "a module says what it is in its first line"


def test_most_functions_are_short() -> None:
    files = [file for file in python_files() if not file.is_relative_to(ROOT / "tests")]
    lengths = sorted(lines for file in files for _, lines, _ in functions(file))
    assert lengths[len(lengths) // 2] <= MEDIAN_FUNCTION_LINES
    assert lengths[int(0.9 * len(lengths))] <= MOST_FUNCTION_LINES


def test_the_drawing_of_the_house_is_that_of_its_imports() -> None:
    assert house.PICTURE.read_text(encoding="utf-8") == house.drawing(), "python docs/house.py draws it again"
    for room in sorted(set(house.neighbours()) - house.ground()):
        assert room not in house.below(room), f"{room} comes back to itself"


def prose() -> Iterator[tuple[Path, str]]:
    """Every page, and the docstrings and comments of every Python file."""
    pages = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
    for page in (*(ROOT / name for name in pages), *sorted((ROOT / "docs").glob("*.md"))):
        yield page, page.read_text(encoding="utf-8")
    said = re.compile(r'^[ \t]*"""(.*?)"""|""".*?"""|# (.*?)$', re.M | re.S)
    for file in python_files():
        yield file, "\n".join(map("".join, said.findall(file.read_text(encoding="utf-8"))))


def in_code(name: str) -> bool:
    """True for `dermray.NAME…` of a module, or of something that the module it begins with names."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if file := modules().get(".".join(parts[:length])):
            return length == len(parts) or bool(re.search(rf"\b{parts[length]}\b", file.read_text(encoding="utf-8")))
    return False


def test_files_and_names_that_pages_and_comments_mention_are_there() -> None:
    # Files that jobs write, tags of MLflow and groups of entry points stand in quotes in the code.
    library = "\n".join(file.read_text(encoding="utf-8") for file in modules().values())
    quoted = set(re.findall(r"[\"/]([\w.]+)[\".]", library))
    elsewhere = {
        "x.py": "an example of a user's own file",
        "report/report.html": "what a preparation leaves in the corpus",
        "dermray.output": "what tags of MLflow begin with",
    }
    library_root = SOURCE / "dermray"
    bases = (ROOT, library_root, library_root / "reporting" / "templates", ROOT / "benchmarks", ROOT / "jobs")
    # Not behind what stands for a name: `jobs/NAME.py`, `{output}/best.yaml`, `*.py`.
    path = re.compile(r"(?<![\w/.{}$*~<>-])(?:[\w-]+/)*[\w-]+\.(?:py|yaml|html|svg)\b(?!\w|/|\.)")
    dotted = re.compile(r"(?<![\w./-])dermray(?:\.[A-Za-z_]\w*)+(?![\w/])")
    stands_for_a_name = re.compile(r"\b[A-Z]+\b")
    found, missing = 0, []
    for file, text in prose():
        for name in {*path.findall(text), *dotted.findall(text)} - elsewhere.keys():
            if stands_for_a_name.search(name) or name in quoted:
                continue
            found += 1
            if not in_code(name) and not any((base / name).exists() for base in (*bases, file.parent)):
                missing.append(f"{file.relative_to(ROOT)}: {name}")
    assert found > 300
    assert not missing, "\n".join(missing)


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


def test_what_ends_every_cluster_of_a_machine_is_named_with_its_warning() -> None:
    guides = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    paragraphs = [(file, text) for file in guides for text in file.read_text(encoding="utf-8").split("\n\n")]
    found = [(file.name, text) for file, text in paragraphs if re.search(r"\bray\s+stop\b", text)]
    assert found
    for name, text in found:
        warned = "every Ray process on the machine" in text or "jobs.md#end-a-cluster" in text
        assert warned, f"{name}: {text}"
        assert not text.startswith(("    ", "```")), f"{name} shows it to be pasted: {text}"


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


def test_no_pin_is_in_the_list_of_advisories() -> None:
    """Not a database of all advisories, but the ones that were looked at stay mended."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    with (ROOT / "docs" / "advisories.csv").open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) > 15
    for row in rows:
        version = versions.get(canonicalize_name(row["package"]))
        assert version is None or version not in SpecifierSet(row["affected"]), row


def test_every_promise_of_the_security_page_has_its_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 30
    promises = page.partition("## What each boundary promises")[2].partition("## Secrets")[0].splitlines()
    assert all("`tests/" in row for row in promises if row.startswith("| ") and row != "| promise | test |")
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file} has no {test}"


def test_parquet_is_written_and_read_with_page_checksums() -> None:
    """What a disk or a network damages must not be read as if it were content."""
    wanted = {
        "write_table": "write_page_checksum",
        "ParquetWriter": "write_page_checksum",
        "read_table": "page_checksum_verification",
        "ParquetFile": "page_checksum_verification",
    }
    found, missing = 0, []
    for file in (SOURCE / "dermray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if ast.unparse(node.func.value) == "pq" and node.func.attr in wanted:
                found += 1
                if wanted[node.func.attr] not in {keyword.arg for keyword in node.keywords}:
                    missing.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not missing, "\n".join(missing)
    assert found > 10
