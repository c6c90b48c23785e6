"""A real PostgreSQL on this machine, as an unprivileged user, for the length of a test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Debian keeps the server's programs off the PATH.
DEBIAN = "/usr/lib/postgresql"
DATABASE = "mlflow"


def programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`, or None."""
    installed = sorted(Path(DEBIAN).glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    if installed:
        return installed[-1].parent
    on_path = shutil.which("pg_ctl")
    return Path(on_path).parent if on_path else None


def _unprivileged() -> str | None:
    """Who runs the server: PostgreSQL refuses root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    pytest.skip("PostgreSQL refuses root, and there is no other user to run it")


@contextmanager
def postgres() -> Iterator[str]:
    """A server on loopback with an empty database; yields its URI. Skips where it is not installed."""
    folder_of_programs = programs()
    if folder_of_programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = _unprivileged()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="dermray-postgres-"))
    if user is not None:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        command = [str(folder_of_programs / program), *arguments]
        done = subprocess.run(
            command, user=user, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
        assert done.returncode == 0, f"{program}: {done.stdout}"

    data = str(folder / "data")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
    try:
        call("initdb", "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync")
        call("pg_ctl", "-D", data, "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", DATABASE)
            yield f"postgresql://mlflow@127.0.0.1:{port}/{DATABASE}"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
