"""All that is used of Ray's private parts, each with the reason why nothing public does.

`pyproject.toml` admits one minor version of Ray for their sake. A unit test looks for each of them, so that another
version is refused by a sentence and not by a training that fails; another finds what is used elsewhere.
"""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Loggers of Ray, which have the names of its private modules; to quieten one that is gone does nothing.
AUTHENTICATION_LOGGER = "ray._private.authentication"
DATA_PROGRESS_LOGGER = "ray.data._internal.progress"
DATA_EXECUTION_LOGGER = "ray.data._internal.execution"
DATA_EXECUTOR_LOGGER = "ray.data._internal.execution.streaming_executor_state"
LOGGERS = (AUTHENTICATION_LOGGER, DATA_PROGRESS_LOGGER, DATA_EXECUTION_LOGGER, DATA_EXECUTOR_LOGGER)


@dataclass(frozen=True)
class Part:
    """A private part of Ray.

    Attributes:
        name: `module:ATTRIBUTE`, with points in it for what a class has.
        why: what it is for, and why nothing public does.
        parameters: names of what it is called with, where it is called or overridden.
    """

    name: str
    why: str
    parameters: tuple[str, ...] = ()

    def get(self) -> Any:
        """The part itself.

        Raises:
            ImportError: this version of Ray has none, or one that is called otherwise; says what for it is needed.
        """
        import inspect

        module, _, path = self.name.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for attribute in path.split("."):
                found = getattr(found, attribute)
        except (ImportError, AttributeError) as error:
            raise ImportError(f"{self._in_words()} is not there: {error}") from None
        taken = tuple(inspect.signature(found).parameters) if self.parameters else ()
        if taken != self.parameters:
            raise ImportError(f"{self._in_words()} takes {', '.join(taken)} now, not {', '.join(self.parameters)}")
        return found

    def _in_words(self) -> str:
        import ray

        return f"Ray {ray.__version__} is another than DermRay is written for; {self.name} ({self.why})"


ELASTIC_POLICY = Part(
    "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy",
    "world sizes of a plan; Ray's policy takes any number between two bounds, and none of one's own can be given",
    ("scaling_config",),
)
POSSIBLE_WORKERS = Part(
    f"{ELASTIC_POLICY.name}._count_possible_workers", ELASTIC_POLICY.why, ("self", "reserved_resources")
)
RUN_CONTROLLER = Part(
    "ray.train.torch:TorchTrainer._initialize_and_run_controller",
    "where Ray hands its policy over to the controller; there is no parameter for it",
    ("self", "controller_init_kwargs"),
)
SIGINT_HANDLER = Part(
    "ray.train.torch:TorchTrainer._register_sigint_handler",
    "Ctrl-C is ours to handle; Ray's handler ends an interrupted process with 0, and cannot be turned off",
    ("self", "controller"),
)
DEFAULT_CALLBACKS = Part(
    "ray.train.torch:TorchTrainer._create_default_callbacks",
    "to go without the cleaner of placement groups, which no setting leaves out",
    ("self",),
)
GROUP_CLEANER = Part(
    "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback", DEFAULT_CALLBACKS.why
)
CONTROLLER_CALLBACK = Part(
    "ray.train.v2._internal.execution.callback:ControllerCallback",
    "to hear that workers are being started; the public UserCallback is told of reports and failures only",
)
CONTROLLER_START = Part(
    f"{CONTROLLER_CALLBACK.name}.after_controller_start", CONTROLLER_CALLBACK.why, ("self", "train_run_context")
)
CONTROLLER_STATE = Part(
    f"{CONTROLLER_CALLBACK.name}.after_controller_state_update",
    CONTROLLER_CALLBACK.why,
    ("self", "previous_state", "current_state"),
)
PORT_REUSE = Part(
    "ray.serve._private.http_util:set_socket_reuse_port",
    "nobody else may listen on the service's port; the one setting against it leaves SO_REUSEADDR out too, without "
    "which a new proxy waits for a minute",
    ("sock",),
)
INIT_HOOKS = Part(
    "ray._private.worker:_post_init_hooks",
    "Ray sets a handler for SIGTERM when it starts; ours comes after it, whoever calls ray.init",
)
BOOTSTRAP_ADDRESS = Part(
    "ray._private.services:find_bootstrap_address",
    "whether `serve run` will join a cluster, before it does; ray.init alone finds that out",
    ("temp_dir",),
)
WORKER_MODE = Part(
    "ray._private.worker:global_worker.mode",
    "whether Ray has started this process; its runtime context says so only once it is connected",
)

PARTS = tuple(part for part in list(globals().values()) if isinstance(part, Part))


def set_port_reuse(setter: Callable[[socket.socket], bool]) -> None:
    """Have Ray's HTTP servers of this process call `setter` for a socket before they listen."""
    PORT_REUSE.get()
    module, _, name = PORT_REUSE.name.partition(":")
    setattr(importlib.import_module(module), name, setter)


def after_init(hook: Callable[[], object]) -> None:
    """Have `ray.init` of this process call something at its end."""
    INIT_HOOKS.get().append(hook)


def finds_cluster() -> bool:
    """Whether this machine has a cluster that programs join which name no address, as `ray start` leaves it."""
    return BOOTSTRAP_ADDRESS.get()(None) is not None


def is_worker() -> bool:
    """Whether Ray has started this process for its tasks and actors; does not load Ray where it is not loaded."""
    # Loaded where Ray has started the process, and not worth loading elsewhere.
    ray = sys.modules.get("ray._private.worker")
    own = getattr(ray, "global_worker", None)
    return ray is not None and own is not None and own.mode == ray.WORKER_MODE
