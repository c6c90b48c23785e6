"""What Ray's dashboard would show in red."""

from __future__ import annotations

import time

import ray
from ray._private.gcs_utils import create_gcs_channel
from ray.core.generated.gcs_service_pb2 import FilterPredicate, GetTaskEventsRequest
from ray.core.generated.gcs_service_pb2_grpc import TaskInfoGcsServiceStub

# Processes of Ray hand in what became of their tasks once a second.
HANDED_IN_S = 2.0
MAX_TASKS = 10_000


def failed_tasks() -> dict[str, str]:
    """Tasks of the connected cluster whose state is FAILED: id → name and error.

    The same as `ray.util.state.list_tasks`, which asks a dashboard; a cluster of this machine's own has none.
    """
    time.sleep(HANDED_IN_S)
    failed = GetTaskEventsRequest.Filters.StateFilter(state="FAILED", predicate=FilterPredicate.EQUAL)
    filters = GetTaskEventsRequest.Filters(state_filters=[failed], exclude_driver=True)
    channel = create_gcs_channel(ray.get_runtime_context().gcs_address)
    with channel:
        reply = TaskInfoGcsServiceStub(channel).GetTaskEvents(GetTaskEventsRequest(limit=MAX_TASKS, filters=filters))
    return {
        f"{event.task_id.hex()} {event.attempt_number}": f"{event.task_info.name}: "
        f"{' '.join(event.state_updates.error_info.error_message.split())[-300:]}"
        for event in reply.events_by_task
    }
