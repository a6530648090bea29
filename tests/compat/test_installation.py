"""The wheel, installed next to Hugging Face's `kernels` and Transformers: all three run, and no file belongs to two.

The environment is a fresh one for the wheel, on top of the tests' own packages, so nothing is fetched.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SOURCES = ("README.md", "LICENSE", "pyproject.toml", "setup.py", "persimmon", "server", "model", "kernels")
OTHERS = ("kernels", "transformers")

ALL_THREE = """
import kernels, persimmon, torch, transformers
assert callable(kernels.get_kernel)
assert persimmon.__version__ == "{version}"
config = transformers.PersimmonConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
network = transformers.PersimmonForCausalLM(config)
tokens = network.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, min_new_tokens=2, do_sample=False)
assert tokens.shape == (1, 5)
print(kernels.__file__, persimmon.__file__, sep="\\n")
"""


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel in it."""

    folder: Path
    wheel: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs one of its programs from a folder that has nothing to do with the project."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.folder / "bin" / program), *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    @property
    def files(self) -> set[str]:
        """What the wheel has installed into site-packages."""
        [record] = self.folder.glob("lib/python*/site-packages/persimmon_server-*.dist-info/RECORD")
        return {line.rpartition(",")[0].rpartition(",")[0] for line in record.read_text().splitlines()}


@pytest.fixture(scope="module")
def installation(tmp_path_factory) -> Installation:
    source, builder, folder = map(tmp_path_factory.mktemp, ("source", "builder", "installation"))
    _copy_sources(source)
    _install_setuptools(builder)
    # Without a compiler, which the C kernels are installed without too: compiling them takes most of a minute.
    _pip(builder, "wheel", "--no-build-isolation", f"--wheel-dir={source}", str(source), CC="false")
    [wheel] = source.glob("*.whl")
    venv.create(folder, with_pip=False)
    _pip(folder, "install", str(wheel))
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return Installation(folder, wheel)


def _copy_sources(to: Path) -> None:
    """Copies what an installation is made from."""
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, to / name, symlinks=True, ignore=skipped)
        else:
            shutil.copy(PROJECT / name, to)


def _pip(environment: Path, command: str, *arguments: str, **variables: str) -> None:
    """Runs the tests' own pip for another environment, without an index."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        f"{environment}/bin/python",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, command, "--no-deps", "--no-index", *arguments], env=os.environ | variables, check=True)


def _install_setuptools(environment: Path) -> None:
    """Makes an environment with setuptools only: `kernels` has a plug-in for it, which a build must not run."""
    venv.create(environment, with_pip=False)
    [packages] = environment.glob("lib/python*/site-packages")
    for file in distribution("setuptools").files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), packages / file)


def test_it_adds_one_package_and_no_file_of_another_distribution(installation):
    files = installation.files
    tops = {file.partition("/")[0] for file in files if not file.startswith("../")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"persimmon"}
    assert {"persimmon/py.typed", "persimmon/server/http/app.py", "persimmon/model/demo/config.json"} <= files
    for other in OTHERS:
        assert files.isdisjoint(str(file) for file in distribution(other).files or ())


def test_kernels_transformers_and_the_server_run_in_one_process(installation):
    version = installation.wheel.name.split("-")[1]
    ended = installation.run("python", "-c", ALL_THREE.format(version=version))
    assert ended.returncode == 0, ended.stderr
    own, ours = map(Path, ended.stdout.splitlines())
    assert own.parent.parent == Path(sysconfig.get_path("purelib"))
    assert ours.is_relative_to(installation.folder)


def test_its_commands_run_from_any_folder(installation, tmp_path):
    assert installation.run("persimmon", "--version").stdout == f"persimmon {installation.wheel.name.split('-')[1]}\n"
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "human: What does galaxy mean?\n\nadept:", "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    requests.write_text(json.dumps(line) + "\n")
    ended = installation.run("persimmon", "generate", str(requests), str(answers), "--kv-cache-memory", "64MB")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(answers.read_text())["response"]["body"]["usage"]["completion_tokens"] == 4


@pytest.mark.skipif(shutil.which("cc") is None, reason="without a C compiler nothing is compiled")
def test_an_editable_installation_compiles_only_what_has_changed(tmp_path):
    source, builder = tmp_path / "source", tmp_path / "builder"
    source.mkdir()
    _copy_sources(source)
    _install_setuptools(builder)
    folder = source / "kernels" / "cpu"
    for file in folder.glob("*.c"):
        file.write_text("")  # the kernels themselves take most of a minute

    def install() -> dict[str, int]:
        """The libraries next to their sources afterwards, and when each was compiled."""
        build = "from setuptools import build_meta; build_meta.build_editable('.')"
        subprocess.run([builder / "bin" / "python", "-c", build], cwd=source, check=True)
        return {library.name: library.stat().st_mtime_ns for library in folder.glob("*.so")}

    first = install()
    assert first
    assert install() == first
    [source_of_one] = folder.glob("avx2.c")
    source_of_one.touch()
    second = install()
    assert {name for name in first if second[name] != first[name]} == {n for n in first if n.startswith("_avx2.")}
    (folder / "tiles.h").touch()
    third = install()
    assert all(third[name] > second[name] for name in first)
