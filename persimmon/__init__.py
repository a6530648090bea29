"""A high-throughput inference server for Adept's Persimmon models.

The repository keeps the packages at its top (server/, model/, kernels/); the links beside this file make them
`persimmon.server`, `persimmon.model` and `persimmon.kernels`, so that an installation adds one name.
"""

from importlib.metadata import version

__version__ = version("persimmon-server")
