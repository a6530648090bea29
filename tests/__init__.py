import sys
from pathlib import Path

# Python puts the folder that it is started in first. From the repository's root, `kernels` would then be the folder of
# that name and not Hugging Face's package, which Transformers imports where it is installed.
_ROOT = str(Path(__file__).parents[1])
if sys.path[0] in ("", _ROOT):
    sys.path.append(sys.path.pop(0))
