"""The page of a chain of lineage: the graph, what verification found, and a table of everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dermray import reporting
from dermray.reporting import diagrams
from dermray.reporting.diagrams import Box

STATE_TONES = {"same": "good", "changed": "bad", "missing": "bad", "unchecked": "open"}


def render(
    layers: Sequence[Sequence[Mapping[str, Any]]],
    edges: Sequence[tuple[str, str]],
    start: str,
    findings: Sequence[Mapping[str, Any]] | None,
) -> str:
    """The page.

    Args:
        layers: nodes (`id`, `kind`, `title`, `uri`, `digest`, `facts`) in rows from what came first.
        edges: ids of nodes that hang together, the earlier one first.
        start: id of the node that was asked for.
        findings: of a verification (`node`, `title`, `uri`, `state`, `detail`), or None if there was none.
    """
    nodes = [node for layer in layers for node in layer]
    states = {one["node"]: one["state"] for one in findings or ()}
    boxes = [[_box(node, start, states.get(node["id"], "")) for node in layer] for layer in layers]
    legend = (
        {"asked for": "good"}
        if findings is None
        else {"same": "good", "changed or missing": "bad", "not checked": "open"}
    )
    return reporting.render(
        "lineage.html",
        start=next(node for node in nodes if node["id"] == start),
        nodes=nodes,
        num_runs=sum(node["kind"] == "run" for node in nodes),
        graph=diagrams.layered_graph(boxes, edges, title="lineage"),
        legend=diagrams.legend(legend),
        findings=findings,
        num_bad=sum(one["state"] in ("changed", "missing") for one in findings or ()),
    )


def _box(node: Mapping[str, Any], start: str, state: str) -> Box:
    note = f"{node['digest'][:12]}  {node['uri']}" if node["digest"] else node["facts"].get("status", "")
    tone = STATE_TONES.get(state, "")
    if not state and node["id"] == start:
        tone = "good"
    tooltip = "\n".join(filter(None, [node["title"], node["uri"], node["digest"], node["id"]]))
    return Box(node["id"], node["title"], note.strip(), tone, tooltip)
