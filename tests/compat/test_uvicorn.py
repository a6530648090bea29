"""The oldest and the newest release of uvicorn, under the tests of connections.

server/http/transport/uvicorn_server.py rests on parts of uvicorn that it does not document.  Where the newest release
fails here, that file must follow before pyproject.toml allows the release.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
TESTS = ("transport/test_connection.py", "transport/test_exchange.py", "transport/test_body.py", "test_worker.py")


def oldest() -> str:
    """The oldest release that pyproject.toml allows."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (uvicorn,) = (each for each in map(Requirement, project["dependencies"]) if each.name == "uvicorn")
    (lower,) = (each for each in uvicorn.specifier if each.operator == ">=")
    return f"uvicorn=={lower.version}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", [oldest(), "uvicorn"], ids=["oldest", "newest"])
def test_connections_work_with_a_release(release: str, tmp_path: Path) -> None:
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), release)
    subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPOSITORY)))}
    shown = subprocess.run(
        (sys.executable, "-c", "import uvicorn; print(uvicorn.__file__, uvicorn.__version__)"),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    used, version = shown.stdout.split()
    assert Path(used).is_relative_to(tmp_path)
    tests = (str(REPOSITORY / "tests" / "server" / "http" / name) for name in TESTS)
    run = subprocess.run((sys.executable, "-m", "pytest", *tests), env=environment, cwd=REPOSITORY, check=False)
    assert run.returncode == 0, f"the tests of connections fail with uvicorn {version}"
