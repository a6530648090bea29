"""The card and the software that a run's figures belong to.  Asks the driver's tool: it makes no CUDA context."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FACTS = {"device": "name", "compute_capability": "compute_cap", "driver": "driver_version", "memory": "memory.total"}
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
PACKAGES = ("torch", "triton", "transformers")


class NoDeviceError(RuntimeError):
    """No GPU is visible."""


def description(device: str, shape: str) -> dict[str, Any]:
    """The device and the software; a file keeps older sections only if these are the same.

    Raises:
        NoDeviceError: a GPU is asked for and the driver reports none.
    """
    found: dict[str, Any] = {"device": "cpu (interpreter): times are not figures"}
    if device == "cuda":
        values = query(tuple(FACTS.values()))
        if values is None:
            raise NoDeviceError("nvidia-smi reports no GPU")
        found = dict(zip(FACTS, values, strict=True))
    software = {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES}
    return found | {"shape": shape} | software


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clocks() -> dict[str, str] | None:
    """What the card reports of its clocks, power and temperature, now; None where there is none."""
    values = query(CLOCKS)
    return None if values is None else dict(zip(CLOCKS, values, strict=True))


def query(names: tuple[str, ...]) -> list[str] | None:
    """Values of the card that torch calls cuda:0; None where the tool cannot tell."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={first}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in answer[0].split(", ")] if answer else []
    return values if len(values) == len(names) else None
