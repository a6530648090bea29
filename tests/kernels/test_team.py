"""The team of threads of the C kernels under ThreadSanitizer, which reports every order that rests on luck."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

TEAM = Path(__file__).parents[2] / "kernels" / "cpu" / "team.h"
STRESS = Path(__file__).with_name("team_stress.c")
COMPILER = shutil.which("cc")
FOUND_BY_SANITIZER, FOUND_BY_PROGRAM = 66, 1
"""Exit codes: ThreadSanitizer's own, and that of team_stress.c."""

SLOW_WRITER = {
    "        atomic_store_explicit(&phase->next, (uint64_t)number << 32,": (
        "        if (number % 8 == 1) usleep(50);\n        atomic_store_explicit(&phase->next, (uint64_t)number << 32,"
    ),
    "        const uint32_t parts = atomic_load_explicit(&phase->parts,": (
        "        if (thread && number % 8 == 7) usleep(100);\n"
        "        const uint32_t parts = atomic_load_explicit(&phase->parts,"
    ),
}
"""Takes threads off their cores where it is most dangerous: one that writes a phase, and late ones that come to it."""

FAULTS: Mapping[str, tuple[Mapping[str, str], set[int]]] = {
    "a part is done without release": (
        {
            "atomic_fetch_add(&phase->done, 1)": ("atomic_fetch_add_explicit(&phase->done, 1, memory_order_relaxed)"),
        },
        {FOUND_BY_SANITIZER},
    ),
    "the end of a phase is seen without acquire": (
        {
            "done = atomic_load_explicit(&phase->done, memory_order_acquire)": (
                "done = atomic_load_explicit(&phase->done, memory_order_relaxed)"
            ),
        },
        {FOUND_BY_SANITIZER},
    ),
    "a field of the work is plain": (
        {
            "atomic_store_explicit(&team.context, work->context, memory_order_release)": (
                "*(const void **)&team.context = work->context"
            ),
        },
        {FOUND_BY_SANITIZER},
    ),
    "parts change while the phase is still the last work's": (
        {
            **SLOW_WRITER,
            "atomic_store_explicit(&phase->next, (uint64_t)(number - 1) << 32, memory_order_release);": "",
        },
        # A part that is done twice is also a race on what it writes.
        {FOUND_BY_PROGRAM, FOUND_BY_SANITIZER},
    ),
}


def compile_with(sources: Path, folder: Path, flags: tuple[str, ...] = ()) -> Path | str:
    """The program, or what the compiler says."""
    if COMPILER is None:
        return "no C compiler"
    program = folder / "program"
    command = [COMPILER, "-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-pthread", "-fsanitize=thread", *flags]
    made = subprocess.run([*command, str(sources), "-o", str(program)], capture_output=True, text=True)
    return program if made.returncode == 0 else made.stderr


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TSAN_OPTIONS": f"halt_on_error=1 exitcode={FOUND_BY_SANITIZER}"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", autouse=True)
def sanitizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where no program with ThreadSanitizer can be made, or run: it needs its own layout of the address space."""
    folder: Path = tmp_path_factory.mktemp("sanitizer")
    source = folder / "nothing.c"
    source.write_text("int main(void) { return 0; }\n")
    program = compile_with(source, folder)
    if isinstance(program, str):
        pytest.skip(f"ThreadSanitizer is not available: {program}")
    ran = run(program)
    if ran.returncode:
        pytest.skip(f"ThreadSanitizer does not run here: {ran.stderr}")


def stress(
    folder: Path, changes: Mapping[str, str], pieces: int = 2000, runs: int = 1
) -> subprocess.CompletedProcess[str]:
    """Runs the stress test on the team with some of its text replaced, until it finds a fault or for that many runs."""
    text = TEAM.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "team.h").write_text(text)
    program = compile_with(STRESS, folder, ("-Wall", "-Wextra", "-Werror", f"-I{folder}"))
    assert isinstance(program, Path), program
    for _ in range(runs):
        ran = run(program, str(pieces))
        if ran.returncode:
            break
    return ran


@pytest.mark.parametrize("changes", [{}, SLOW_WRITER], ids=["as it is", "slow where it is dangerous"])
def test_every_part_is_done_once_and_in_order_whoever_is_late(changes: Mapping[str, str], tmp_path: Path) -> None:
    ran = stress(tmp_path, changes)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    changes, found = FAULTS[fault]
    ran = stress(tmp_path, changes, runs=50)  # which threads are late is up to the system
    reports = {FOUND_BY_SANITIZER: "data race", FOUND_BY_PROGRAM: "a part"}
    assert ran.returncode in found, ran.stderr
    assert reports[ran.returncode] in ran.stderr
