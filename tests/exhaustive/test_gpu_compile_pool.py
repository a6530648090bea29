"""What the GPU suite compiles ahead lies in Triton's cache for the next process.

Not in `make test`, because Triton takes about half a second of processor time for each kernel.
"""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from benchmarks.gpu import compile_pool
from benchmarks.gpu.compile_jobs import jobs_of
compile_pool._start(90)
print(compile_pool._compile("tiny", jobs_of("tiny", "smoke")[0]))
"""


def compiled(cache: Path) -> tuple[int, set[Path]]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout), set(cache.rglob("*.cubin"))


def test_a_second_process_finds_what_the_first_has_compiled(tmp_path: Path) -> None:
    count, files = compiled(tmp_path)
    assert count == len(files) > 5
    assert compiled(tmp_path) == (count, files)
