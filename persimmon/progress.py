"""Progress bars of commands, on standard error where that is a terminal."""

import sys
import threading
from typing import Any, Literal

from tqdm import tqdm

_BYTES = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}


def progress_bar(
    name: str, total: int | None, unit: Literal["B", "graph", "req"], *, initial: int = 0, leave: bool = False
) -> "tqdm[Any]":
    """A bar, which is a context manager; `update` moves it.

    Args:
        name: what goes on.
        total: units in all; None where that is not known.
        unit: what is counted; bytes are shown as KiB, MiB and so on.
        initial: units that were done before.
        leave: whether the bar stays when it ends.
    """
    # One process draws it; tqdm's own lock, made for several, would leave a semaphore behind.
    tqdm.set_lock(threading.RLock())
    options: dict[str, Any] = {**_BYTES} if unit == "B" else {"unit": unit}
    options |= {"total": total, "initial": initial, "leave": leave, "dynamic_ncols": True}
    # disable=None: no bar where standard error is not a terminal.
    return tqdm(desc=f"  {name}", file=sys.stderr, disable=None, **options)
