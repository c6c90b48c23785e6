"""Whether what a chain of lineage names is still there and the same: digests are computed again from the bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from dermray import storage
from dermray.config import TrackingConfig
from dermray.corpus.manifest import Manifest, Shard, SideShard
from dermray.corpus.ontology import ONTOLOGY_NAME
from dermray.errors import CorpusError, StorageError, TrackingError
from dermray.models.layout import WEIGHTS_NAME, weights_of
from dermray.release import gate
from dermray.tracking import registry, store
from dermray.tracking.lineage import Graph, Node


class State(StrEnum):
    """What was found."""

    SAME = "same"
    CHANGED = "changed"
    MISSING = "missing"
    UNCHECKED = "unchecked"
    MISMATCH = "mismatch"


@dataclass(frozen=True)
class Finding:
    """What became of one node; `detail` says which file, and what to make of it."""

    node: str
    title: str
    uri: str
    state: State
    detail: str

    @property
    def is_bad(self) -> bool:
        """Changed, missing, or joined to what it does not belong to."""
        return self.state in (State.CHANGED, State.MISSING, State.MISMATCH)

    def line(self) -> str:
        """For a terminal."""
        return f"{self.state:<9} {self.title}  {self.uri}" + (f": {self.detail}" if self.detail else "")

    def to_json(self) -> dict[str, Any]:
        """A document with the same fields."""
        return asdict(self)


def verify(graph: Graph, config: TrackingConfig) -> list[Finding]:
    """Look at everything in the graph that has bytes; runs and registry entries were read from MLflow just now.

    Args:
        config: of the store that the graph is from, which holds files of registered models.

    Raises:
        TrackingError: there is no such store.
    """
    mlflow_client = store.client(config)

    def fetch(source: str) -> str:
        with store.answered(mlflow_client):
            return registry.fetched(mlflow_client, source)

    checks: dict[str, Callable[[Node], tuple[State, str]]] = {
        "corpus": _corpus,
        "model": _model,
        "version": lambda node: _version(node, fetch),
        "report": lambda node: _file(node, storage.join(node.uri, "report.json")),
        "export": lambda node: _file(node, storage.join(node.uri, "export.json")),
        "recipe": lambda node: _file(node, node.uri),
        "table": lambda node: _file(node, node.uri),
        "raw": lambda _: (
            State.UNCHECKED,
            "not looked at but for its tables; jobs/prepare.py with the same keys says whether its rows are unchanged",
        ),
    }
    found = [_checked(graph.nodes[key], checks) for key in sorted(graph.nodes) if graph.nodes[key].kind in checks]
    return [_joined(graph, finding) for finding in found]


def _joined(graph: Graph, finding: Finding) -> Finding:
    """A report that is the same as ever, but not of the models that runs read beside it."""
    node = graph.nodes[finding.node]
    if node.kind != "report" or finding.state is not State.SAME:
        return finding
    scored = {str(one.document["model"]["model_digest"]) for one in gate.load_report(node.uri).values()}
    for run in (*graph.neighbours(node.id, "up"), *graph.neighbours(node.id, "down")):
        for other in graph.neighbours(run, "up"):
            digest = graph.nodes[other].digest
            if graph.nodes[other].kind == "model" and digest not in scored:
                told = ", ".join(sorted(one[:12] for one in scored))
                detail = f"it is of the model {told}; {graph.nodes[run].title} took it for one of {digest[:12]}"
                return replace(finding, state=State.MISMATCH, detail=detail)
    return finding


def summary(findings: Sequence[Finding]) -> str:
    """How many of each state, in a line."""
    counts = Counter(finding.state for finding in findings)
    return ", ".join(f"{counts[state]} {state}" for state in State if counts[state]) or "nothing to verify"


def _checked(node: Node, checks: dict[str, Callable[[Node], tuple[State, str]]]) -> Finding:
    try:
        state, detail = checks[node.kind](node)
    except FileNotFoundError as error:
        state, detail = State.MISSING, str(error)
    except CorpusError as error:
        state, detail = State.MISSING if "has no manifest.json" in str(error) else State.CHANGED, str(error)
    except (StorageError, TrackingError, OSError) as error:
        state, detail = State.UNCHECKED, f"out of reach: {error}"
    return Finding(node.id, node.title, node.uri, state, detail)


def _corpus(node: Node) -> tuple[State, str]:
    manifest = Manifest.load(node.uri)
    if manifest.digest != node.digest:
        return State.CHANGED, f"its manifest has the digest {manifest.digest[:12]} now, not {node.digest[:12]}"
    files: list[Shard | SideShard] = [*manifest.shards]
    files += [side for table in manifest.side_tables for side in table.shards]
    for file in files:
        uri = storage.inside(node.uri, file.path)
        if not storage.exists(uri):
            return State.MISSING, f"{file.path} is gone; prepare the corpus again"
        if storage.sha256(uri) != file.sha256:
            return State.CHANGED, f"{file.path} is not what the manifest says; prepare the corpus again"
    ontology = manifest.ontology_sha256
    if ontology is not None and storage.sha256(storage.join(node.uri, ONTOLOGY_NAME)) != ontology:
        return State.CHANGED, f"{ONTOLOGY_NAME} is not what the manifest says"
    return State.SAME, f"{len(manifest.shards)} shards"


def _model(node: Node) -> tuple[State, str]:
    if not node.uri:
        return State.UNCHECKED, "no run says where its folder is"
    return _weights(node, node.uri)


def _version(node: Node, fetch: Callable[[str], str]) -> tuple[State, str]:
    if not node.digest:
        return State.UNCHECKED, "registered without a digest"
    return _weights(node, fetch(node.uri))


def _weights(node: Node, folder: str) -> tuple[State, str]:
    return _file(node, storage.join(folder, weights_of(folder) or WEIGHTS_NAME))


def _file(node: Node, uri: str) -> tuple[State, str]:
    if not storage.exists(uri):
        return State.MISSING, f"{storage.name_of(uri)} is gone"
    digest = storage.sha256(uri)
    if digest != node.digest:
        return State.CHANGED, f"{storage.name_of(uri)} has the digest {digest[:12]} now, not {node.digest[:12]}"
    return State.SAME, ""
