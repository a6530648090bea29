"""resolve: a folder, or a Hub id fetched from a small Hub on this machine through the real library."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from persimmon.model.errors import CheckpointError
from persimmon.model.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What each repository of the Hub holds; the files' contents are their names.
REPOSITORIES = {
    "owner/safetensors": [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "original/model.safetensors",
        "pytorch_model.bin",
        "README.md",
        "tokenizer.model",
        "tokenizer_config.json",
        "training_args.bin",
        "vocabulary_map.json",
    ],
    "owner/pickled": ["config.json", "pytorch_model.bin", "tokenizer.model", "training_args.bin", "tf_model.h5"],
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub's HTTP as a download needs."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        headers = {"X-Repo-Commit": COMMIT}
        if name == "owner/gated":
            status, content = 403, b"{}"
            headers |= {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access"}
        elif name not in REPOSITORIES:
            status, content = 404, b"{}"
            headers |= {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        elif parts[0] != "api":
            status, content = 200, "/".join(parts[4:]).encode()
            headers |= {"ETag": f'"{content.hex()}"'}
        elif "tree" in parts:
            files = [
                {"type": "file", "path": path, "size": len(path), "oid": path.encode().hex()}
                for path in REPOSITORIES[name]
            ]
            status, content = 200, json.dumps(files).encode()
        else:
            siblings = [{"rfilename": path} for path in REPOSITORIES[name]]
            status, content = 200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


Resolve = Callable[..., tuple[str, str]]


@pytest.fixture
def resolve_elsewhere(tmp_path: Path, endpoint: str) -> Resolve:
    """Resolves in another process, because huggingface_hub reads its environment variables when imported.

    Returns the folder and what the error said, one of which is empty.
    """
    program = (
        "import sys\nfrom persimmon.model.hub import resolve\nfrom persimmon.model.errors import CheckpointError\n"
        "try: print(resolve(sys.argv[1]))\nexcept CheckpointError as error: sys.exit(f'CheckpointError: {error}')"
    )

    def run(name: str, **environment: str) -> tuple[str, str]:
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGINGFACE_")) and not key.lower().endswith("_proxy")
        }
        finished = subprocess.run(
            [sys.executable, "-c", program, name],
            env=inherited | settings | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        error = finished.stderr.partition("CheckpointError: ")[2].removesuffix("\n")
        assert finished.returncode == (1 if error else 0), finished.stderr
        assert "\n" not in error
        return finished.stdout.strip(), error

    return run


def files_below(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("owner/name") == Path("owner/name")
    assert resolve("owner") == Path("owner")
    assert resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no/such", "~/no", "~nobody-here/no", "a/b/c", "/no"])
def test_path_that_does_not_exist_is_no_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    assert str(caught.value) == f"{name}: no such folder"


def test_single_word_may_have_been_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"'persimmon': no such folder, and not a valid Hugging Face Hub "
        r"id.*owner/name",
    ):
        resolve("persimmon")


def test_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; expected the folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_path_that_cannot_be_looked_at_is_named_with_the_reason() -> None:
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        resolve("/" + "a" * 300)


def test_empty_name_is_not_the_current_folder() -> None:
    with pytest.raises(CheckpointError, match="the model's name is empty"):
        resolve("")


def test_only_the_files_that_are_needed_are_fetched(resolve_elsewhere: Resolve) -> None:
    folder, _ = resolve_elsewhere("owner/safetensors")
    assert files_below(folder) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocabulary_map.json",
    ]
    assert (Path(folder) / "config.json").read_text() == "config.json"


def test_pickled_weights_are_fetched_where_there_are_no_others(resolve_elsewhere: Resolve) -> None:
    folder, _ = resolve_elsewhere("owner/pickled")
    assert files_below(folder) == ["config.json", "pytorch_model.bin", "tokenizer.model"]


def test_what_was_fetched_once_is_found_offline(resolve_elsewhere: Resolve) -> None:
    folder, _ = resolve_elsewhere("owner/pickled")
    assert resolve_elsewhere("owner/pickled", HF_HUB_OFFLINE="1")[0] == folder


def test_model_that_the_hub_does_not_have(resolve_elsewhere: Resolve, endpoint: str) -> None:
    _, error = resolve_elsewhere("owner/nothing")
    assert error == (
        f"owner/nothing: no such folder, and {endpoint}/owner/nothing does not exist; "
        "if it is private, set HF_TOKEN or run `hf auth login`"
    )


def test_gated_model_is_told_where_its_terms_are(resolve_elsewhere: Resolve, endpoint: str) -> None:
    _, error = resolve_elsewhere("owner/gated")
    assert f"{endpoint}/owner/gated is gated: accept its terms there" in error


def test_offline_says_which_variable_asked_for_it(resolve_elsewhere: Resolve) -> None:
    _, error = resolve_elsewhere("owner/safetensors", HF_HUB_OFFLINE="1")
    assert error.startswith("owner/safetensors: no such folder, and ")
    assert "HF_HUB_OFFLINE is set" in error


def test_hub_that_cannot_be_reached(resolve_elsewhere: Resolve) -> None:
    _, error = resolve_elsewhere("owner/safetensors", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9/owner/safetensors cannot be reached" in error


def test_name_that_is_no_hub_id(resolve_elsewhere: Resolve) -> None:
    _, error = resolve_elsewhere("my models/persimmon")
    assert error.startswith("my models/persimmon: no such folder, and it is not a valid Hugging Face Hub id")


def test_cache_that_cannot_be_written_is_one_line_too(resolve_elsewhere: Resolve, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the cache should be")
    _, error = resolve_elsewhere("owner/pickled")
    assert "owner/pickled cannot be fetched: " in error
