"""What the figures of docs/ come from: each program prints a table and writes JSON."""

import sys
from pathlib import Path

# Python puts the folder that it is started in, and those of PYTHONPATH, first. For the repository's root, `kernels` would
# then be the folder of that name and not Hugging Face's package, which Transformers imports where it is installed.
_ROOT = str(Path(__file__).parents[1])
if (_OTHERS := [entry for entry in sys.path if entry not in ("", _ROOT)]) != sys.path:
    sys.path[:] = [*_OTHERS, _ROOT]
