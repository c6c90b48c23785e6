"""What serving asks of the MLflow registry, and the record it leaves there. Blocking; call it off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dermray import tracking
from dermray.predict import ModelSource, locate
from dermray.release.golden import Check
from dermray.service.settings import ServeConfig

REGISTRY_PREFIX = tracking.MODELS_PREFIX


class MlflowRegistry:
    """Versions behind an alias, and the audit record of every change."""

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings

    def resolve(self, uri: str, name: str | None = None) -> ModelSource:
        """The version that `models:/NAME@ALIAS` points at now.

        Raises:
            DermRayError: there is none, or its folder holds no model.
        """
        found = tracking.resolve_model(uri, self._settings.tracking)
        return locate(found.folder_uri, name=name or found.name, version=found.version, alias=found.alias)

    def version_at(self, uri: str) -> str:
        """The number of the version that `models:/NAME@ALIAS` points at now; fetches no files.

        Raises:
            TrackingError: there is none, or the registry is away.
        """
        return tracking.version_at(uri, self._settings.tracking)

    def record_deployment(self, source: ModelSource) -> None:
        """Leave a run of the kind `deploy`: which version goes up with which settings."""
        model = tracking.ResolvedModel(source.uri, source.name, source.version, source.alias)
        tracking.record_deployment(self._settings.tracking, self._settings, model)

    def point(self, uri: str, version: str) -> None:
        """Move the alias of `models:/NAME@ALIAS` to a version.

        Raises:
            TrackingError: the registry does not take it.
        """
        tracking.move_alias(uri, version, self._settings.tracking)

    def before(self, uri: str, source: ModelSource) -> ModelSource | None:
        """The version that answered at `models:/NAME@ALIAS` before `source`, by the records in MLflow; None: none did.

        Raises:
            DermRayError: the registry is away, or has that version no more.
        """
        registered, _, alias = uri.removeprefix(REGISTRY_PREFIX).partition("@")
        version = tracking.version_served_before(
            self._settings.tracking, name=source.name, alias=alias, version=source.version or ""
        )
        if version is None:
            return None
        return replace(self.resolve(f"{REGISTRY_PREFIX}{registered}/{version}", source.name), alias=alias)

    def record(
        self, uri: str, answers: ModelSource, event: str, before: str | None, after: str | None, checks: Sequence[Check]
    ) -> None:
        """Leave a run of the kind `rollout`: what was tried, from and to which version, and every check.

        Args:
            answers: the version that answers from now on.
        """
        name = f"{event} {uri} {before or '-'} to {after or '-'}"
        tags = {"rollout.event": event, "rollout.from": before or "", "rollout.to": after or ""}
        tags |= tracking.served_tags(answers.name, answers.version, answers.alias)
        report = "\n".join(f"{'passed' if one.passed else 'FAILED'}  {one.name}: {one.detail}" for one in checks)
        with tracking.run(self._settings.tracking, kind="rollout", name=name, resolved=self._settings) as current:
            current.set_tags(tags)
            current.log_metrics({f"check_{one.name}": float(one.passed) for one in checks})
            current.log_text(report or "no checks", "checks.txt")
