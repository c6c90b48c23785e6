"""A disk that can be filled up."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    """A file system of its own in memory."""

    path: Path

    def resize(self, num_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={num_bytes}", self.path], check=True, timeout=30)

    def leave(self, num_bytes: int) -> None:
        """Fill it up but for so many bytes, which are whole pages."""
        filler = self.path / "filler"
        filler.unlink(missing_ok=True)
        status = os.statvfs(self.path)
        filler.write_bytes(bytes(status.f_bavail * status.f_frsize - num_bytes))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no disk can be filled up")
    if mounted.returncode:
        pytest.skip(f"a disk of its own may not be mounted here, so none can be filled up: {mounted.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True, timeout=30)
