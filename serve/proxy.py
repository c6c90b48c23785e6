"""The earlier name of `dermray.service.fleet.proxy:guard`, for configuration files that say it."""

from dermray.service.fleet.proxy import guard

__all__ = ["guard"]
