"""What was compiled for a GPU that is not there, and the process that compiles it.

Knows no Triton, so a test can read what any version of it made.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as it would be launched.

    Attributes:
        kernel: its name.
        registers: of a thread.
        stack: bytes of a thread that registers spill to.
        shared_bytes: shared memory of a program.
        num_warps: of a program.
        programs: programs of the launch.
        ttgir: Triton's own code after layouts and software pipelines were chosen.
        ptx: the virtual machine code made of that.
        sass: the machine code of the one kind of GPU; addresses of jumps count from the first kernel of the process.
    """

    kernel: str
    registers: int
    stack: int
    shared_bytes: int
    num_warps: int
    programs: int
    ttgir: str
    ptx: str
    sass: str


Matrix = dict[tuple[int, str, str], list[Compiled]]
"""By compute capability, module and name of the call: the kernels that it launches."""


def compile_apart(
    capabilities: Sequence[int], out: Path, cache: Path, *, whole: bool = False, packages: Path | None = None
) -> Matrix:
    """Compiles the production calls in a process of its own.

    Args:
        capabilities: compute capabilities, 80 for 8.0.
        out: the file that the process writes.
        cache: Triton's.
        whole: all calls, not only those of `make test`.
        packages: a folder of packages that hide the installed ones, for another version of Triton.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    if packages is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.kernels.ahead_of_time", *map(str, capabilities)),
            *(f"--json={out}", *(["--whole"] if whole else [])),
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    matrix: Matrix = {}
    for record in json.loads(out.read_text()):
        place = record.pop("capability"), record.pop("module"), record.pop("call")
        matrix.setdefault(place, []).append(Compiled(**record))
    return matrix
