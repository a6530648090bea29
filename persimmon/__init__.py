"""A high-throughput inference server for Adept's Persimmon models.

The public API is what `__all__` lists; docs/guides/embedding.md shows how to use it. Each part is imported when it is
first used, so that `import persimmon` costs nothing.

The repository keeps the packages at its top (server/, model/, kernels/); the links next to this file make them
`persimmon.server`, `persimmon.model` and `persimmon.kernels`, so that an installation adds one name.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persimmon.model.errors import CheckpointError
    from persimmon.server.embedded import EmbeddedServer, EngineFailedError
    from persimmon.server.settings.section import SettingsError

    __version__: str

__all__ = ["CheckpointError", "EmbeddedServer", "EngineFailedError", "SettingsError", "__version__"]

_MODULES = {
    "CheckpointError": "persimmon.model.errors",
    "EmbeddedServer": "persimmon.server.embedded",
    "EngineFailedError": "persimmon.server.embedded",
    "SettingsError": "persimmon.server.settings.section",
}

if not TYPE_CHECKING:

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("persimmon-server")
        if name in _MODULES:
            from importlib import import_module

            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted(__all__)
