"""The engine process on a simulated GPU; started in place of `persimmon.server.entry_points.engine_main`."""

from typing import Any

from persimmon.server import entry_points


def engine_main(*arguments: Any) -> None:
    """Entry point of the process; TRITON_INTERPRET=1 has to be in its environment.

        monkeypatch.setattr("persimmon.server.embedded.engine_main", engine_main)
        async with EmbeddedServer(model=folder, kv_cache_memory="1MB", max_num_seqs=2) as server: ...

    Without `kv_cache_memory` it would ask the host for most of an H200's memory.
    """
    from tests.fake_cuda import fake_cuda
    from tests.interpreter import keep_language_patched

    keep_language_patched()
    with fake_cuda():
        entry_points.engine_main(*arguments)
