"""Walk a chain of lineage: `python jobs/lineage.py of=models:/dermray@champion [output=FOLDER] [--verify]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dermray import documents, ledger, redaction, storage
from dermray.config import Config, TrackingConfig, load

if TYPE_CHECKING:
    from dermray.release import verification
    from dermray.tracking import lineage

JSON_NAME, HTML_NAME = "lineage.json", "lineage.html"


class LineageConfig(Config):
    """Everything `jobs/lineage.py` can be told."""

    of: str = Field(
        description="models:/NAME@ALIAS or models:/NAME/VERSION, a run id, a digest (12 characters or more), the URI "
        "of a corpus, model folder, report or training's output, or a served answer (JSON, or a .json file of it)"
    )
    verify: bool = Field(False, description="true, or --verify: compute all digests again and say what is not the same")
    format: Literal["text", "json"] = Field("text", description="what is printed")
    output: str | None = Field(None, description="URI of a folder for lineage.json and lineage.html")
    wait_for_output_s: ledger.WaitForOutput = 0.0
    tracking: TrackingConfig = TrackingConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`. The exit code is 1 when something is changed or missing."""
    arguments = [
        "verify=true" if argument == "--verify" else argument for argument in (sys.argv[1:] if argv is None else argv)
    ]
    config = load(
        LineageConfig,
        arguments,
        prog="jobs/lineage.py",
        description="Print what something came from and led to, and verify that it is still what it was.",
    )
    from dermray.release import verification
    from dermray.tracking import lineage

    graph = lineage.trace(config.of, config.tracking)
    findings = verification.verify(graph, config.tracking) if config.verify else None
    if config.format == "json":
        print(json.dumps(redaction.hidden(_document(graph, findings)), indent=2, ensure_ascii=False))
    else:
        print(redaction.without_secrets(graph.text()))
        for finding in findings or ():
            print(redaction.without_secrets(finding.line()))
        if findings is not None:
            print(f"verified: {verification.summary(findings)}")
    if config.output is not None:
        _write(config.output, config.wait_for_output_s, graph, findings)
    return int(any(finding.is_bad for finding in findings or ()))


def _document(graph: lineage.Graph, findings: list[verification.Finding] | None) -> dict[str, object]:
    found = None if findings is None else [finding.to_json() for finding in findings]
    return {**graph.to_json(), "findings": found}


def _write(output: str, wait_s: float, graph: lineage.Graph, findings: list[verification.Finding] | None) -> None:
    from dermray.reporting import lineage_page

    document = redaction.hidden(_document(graph, findings))
    by_id = {node["id"]: node for node in document["nodes"]}
    layers = [[by_id[node.id] for node in layer] for layer in graph.layers()]
    page = lineage_page.render(layers, sorted(graph.edges), graph.start, document["findings"])
    written = documents.json_text(document)
    with ledger.claim(output, wait_s=wait_s) as claim:
        claim.write_together({storage.join(output, HTML_NAME): page, storage.join(output, JSON_NAME): written})
    print(f"page: {storage.join(storage.normalise(output), HTML_NAME)}")
