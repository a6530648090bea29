"""What the engine process is given, and what it imports."""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import trustme

from persimmon import model
from persimmon.model.config import Architecture
from persimmon.server import supervisor
from persimmon.server.children import Child
from persimmon.server.config import read_settings
from persimmon.server.engine_places import WHOLE_MACHINE, EnginePlace
from persimmon.server.entry_points import engine_main
from persimmon.server.http.endpoints.model_use import USES
from persimmon.server.settings.engine import EngineSettings

DEMO = Path(model.__path__[0]) / "demo"
HTTP_MODULES = ("fastapi", "starlette", "uvicorn", "httptools", "jinja2", "pydantic_settings", "persimmon.server.http")


def imported(program: str) -> set[str]:
    """The modules that a program has imported when it ends."""
    ended = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(ended.stdout.split())


def test_the_engine_process_imports_nothing_of_http_and_no_settings_but_its_own():
    modules = imported("import persimmon.server.engine.process")
    assert "torch" in modules
    assert modules.isdisjoint(HTTP_MODULES)
    settings = {name for name in modules if name.startswith("persimmon.server.settings.")}
    assert settings == {f"persimmon.server.settings.{name}" for name in ("engine", "logs", "section", "speculation")}
    assert "persimmon.server.config" not in modules


def test_the_engine_process_is_given_no_key_and_no_path_of_a_file_of_keys(tmp_path, monkeypatch):
    certificate = trustme.CA().issue_cert("localhost")
    paths = {name: tmp_path / f"secret-{name}" for name in ("api_key_file", "ssl_certfile", "ssl_keyfile")}
    paths["api_key_file"].write_text("alice:secret-of-alice\n")
    certificate.cert_chain_pems[0].write_to_path(paths["ssl_certfile"])
    certificate.private_key_pem.write_to_path(paths["ssl_keyfile"])
    settings = read_settings({name: str(path) for name, path in paths.items()} | {"api_key": ["secret-of-bob"]})
    given: dict[object, tuple[object, ...]] = {}

    class Recorded(Child):
        def __init__(self, *, name, title, main, arguments):
            super().__init__(name=name, title=title, main=main, arguments=arguments)
            given[main] = arguments

    monkeypatch.setattr(supervisor, "Child", Recorded)
    with supervisor._Signals(set(), ()) as signals:
        use = USES[Architecture.CAUSAL_LM]
        supervisor._Supervisor(
            settings=settings,
            folder=DEMO,
            served_model_name="demo",
            use=use,
            shares=[WHOLE_MACHINE],
            listeners=[],
            runtime=tmp_path,
            signals=signals,
        )
    pickled = bytes(ForkingPickler.dumps(given[engine_main]))
    assert b"max_num_seqs" in pickled
    assert b"secret-" not in pickled
    assert b"BEGIN" not in pickled


def test_the_engine_process_forgets_the_variables_of_settings(monkeypatch):
    monkeypatch.setenv("PERSIMMON_API_KEY", "secret")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setattr("persimmon.server.engine.process.run_engine", lambda *arguments: None)
    read, write = multiprocessing.Pipe(duplex=False)
    with read, write:
        engine_main(EngineSettings(), DEMO, EnginePlace("ipc:///unused"), write)
    assert "PERSIMMON_API_KEY" not in os.environ
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
