"""`serve run serve.app:build model=URI [key=value …]`, from the repository root; `serve/config.yaml` names it too.

The application is `dermray.service`.
"""

from dermray.service.application import build

__all__ = ["build"]
