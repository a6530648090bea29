import errno
import os
import resource
import subprocess
import sys

import pytest
import zmq

from persimmon.server.shortage import MAX_OPEN_FILES, OWN_FILES, shortage, too_few_files


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("std::bad_alloc"), "Cannot allocate memory"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (zmq.ZMQError(errno.EMFILE), "Too many open files"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            "libtorch_cpu.so: failed to map segment from shared object",
        ),
        (OSError(errno.EACCES, "Permission denied"), None),
        (ImportError("No module named 'torch'"), None),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_errors_for_want_of_resources_are_told_from_others(error, reason):
    assert shortage(error) == reason


def test_a_limit_on_open_files_that_is_too_low_is_a_warning_with_the_numbers():
    assert too_few_files(1024, 1024 - OWN_FILES, 1) is None
    assert too_few_files(1024, 1280, 2) is None
    warning = too_few_files(1024, 1280, 1)
    assert warning is not None
    for text in ("at most 1024 files", "about 984 connections", "1280 sequences", "--max-num-queued-reqs 984"):
        assert text in warning


def test_the_limit_on_open_files_is_raised_as_far_as_it_may():
    program = "from persimmon.server.shortage import raise_open_files; print(raise_open_files())"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reported = subprocess.run(
        ["sh", "-c", f'ulimit -S -n 64; exec {sys.executable} -c "{program}"'],
        env=os.environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert int(reported.stdout) == (MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES))
