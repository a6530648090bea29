"""The entry point of the `persimmon` command.

Imports next to nothing before signals and standard streams are in order; `persimmon.server.commands.run` does the rest.
"""

import sys
from collections.abc import Sequence

from persimmon.server.console import quiet_end, standard_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Returns:
        The exit code; see `persimmon.server.commands.run.run`.
    """
    standard_streams()
    with quiet_end():
        from persimmon.server.commands.run import run  # a command imports for a second; Ctrl-C must already be quiet

        return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
