"""What a run ran with: commit, uncommitted changes, packages and hardware. No secrets leave the machine with them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from dermray.documents import parse_json
from dermray.errors import DocumentError
from dermray.redaction import without_secrets

MAX_DIFF_CHARS = 200_000
COMMAND_TIMEOUT_S = 10
COMMIT_FILE = "code/commit.txt"
PATCH_FILE = "code/uncommitted.patch"
PACKAGES_FILE = "environment/packages.txt"
HARDWARE_FILE = "environment/hardware.json"
COMMIT_TAG = "mlflow.source.git.commit"
PACKAGE_TAG = "dermray.code_package"
# How Ray names a working directory that came with a job, and where its job supervisor puts the job's metadata.
RAY_PACKAGE = "_ray_pkg_"
RAY_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Files that hold secrets by their nature; left out of the patch as a whole.
SECRET_FILES = ("*.env", ".env*", "*.pem", "*.key", "*.p12", "*credential*", "*secret*")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")


def code_version() -> tuple[dict[str, str], str]:
    """Tags of the checkout that this code runs from, and the patch of its tracked files against the commit.

    A checkout that `ray job submit` has shipped comes without its history: the tags are Ray's digest of its content,
    then, and the commit that the job's metadata name. Elsewhere outside a checkout both are empty. The patch has at
    most `MAX_DIFF_CHARS` characters and no secrets.
    """
    try:
        commit = _git("rev-parse", "HEAD").strip()
        status = _git("status", "--short").strip()
        patch = _git(
            "diff", "HEAD", "--no-color", "--no-ext-diff", "--", ":/", *[f":(exclude){p}" for p in SECRET_FILES]
        )
    except (OSError, subprocess.SubprocessError):
        return _shipped(), ""
    tags = {COMMIT_TAG: commit, "git.dirty": str(bool(status))}
    patch = without_secrets(patch)
    if len(patch) > MAX_DIFF_CHARS:
        patch = f"{patch[:MAX_DIFF_CHARS]}\n[cut: {len(patch):,} characters in all]\n"
    return tags, patch


def _shipped() -> dict[str, str]:
    """Tags of a working directory that Ray has unpacked, named by a digest of its content."""
    package = next((part for part in Path(__file__).parts if part.startswith(RAY_PACKAGE)), None)
    if package is None:
        return {}
    commit = ""
    with contextlib.suppress(DocumentError, AttributeError):
        commit = str(
            parse_json(os.environ.get(RAY_JOB_CONFIG, ""), RAY_JOB_CONFIG).get("metadata", {}).get("git_commit", "")
        )
    named = {COMMIT_TAG: commit} if _COMMIT.fullmatch(commit) else {}
    return {PACKAGE_TAG: package, **named}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    return done.stdout


@lru_cache(maxsize=1)
def packages() -> str:
    """Every installed distribution as `name==version`, a line each, by name."""
    found = {(d.metadata["Name"] or "").lower(): d.version for d in importlib.metadata.distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()) if name)


@lru_cache(maxsize=1)
def hardware() -> dict[str, Any]:
    """The machine of this process: host, system, Python, processor, cores, memory (bytes) and graphics cards."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "num_cores": psutil.cpu_count(logical=False),
        "num_logical_cores": psutil.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


def artifacts() -> tuple[dict[str, str], dict[str, str]]:
    """Tags and text artifacts (path → content) that every run gets."""
    tags, patch = code_version()
    texts = {PACKAGES_FILE: packages(), HARDWARE_FILE: json.dumps(hardware(), indent=2) + "\n"}
    if COMMIT_TAG in tags:
        texts[COMMIT_FILE] = tags[COMMIT_TAG] + "\n"
    if patch:
        texts[PATCH_FILE] = patch
    return tags, texts


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
