"""The entry of the HTTP service: `serve run serve.app:build model=URI`, from the repository root."""
