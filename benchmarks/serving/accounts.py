"""Who used the cores while something was measured: seconds of user and system time by role."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping

import psutil

# What Ray's way in is called among the processes.
PROXIES = ("haproxy", "HAProxyManager", "ProxyActor")
REPLICA = "ServeReplica:"


class Account:
    """Core-seconds since `measured` began: `client`, the server's roles, and `idle servers` for all the others."""

    def __init__(self, server: int | None, others: Mapping[str, int]) -> None:
        self._server = server
        self._others = [pid for pid in others.values() if pid != server]
        self._before = self._now()
        self.used: Counter[str] = Counter()

    @classmethod
    @contextlib.contextmanager
    def measured(cls, server: int | None, others: Mapping[str, int]) -> Iterator[Account]:
        """What is used within the block; `server` and `others` are process ids of servers, children included."""
        account = cls(server, others)
        yield account
        account.used = account._now() - account._before

    def _now(self) -> Counter[str]:
        used = Counter({"client": _seconds(psutil.Process(os.getpid()))})
        if self._server is not None:
            for process in _tree(self._server):
                used[_role(process, self._server)] += _seconds(process)
        for pid in self._others:
            used["idle servers"] += sum(_seconds(process) for process in _tree(pid))
        return used


def _tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _role(process: psutil.Process, server: int) -> str:
    """`gateway`, `encoder`, `proxy`; `Ray`: all else of it; `server`: what has no Ray."""
    try:
        name = " ".join(process.cmdline())[:200]
        if REPLICA in name:
            # Ray pads the titles of its processes with blanks.
            return name.partition(REPLICA)[2].split(":")[-1].split(".")[0].strip()
        if any(mark in name for mark in PROXIES):
            return "proxy"
        is_alone = process.pid == server and not process.children()
        return "server" if is_alone or "infinity" in name else "Ray"
    except psutil.Error:
        return "Ray"


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system
