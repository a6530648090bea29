"""Programs for people who work on the project; the server does not use them."""

import sys
from pathlib import Path

# Python puts the folder that it is started in, and those of PYTHONPATH, first. In the repository, `kernels` there would
# hide the package of that name by Hugging Face, which Transformers imports where it is installed.
_ROOT = str(Path(__file__).parents[1])
if (_OTHERS := [entry for entry in sys.path if entry not in ("", _ROOT)]) != sys.path:
    sys.path[:] = [*_OTHERS, _ROOT]
