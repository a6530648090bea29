"""What a command does before it imports anything, in processes of their own."""

import os
import signal
import subprocess
import sys

import pytest

WAITING = """
import signal, sys
from persimmon.server.console import interruptible, quiet_end, standard_streams

standard_streams()
with quiet_end():
    print("ready", flush=True)
    try:
        {block}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def waiting(block: str) -> subprocess.Popen[str]:
    """A process that waits for a signal."""
    program = WAITING.format(block=block)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_without_a_traceback(number):
    process = waiting("signal.pause()")
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -number


def test_a_command_that_has_something_to_keep_is_interrupted_instead():
    process = waiting("with interruptible(): print('working', flush=True); signal.pause()")
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("interrupted\n", "")
    assert process.returncode == 0


def test_closed_standard_streams_are_opened_so_that_no_file_takes_their_place():
    program = (
        "import os\n"
        "from persimmon.server.console import standard_streams\n"
        "standard_streams()\n"
        "first = os.open('/dev/zero', os.O_RDONLY)\n"
        "null = os.stat('/dev/null')\n"
        "os._exit(first if all(os.path.samestat(os.fstat(number), null) for number in range(3)) else 1)"
    )
    closed = f'exec {sys.executable} -c "$PROGRAM" <&- >&- 2>&-'
    ended = subprocess.run(["sh", "-c", closed], env=os.environ | {"PROGRAM": program}, timeout=60, check=False)
    assert ended.returncode == 3
