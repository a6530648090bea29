"""Which errors say that the system's limits leave a process too little, and the limit on open files."""

import errno
import os
import resource

MAX_OPEN_FILES = 1 << 20
"""Upper bound of the limit that is set; without any limit, some programs try to close every possible descriptor."""

OWN_FILES = 40
"""What an API worker has open besides its clients' connections, rounded up."""

ADVICE = "check the limits on memory, processes and open files (ulimit -a, and the container's or service's limits)"
"""What to do; the end of an error's line."""

_NUMBERS = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_SENTENCES = (
    "failed to map segment from shared object",  # the dynamic loader's, where memory for a library is missing
    "cannot allocate memory",
    "can't start new thread",
)


def shortage(error: BaseException) -> str | None:
    """What the system did not give, where that is what an error says; else None."""
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    number = getattr(error, "errno", None)  # OSError's and ZeroMQ's
    if number in _NUMBERS:
        return os.strerror(number)
    text = str(error)
    if isinstance(error, ImportError | RuntimeError) and any(each in text.lower() for each in _SENTENCES):
        return text.splitlines()[0]
    return None


def raise_open_files() -> int:
    """Raises this process's limit on open files as far as it may itself, for its children too; what it is now.

    Systems keep the usual limit at 1,024 for programs that use select(2), and expect servers to raise it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def too_few_files(limit: int, sequences: int, workers: int) -> str | None:
    """A warning where the limit on open files is lower than the limit on sequences asks for; else None.

    Args:
        limit: on open files of one process.
        sequences: that may be in the server at once, each perhaps with a connection of its own.
        workers: API workers, over which connections are spread.
    """
    connections = workers * max(limit - OWN_FILES, 0)
    if connections >= sequences:
        return None
    return (
        f"a process may open at most {limit} files (ulimit -n), enough for about {connections} connections, but "
        f"--max-num-queued-reqs allows {sequences} sequences. Further connections are closed: raise the limit or give "
        f"--max-num-queued-reqs {max(connections, 1)}"
    )
