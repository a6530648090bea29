"""The GPUs that CUDA shows this process. Asks the driver, not torch; knows nothing of what they can do."""

import ctypes
import os

_DRIVER = "libcuda.so.1"
_VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """The GPUs in CUDA's order, each as the value of CUDA_VISIBLE_DEVICES that shows a process only this one.

    CUDA is initialized here, so that a later change of the variable has no effect on this process.
    """
    names = os.environ.get(_VARIABLE)
    if names == "":
        return []
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:  # there is none
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    # CUDA shows the named ones up to the first that does not exist.
    shown = map(str, range(count.value)) if names is None else names.split(",")
    return [name.strip() for name in shown][: count.value]
