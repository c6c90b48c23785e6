"""From anything that a run read or made, the whole chain: up to the raw data, down to what is served.

Every run names what it read and made by kind and digest (tags `dermray.input.KIND.DIGEST`, `dermray.output.…`), so the
graph is found by searching MLflow for digests, wherever the things themselves have gone since.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities.model_registry import ModelVersion

from dermray import storage
from dermray.config import TrackingConfig
from dermray.corpus.manifest import MANIFEST_NAME, Manifest
from dermray.documents import parse_json
from dermray.errors import DocumentError, TrackingError
from dermray.printable import printable
from dermray.tracking import store
from dermray.tracking.delivery import KEY_TAG
from dermray.tracking.deployments import SERVED_NAME, SERVED_VERSION
from dermray.tracking.registry import MODELS_PREFIX, PROVENANCE_NAME, version_of
from dermray.tracking.runs import LINEAGE_DIGEST_CHARS, LINEAGE_TAG

KINDS = ("raw", "corpus", "table", "model", "report", "recipe", "export")
MAX_NODES = 2000
_TAG = re.compile(r"dermray\.(input|output)\.([a-z]+)\.[0-9a-f]+")
_HEX = re.compile(r"[0-9a-f]{12,64}")

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Node:
    """A run, a version of a registered model, or something that a run read or made.

    Attributes:
        id: `run:ID`, `version:NAME/NUMBER`, or `KIND:DIGEST`.
        kind: run, version, or one of KINDS.
        title: for humans.
        uri: where it is; of a version, its copy of the model folder; empty for a run.
        digest: SHA-256 (hex), or empty.
        facts: what else is known of it.
    """

    id: str
    kind: str
    title: str
    uri: str = ""
    digest: str = ""
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class Graph:
    """Nodes by id, and edges from what came before to what came of it."""

    start: str
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: set[tuple[str, str]] = field(default_factory=set)

    def neighbours(self, node_id: str, direction: Direction) -> list[str]:
        """What a node came from (`up`) or led to (`down`), in a stable order."""
        found = [b if direction == "down" else a for a, b in self.edges if node_id == (a if direction == "down" else b)]
        return sorted(found)

    def text(self) -> str:
        """Two trees, upwards and downwards; a node that was shown before is named again without its branches."""
        lines = [_line(self.nodes[self.start])]
        for heading, direction in (("came from", "up"), ("led to", "down")):
            lines.append(heading)
            below = list(self._tree(self.start, direction, "  ", {self.start}))  # type: ignore[arg-type]
            lines.extend(below or ["  nothing that MLflow knows of"])
        return "\n".join(printable(line) for line in lines)

    def _tree(self, node_id: str, direction: Direction, indent: str, shown: set[str]) -> Iterator[str]:
        for other in self.neighbours(node_id, direction):
            again = other in shown
            shown.add(other)
            yield f"{indent}{_line(self.nodes[other])}{' (see above)' if again else ''}"
            if not again:
                yield from self._tree(other, direction, indent + "  ", shown)

    def to_json(self) -> dict[str, Any]:
        """The same as a document: `start`, `nodes`, `edges`."""
        return {
            "start": self.start,
            "nodes": [asdict(self.nodes[key]) for key in sorted(self.nodes)],
            "edges": [list(edge) for edge in sorted(self.edges)],
        }

    def layers(self) -> list[list[Node]]:
        """Nodes by the longest road to them from what has nothing before it: for drawing from top to bottom."""
        depth = dict.fromkeys(self.nodes, 0)
        # Edges follow time, so that a chain is no longer than there are nodes.
        for _ in range(len(self.nodes)):
            deeper = {b: depth[a] + 1 for a, b in self.edges if depth[a] + 1 > depth[b]}
            if not deeper:
                break
            depth.update(deeper)
        layers: list[list[Node]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
        for key in sorted(self.nodes):
            layers[depth[key]].append(self.nodes[key])
        return layers


def trace(reference: str, config: TrackingConfig) -> Graph:
    """The graph around `reference`.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`; a run id; a digest (12 characters and more) of a
            corpus, model or report; the URI of one, or of a training's output; or an answer of the server, as JSON or
            as a file of it.

    Raises:
        TrackingError: MLflow or the file does not know it, or MLflow does not answer.
    """
    with store.asked(config) as mlflow_client:
        explorer = _Explorer(mlflow_client)
        starts = explorer.find(reference)
        if not starts:
            raise TrackingError(f"{reference}: MLflow knows no run, model, corpus or report of that name or digest")
        explorer.graph.start = starts[0].id
        for direction in ("up", "down"):
            explorer.walk(starts, direction)
    return explorer.graph


class _Explorer:
    def __init__(self, mlflow_client: MlflowClient) -> None:
        self.graph = Graph("")
        self._client = mlflow_client
        self._experiments = [e.experiment_id for e in mlflow_client.search_experiments()]

    def walk(self, starts: list[Node], direction: Direction) -> None:
        waiting, seen = deque(starts), {node.id for node in starts}
        while waiting:
            node = waiting.popleft()
            for other in self._beyond(node, direction):
                edge = (node.id, other.id) if direction == "down" else (other.id, node.id)
                self.graph.nodes.setdefault(other.id, other)
                self.graph.edges.add(edge)
                if len(self.graph.nodes) > MAX_NODES:
                    raise TrackingError(f"more than {MAX_NODES:,} things hang together here; begin further down")
                if other.id not in seen:
                    seen.add(other.id)
                    waiting.append(other)

    def _beyond(self, node: Node, direction: Direction) -> list[Node]:
        if node.kind == "run":
            run = self._client.get_run(node.id.partition(":")[2])
            found = _artifacts(run, "input" if direction == "up" else "output")
            if direction == "up" and "mlflow.parentRunId" in run.data.tags:
                found.append(_run_node(self._client.get_run(run.data.tags["mlflow.parentRunId"])))
            if direction == "down" and node.facts.get("kind") == "register":
                versions = self._client.search_model_versions(f"run_id = '{run.info.run_id}'")
                found += [self._version_node(version) for version in versions]
            return found
        if node.kind == "version":
            return self._before_version(node) if direction == "up" else self._deployments_of(node)
        wanted: Literal["input", "output"] = "output" if direction == "up" else "input"
        found = [_run_node(run) for run in self._runs_with(wanted, node.kind, node.digest)]
        if node.kind == "model" and direction == "down":
            found += self._versions_of(node.digest)
        return found

    def _before_version(self, node: Node) -> list[Node]:
        found = []
        digest = node.digest
        if digest:
            made = [a for run in self._runs_with("output", "model", digest) for a in _artifacts(run, "output")]
            known = [a for a in made if a.digest == digest]
            found.append(known[0] if known else Node(f"model:{digest}", "model", "model folder", "", digest))
        if node.facts.get("run_id"):
            found.append(_run_node(self._client.get_run(node.facts["run_id"])))
        return found

    def _deployments_of(self, node: Node) -> list[Node]:
        """Runs after which a version answered. One that is served under a name of its own is known by its weights."""
        name, _, number = node.id.removeprefix("version:").rpartition("/")
        runs = self._client.search_runs(self._experiments, f"tags.`{SERVED_VERSION}` = '{number}'")
        is_only_one = bool(node.digest) and len(self._versions_of(node.digest)) == 1
        return [
            _run_node(run)
            for run in runs
            if run.data.tags.get(SERVED_NAME) == name
            or (is_only_one and any(model.digest == node.digest for model in _artifacts(run, "input")))
        ]

    def _runs_with(self, direction: Literal["input", "output"], kind: str, digest: str) -> list[MlflowRun]:
        tag = LINEAGE_TAG.format(direction=direction, kind=kind, digest=digest[:LINEAGE_DIGEST_CHARS])
        return list(self._client.search_runs(self._experiments, f"tags.`{tag}` LIKE '%'"))

    def _versions_of(self, digest: str) -> list[Node]:
        found = self._client.search_model_versions(f"tags.`dermray.weights_sha256` = '{digest}'")
        return [self._version_node(version) for version in found]

    def _version_node(self, version: ModelVersion) -> Node:
        tags = version.tags or {}
        aliases = list(self._client.get_model_version(version.name, version.version).aliases)
        facts = {"run_id": version.run_id or "", "aliases": ", ".join(aliases), **tags}
        title = f"{version.name} version {version.version}" + (f" ({', '.join(aliases)})" if aliases else "")
        uri = tags.get("dermray.model_uri") or str(version.source)
        node_id = f"version:{version.name}/{version.version}"
        return Node(node_id, "version", title, uri, tags.get("dermray.weights_sha256", ""), facts)

    def find(self, reference: str) -> list[Node]:
        """The nodes that a reference stands for; they are in the graph then."""
        found = self._found(reference)
        self.graph.nodes |= {node.id: node for node in found}
        return found

    def _found(self, reference: str) -> list[Node]:
        if reference.startswith(MODELS_PREFIX):
            return [self._version_node(version_of(self._client, reference))]
        if _HEX.fullmatch(reference):
            return self._by_hex(reference)
        answer = _answer(reference)
        if answer is not None:
            return self._by_answer(answer)
        kind, digest, run = _described(reference)
        return self._by_hex(run) if run else self._by_digest(digest, (kind,))

    def _by_hex(self, text: str) -> list[Node]:
        if len(text) == 32:
            runs = list(self._client.search_runs(self._experiments, f"attributes.run_id = '{text}'"))
            runs += self._client.search_runs(self._experiments, f"tags.`{KEY_TAG}` = '{text}'")
            if runs:
                return [_run_node(runs[0])]
        return self._by_digest(text, KINDS)

    def _by_digest(self, digest: str, kinds: tuple[str, ...]) -> list[Node]:
        for kind in kinds:
            for direction in ("output", "input"):
                for run in self._runs_like(direction, kind, digest):
                    found = [node for node in _artifacts(run, direction) if node.digest.startswith(digest)]
                    if found:
                        return found[:1]
        return self._versions_of(digest)

    def _runs_like(self, direction: Any, kind: str, digest: str) -> list[MlflowRun]:
        if len(digest) >= LINEAGE_DIGEST_CHARS:
            return self._runs_with(direction, kind, digest)
        tagged = self._client.search_runs(self._experiments, "tags.`dermray.kind` LIKE '%'")
        prefix = f"dermray.{direction}.{kind}.{digest}"
        return [run for run in tagged if any(tag.startswith(prefix) for tag in run.data.tags)]

    def _by_answer(self, answer: dict[str, Any]) -> list[Node]:
        info = answer["model_info"]
        if info.get("version"):
            return [self._version_node(version_of(self._client, f"{MODELS_PREFIX}{info['name']}/{info['version']}"))]
        return self._by_digest(str(info.get("digest", "")), ("model",))


def _answer(reference: str) -> dict[str, Any] | None:
    """A server's answer, given as JSON or as a file of JSON; None if it is neither."""
    text = reference
    if not reference.lstrip().startswith("{"):
        if not reference.endswith(".json") or storage.name_of(reference) in (MANIFEST_NAME, "report.json"):
            return None
        try:
            text = storage.read_text(reference)
        except FileNotFoundError:
            raise TrackingError(f"{reference} does not exist") from None
    try:
        document = parse_json(text, reference[:80])
    except DocumentError as error:
        raise TrackingError(str(error)) from None
    info = document.get("model_info") if isinstance(document, dict) else None
    if not isinstance(info, dict) or (info.get("version") and not isinstance(info.get("name"), str)):
        raise TrackingError(f"{reference[:80]}: no answer of the server: it has no model_info with a name")
    return document


def _described(uri: str) -> tuple[str, str, str]:
    """Kind, digest and run id of what lies at a URI; the last two perhaps empty.

    Raises:
        TrackingError: nothing there is known.
    """
    folder = uri.rpartition("/")[0] if storage.name_of(uri) in (MANIFEST_NAME, "report.json") else uri
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        return "corpus", Manifest.load(folder).digest, ""
    report = storage.join(folder, "report.json")
    if storage.exists(report):
        return "report", storage.sha256(report), ""
    provenance = storage.join(folder, PROVENANCE_NAME)
    if storage.exists(provenance):
        return "model", str(storage.read_object(provenance).get("weights_sha256", "")), ""
    state = storage.join(folder, "mlflow.json")
    if storage.exists(state):
        found = storage.read_object(state)
        return "run", "", str(found.get("mlflow_run_id") or found.get("run_key"))
    raise TrackingError(
        f"{uri}: no run id, digest, models:/ URI, server's answer, corpus, model folder, report or training's output"
    )


def _run_node(run: MlflowRun) -> Node:
    tags = run.data.tags
    facts = {
        "kind": tags.get("dermray.kind", ""),
        "status": run.info.status,
        "commit": tags.get("mlflow.source.git.commit", ""),
        "uncommitted changes": tags.get("git.dirty", ""),
        "version": tags.get("dermray.version", ""),
        "experiment": run.info.experiment_id,
    }
    title = f"{facts['kind'] or 'run'} “{run.info.run_name}”"
    return Node(f"run:{run.info.run_id}", "run", title, "", "", {key: value for key, value in facts.items() if value})


def named_artifacts(run: MlflowRun) -> Iterator[tuple[str, str, str, str]]:
    """What a run has read and made: direction (`input`, `output`), kind, URI and digest."""
    for tag, value in run.data.tags.items():
        match = _TAG.fullmatch(tag)
        if match is not None:
            # A tag is whatever somebody wrote there: one that is none of ours names nothing.
            with contextlib.suppress(DocumentError, KeyError, TypeError):
                document = parse_json(value, tag)
                yield match[1], match[2], str(document["uri"]), str(document["digest"])


def _artifacts(run: MlflowRun, direction: str) -> list[Node]:
    return [
        Node(f"{kind}:{digest}", kind, _titled(kind, storage.name_of(uri)), uri, digest)
        for its_direction, kind, uri, digest in named_artifacts(run)
        if its_direction == direction
    ]


def _titled(kind: str, name: str) -> str:
    """`model best`, but `model` where the folder has no other name."""
    return kind if name == kind else f"{kind} {name}"


def _line(node: Node) -> str:
    if node.kind == "run":
        facts = node.facts
        commit = facts.get("commit", "")[:12]
        dirty = " + uncommitted changes" if facts.get("uncommitted changes") == "True" else ""
        return f"run {node.id[4:]}  {node.title}  {facts['status']}" + (f"  commit {commit}{dirty}" if commit else "")
    return f"{node.title}" + (f"  {node.digest[:12]}" if node.digest else "") + (f"  {node.uri}" if node.uri else "")
