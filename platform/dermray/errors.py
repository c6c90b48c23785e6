"""The errors a user can cause or has to act upon.

Every message names what happened, which object (file, row, key, run) and what to do, in one line: entry
points print it as it is and exit with `exit_code`, without a stack trace.
"""

from __future__ import annotations


class DermRayError(Exception):
    """Base of every error that DermRay raises on purpose."""

    exit_code = 1


class ConfigError(DermRayError):
    """A configuration key, value or file is wrong. Raised before any work starts."""

    exit_code = 2


class StorageError(DermRayError):
    """A URI cannot be understood, read or written."""


class ClaimError(DermRayError):
    """Another run writes into the same output, or has taken it over while this one stood still."""


class DocumentError(StorageError):
    """A JSON or YAML document is malformed, or larger or deeper than any document of ours."""


class ImageError(DermRayError):
    """Bytes that are not an acceptable image. `reason` is a short stable word for reports (`truncated`, …)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class CorpusError(DermRayError):
    """A raw table or a prepared corpus is missing something, contradicts itself, or is too damaged to go on."""


class SplitError(CorpusError):
    """The corpus or table has no split of the name that a key gives: another value is needed."""

    exit_code = 2


class OntologyError(CorpusError):
    """The disease tree has a cycle, an orphan, or a malformed file."""


class PlanError(DermRayError):
    """The corpus, the global batch and the number of workers do not fit together: other keys are needed."""

    exit_code = 2


class ModelError(DermRayError):
    """A model name, folder or state dict cannot be loaded."""


class CheckpointError(DermRayError):
    """A checkpoint is damaged or belongs to another run."""


class NonFiniteError(DermRayError):
    """Training met too many gradients or weights that are not finite; starting it again would not help."""


class CollectiveError(DermRayError):
    """Ranks waited in vain for each other. A consequence: some rank died, hangs, or failed with an error of its own."""


class DeviceMemoryError(DermRayError):
    """The memory of the training device is too small for what a step keeps there."""


class StoppedError(DermRayError):
    """A run ended before its time because it was asked to, with a checkpoint to go on from."""

    exit_code = 143


class EvaluationError(DermRayError):
    """A score cannot be computed from what was given."""


class EndpointError(DermRayError):
    """A language model's endpoint is out of reach, refuses, or answers too little of what it is asked."""


class TrackingError(DermRayError):
    """The MLflow registry or tracking store refused something that the run depends on."""


class VectorIndexError(DermRayError):
    """Embeddings or an index are missing, damaged, or made by another model."""


class ServiceError(DermRayError):
    """A served model refused a request or is out of reach. `status` is HTTP's, 0 without an answer."""

    def __init__(self, message: str, *, status: int = 0, code: str = "unreachable", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
