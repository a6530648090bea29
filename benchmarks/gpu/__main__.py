"""`python -m benchmarks.gpu`: see `benchmarks.gpu.cli`."""

import sys

from benchmarks.gpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
