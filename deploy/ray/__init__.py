"""`serve run deploy.ray:app` from the repository's root; an installation has it as persimmon.server.ray.application."""

from persimmon.server.ray.application import app

__all__ = ["app"]
