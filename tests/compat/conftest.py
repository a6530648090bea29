"""Programs of other people against a live server; `make compat` installs them and runs this.

No program here may reach the network; settings for that are made before it is imported.  Only test_uvicorn.py
fetches something: releases of uvicorn, from the package index.
"""

import base64
import io
import os
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.end_to_end.canary import Canary
from tests.end_to_end.serving import Server, serving
from tests.fuyu import make_fuyu

os.environ |= {
    "HF_HUB_OFFLINE": "1",  # lm-eval, its data sets and Transformers: everything is in local files
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # instead of a newer price list from the network
}


@pytest.fixture(scope="session")
def demo() -> Iterator[Server]:
    """The server with the demo checkpoint, as `make serve` starts it, and a cache small enough to be fought over."""
    with serving("--kv-cache-memory", "64MB") as server:
        yield server


@pytest.fixture(scope="session")
def fuyu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with a small random checkpoint that reads images."""
    checkpoint = make_fuyu(tmp_path_factory.mktemp("fuyu"))
    with serving("--model", str(checkpoint), "--kv-cache-memory", "26MB") as server:
        yield server


@pytest.fixture(scope="session")
def picture() -> str:
    """A data: URL of an image with six patches."""
    file = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture
def canary(demo: Server) -> Iterator[Canary]:
    """Fails the test in the end if the server no longer answers what it did, or is no longer the same processes."""
    canary = Canary(demo)
    yield canary
    canary.check()
    canary.close()
