import contextlib
import logging
import os
import resource

from persimmon.server.http.heartbeat import REPEAT_SECONDS, DescriptorWatch


def test_a_lack_of_descriptors_is_logged_once_in_a_while(caplog):
    now = [0.0]
    watch = DescriptorWatch(lambda: now[0])
    watch.look()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack, caplog.at_level(logging.ERROR):
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        lowest = os.dup(2)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        for now[0] in (0.0, 1.0, REPEAT_SECONDS - 1):
            watch.look()
        assert len(caplog.records) == 1
        assert f"limited to {lowest} open files and connections" in caplog.text
        now[0] = REPEAT_SECONDS
        watch.look()
        assert len(caplog.records) == 2
    watch.look()
    assert len(caplog.records) == 2
