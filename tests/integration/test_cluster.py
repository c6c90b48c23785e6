"""Logical CPUs of an own cluster stand for fewer cores; what fits into it, and what is said while something waits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dermray import cluster
from dermray.errors import ConfigError


@pytest.mark.ray
def test_work_that_fills_a_core_reserves_all_its_cpus(ray_cluster: None) -> None:
    cores = min(os.cpu_count() or 1, 4)
    assert cluster.cpus_of_cores(1.0) == 4 / cores
    assert cluster.cpus_of_cores(0.5) == 2 / cores
    assert cluster.cpus_of_cores(1000.0) == 4, "a task that asks for more than there is would wait forever"


@pytest.mark.ray
def test_what_never_fits_is_refused_and_what_fits_is_not(ray_cluster: None) -> None:
    cluster.require("worker", {"CPU": 2.0}, count=2, advice="")
    with pytest.raises(ConfigError, match=r"^3 workers of 2 CPUs would wait for ever: .* 4 CPUs; lower it$"):
        cluster.require("worker", {"CPU": 2.0}, count=3, advice="lower it")
    with pytest.raises(ConfigError, match=r"^1 worker of 1 CPU and 1 GPU would wait for ever: .* 4 CPUs and 0 GPUs"):
        cluster.require("worker", {"CPU": 1.0, "GPU": 1.0}, advice="")


@pytest.mark.ray
def test_a_wait_is_told_and_what_is_free(ray_cluster: None) -> None:
    assert re.fullmatch(r"a shard; free now: \S+ of 4 CPUs, 0 of 0 GPUs", cluster.waiting("a shard")())


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize(("code", "is_kept"), [(0, False), (1, True)])
def test_an_own_cluster_is_told_and_leaves_no_session_folder(tmp_path: Path, code: int, is_kept: bool) -> None:
    program = tmp_path / "job.py"
    program.write_text(
        "import os, sys\nfrom dermray import cluster, config, entry\n\n\ndef main():\n"
        "    cluster.connect(config.ClusterConfig(num_cpus=1))\n    import ray\n\n"
        "    print('folder', ray._private.worker._global_node.get_session_dir_path())\n"
        "    ray.get(ray.remote(lambda: 1).remote())\n"
        f"    return {code}\n\n\nsys.exit(entry.run_job(main))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    others = set(Path("/tmp/ray").glob("session_2*"))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "starting a Ray cluster of this machine's own, with 1 logical CPU …"
    dashboard = r"dashboard: http://127\.0\.0\.1:\d+, which asks for what `ray get-auth-token` prints"
    assert re.fullmatch(rf"Ray is up after \d+ s; {dashboard}", lines[1])
    folder = Path(lines[2].removeprefix("folder "))
    assert folder.name.startswith("session_")
    assert folder.is_dir() == is_kept
    assert all(other.exists() for other in others), "other clusters keep theirs"
    if is_kept:
        shutil.rmtree(folder)


LEAKING = """
import logging, sys, time
from pathlib import Path
from dermray import cluster, config, entry

def leak(uri):
    print("printed", uri)
    print("complained of", uri, file=sys.stderr)
    logging.getLogger("x").warning("logged %s", uri)
    raise ValueError(f"raised {uri}")

class Leaking:
    def __init__(self, uri):
        raise ValueError(f"created with {uri}")

def main():
    cluster.connect(config.ClusterConfig(num_cpus=2))
    import ray
    cluster.keep_logs()
    uri = f"postgresql://u:{sys.argv[1]}@h/d"
    failing = ray.remote(leak).options(max_retries=0).remote(uri)
    print("folder", ray._private.worker._global_node.get_session_dir_path(), flush=True)
    try:
        ray.get(failing)
    except ValueError as error:
        print(f"driver has {str(error).count('(hidden)')} hidden")
    actor = ray.remote(Leaking).remote(uri)
    try:
        ray.get(actor.__ray_ready__.remote())
    except ray.exceptions.RayActorError:
        pass
    # What workers print comes to the driver a moment later.
    time.sleep(2)
    return 1

sys.exit(entry.run_job(main))
"""


@pytest.mark.ray
@pytest.mark.long
def test_no_secret_of_a_worker_is_in_the_logs_of_ray_or_comes_to_the_driver(tmp_path: Path) -> None:
    """A task and an actor that know nothing of us, on a cluster that a job has started."""
    canary = "Kan4ry-S3cret-of-a-worker"
    (tmp_path / "job.py").write_text(LEAKING)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py", canary], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1, done.stderr
    (folder,) = re.findall(r"^folder (/\S+/session_\S+)$", done.stdout, flags=re.MULTILINE)
    try:
        assert canary not in done.stdout + done.stderr
        found = [file for file in Path(folder).rglob("*") if file.is_file() and canary.encode() in file.read_bytes()]
        # Ray's own log of the driver has the error of a constructor as it was pickled.
        assert not found
        told = "".join(file.read_text(errors="replace") for file in Path(folder, "logs").glob("*") if file.is_file())
        for said in ("printed", "complained of", "logged", "created with"):
            assert f"{said} postgresql://(hidden)@h/d" in told
    finally:
        shutil.rmtree(folder)
