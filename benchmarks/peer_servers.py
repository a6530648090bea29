"""The servers of the comparison: how this one, vLLM's CPU build and OpenVINO GenAI are started at the same precision.

OpenVINO's pipeline needs an HTTP front and an exported model; both come from outside the repository, and the export is
made here.  Knows nothing of loads and rounds.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.instruction_sets import InstructionSet, masked_environment, view_of_checkout
from benchmarks.servers import Server

OURS, VLLM, OPENVINO = "ours", "vLLM", "OpenVINO"

NO_GUESSES: Mapping[str, Sequence[str]] = {OURS: ("--speculative-config", "off")}
"""The flags by which a program guesses no tokens; peers need none.  A random network's greedy answers repeat
themselves, so that guesses would look far too good."""

LISTEN = ("--host", "127.0.0.1", "--port", "{port}")
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

UNQUANTIZED = ("float32", "bfloat16", "float16")
QUANTIZED = ("int8", "int4")
PRECISIONS = (*UNQUANTIZED, *QUANTIZED)
OPENVINO_FORMATS = {"float32": "fp32", "bfloat16": "fp16", "float16": "fp16", "int8": "int8", "int4": "int4"}
INT4_EXPORT = ("--sym", "--group-size", "64", "--ratio", "1.0")
"""Every projection in 4 bits, symmetric in groups of 64; by default the exporter leaves some in 8 bits."""


@dataclass(frozen=True)
class Contender:
    """A server at a precision.

    Attributes:
        server: how it is started; its name is unique within a comparison.
        program: OURS, VLLM or OPENVINO.
        precision: of its weights, one of PRECISIONS.
        instructions: what it may use, for reports.
        checkpoint: the folder it serves.
        version: where its /version does not say; None where it does.
    """

    server: Server
    program: str
    precision: str
    instructions: str
    checkpoint: Path
    version: str | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return self.server.name


@dataclass(frozen=True)
class Limits:
    """What all servers are limited to, as words.

    Attributes:
        max_model_len: tokens of a sequence.
        max_num_seqs: sequences of a step.
    """

    max_model_len: str
    max_num_seqs: str

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that all three programs share."""
        return ("--max-model-len", self.max_model_len, "--max-num-seqs", self.max_num_seqs)


def our_server(environment: Mapping[str, str], flags: Sequence[str], name: str = OURS) -> Server:
    """This project's server, run by this interpreter."""
    return Server(
        name=name,
        # -P: its persimmon is PYTHONPATH's, not that of the working directory.
        program=(sys.executable, "-P", "-m", "persimmon.server.cli", "serve"),
        shown_program="persimmon serve",
        arguments=("--model", "{checkpoint}", *LISTEN, *flags),
        environment=environment,
    )


def vllm_server(command: Path, environment: Mapping[str, str], flags: Sequence[str], name: str = VLLM) -> Server:
    """VLLM's CPU build through the Transformers fallback, the only way in which it still runs Persimmon."""
    return Server(
        name=name,
        program=(str(command), "serve"),
        shown_program="vllm serve",
        arguments=("{checkpoint}", "--model-impl", "transformers", *LISTEN, *flags),
        environment={**VLLM_ENVIRONMENT, **environment},
    )


def openvino_server(
    python: Path, script: Path, environment: Mapping[str, str], flags: Sequence[str], name: str = OPENVINO
) -> Server:
    """An HTTP front of OpenVINO GenAI's continuous batching: the script, run by the interpreter that has openvino."""
    return Server(
        name=name,
        program=(str(python), str(script)),
        shown_program="openvino_serve.py",
        arguments=("--model", "{checkpoint}", *LISTEN, *flags),
        environment=environment,
    )


def precision_flags(program: str, precision: str) -> tuple[str, ...]:
    """The flags by which a program computes a checkpoint at a precision.

    OpenVINO's weights have theirs from the export; by default it would compute in bfloat16 where the processor does.
    Its defaults choose a cache of 16 bits next to float32 weights and one of 8 bits next to quantized ones, so this
    server gets the same.  vLLM keeps its own default, a cache in the type of the weights: with float16 next to float32
    its CPU build 0.32.0 answers other tokens than Transformers.
    """
    if program == OPENVINO:
        return ("--precision", "f32") if precision == "float32" else ("--kv-cache-precision", "u8")
    if precision in QUANTIZED:
        return ("--quantization", precision, "--kv-cache-dtype", "int8")
    if program == OURS and precision == "float32":
        return ("--dtype", precision, "--kv-cache-dtype", "float16")
    return ("--dtype", precision)


def export_to_openvino(python: Path, checkpoint: Path, precision: str, scratch: Path) -> Path:
    """Writes a checkpoint in OpenVINO's format, by the exporter that is installed next to the interpreter.

    An export that is already in `scratch` is used again.

    Returns:
        The folder.

    Raises:
        subprocess.CalledProcessError: the exporter failed; what it printed has been shown.
    """
    weights = OPENVINO_FORMATS[precision]
    folder = scratch / f"{checkpoint.name}-openvino-{weights}"
    if folder.exists():
        return folder
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    exporter = python.parent / "optimum-cli"
    command = [str(exporter), "export", "openvino", "-m", str(checkpoint), "--task", "text-generation-with-past"]
    command += ["--weight-format", weights, *(INT4_EXPORT if weights == "int4" else ()), str(unfinished)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    unfinished.rename(folder)
    return folder


def openvino_version(python: Path) -> str:
    """The version of openvino-genai that an interpreter has."""
    code = "from importlib.metadata import version; print(version('openvino-genai'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Installed:
    """What is installed on this machine, and how each program is run besides what a comparison says.

    Attributes:
        vllm: its command, VENV/bin/vllm; None where it is not measured.
        openvino: an interpreter that has openvino-genai and optimum-intel, VENV/bin/python; None where it is not
            measured.
        openvino_script: the HTTP front; None likewise.
        environments: variables for each program, by its name.
        flags: more flags for each program, by its name.
    """

    vllm: Path | None = None
    openvino: Path | None = None
    openvino_script: Path | None = None
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Field:
    """Makes the contenders of a comparison.

    Attributes:
        installed: what there is to measure.
        checkpoint: in Hugging Face layout.
        limits: of all servers.
        level: the instructions that all may use.
        scratch: an existing folder for exports and compiled files.
        several: whether a comparison has several precisions, which names then carry.
    """

    installed: Installed
    checkpoint: Path
    limits: Limits
    level: InstructionSet
    scratch: Path
    several: bool = False

    def contenders(self, precision: str) -> list[Contender]:
        """All servers of one precision, this one first; vLLM, which quantizes nothing itself, only in UNQUANTIZED.

        vLLM runs twice: by default it leaves its worker one of two cores.

        Raises:
            LookupError: no build of the C kernels is within the level.
            subprocess.CalledProcessError: an export, or the compiler, failed.
        """
        mask = masked_environment(self.level, self.scratch)
        found = [self._ours(precision, mask)]
        if self.installed.vllm is not None and precision in UNQUANTIZED:
            found += [self._vllm(self.installed.vllm, precision, mask, every_core=each) for each in (False, True)]
        if self.installed.openvino is not None and self.installed.openvino_script is not None:
            found.append(self._openvino(self.installed.openvino, self.installed.openvino_script, precision, mask))
        return found

    def _ours(self, precision: str, mask: Mapping[str, str]) -> Contender:
        build = self.level.build
        view = self.scratch / f"only-{build}"
        shutil.rmtree(view, ignore_errors=True)
        path = {"PYTHONPATH": str(view_of_checkout(view, build))}
        return Contender(
            server=our_server(
                {**self._environment(OURS, mask), **path}, self._flags(OURS, precision), self._name(OURS, precision)
            ),
            program=OURS,
            precision=precision,
            instructions=f"{self.level.name}, C kernels built for {build}",
            checkpoint=self.checkpoint,
        )

    def _vllm(self, command: Path, precision: str, mask: Mapping[str, str], *, every_core: bool) -> Contender:
        reserved = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"} if every_core else {}
        return Contender(
            server=vllm_server(
                command=command,
                environment={**self._environment(VLLM, mask), **reserved},
                flags=self._flags(VLLM, precision),
                name=self._name(f"{VLLM}, all cores" if every_core else VLLM, precision),
            ),
            program=VLLM,
            precision=precision,
            instructions=self.level.name,
            checkpoint=self.checkpoint,
        )

    def _openvino(self, python: Path, script: Path, precision: str, mask: Mapping[str, str]) -> Contender:
        return Contender(
            server=openvino_server(
                python=python,
                script=script,
                environment=self._environment(OPENVINO, mask),
                flags=self._flags(OPENVINO, precision),
                name=self._name(OPENVINO, precision),
            ),
            program=OPENVINO,
            precision=precision,
            instructions=self.level.name,
            checkpoint=export_to_openvino(python, self.checkpoint, precision, self.scratch),
            version=openvino_version(python),
        )

    def _environment(self, program: str, mask: Mapping[str, str]) -> dict[str, str]:
        return {**mask, **self.installed.environments.get(program, {})}

    def _flags(self, program: str, precision: str) -> tuple[str, ...]:
        flags = (*precision_flags(program, precision), *self.limits.flags, *self.installed.flags.get(program, ()))
        # A server's arguments are filled in by str.format.
        return tuple(flag.replace("{", "{{").replace("}", "}}") for flag in flags)

    def _name(self, program: str, precision: str) -> str:
        return f"{program} {precision}" if self.several else program
