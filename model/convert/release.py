"""Which files of Adept's release matter and where they are, in a tar or unpacked.

Knows Megatron's folders.  Knows nothing of what the files hold.
"""

import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from persimmon.model.errors import CheckpointError
from persimmon.model.sentencepiece_backend import MODEL_FILES
from persimmon.model.stored import Region, small_file

_RANK = re.compile(r"mp_rank_(\d+)(_\d+)?")
_WEIGHTS = ("model_optim_rng.pt", "model_rng.pt")
_LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Release:
    """The files of one checkpoint.

    Attributes:
        ranks: the weights of each tensor-parallel rank, in order.
        vocabulary: SentencePiece's model.
    """

    ranks: tuple[Region, ...]
    vocabulary: Region

    @classmethod
    def find(cls, source: Path) -> "Release":
        """The latest iteration in a tar or a folder, with the vocabulary in it or next to it.

        Raises:
            CheckpointError: there is none, or more than one, or a part of it is missing.
        """
        regions = _regions(source)
        return cls(tuple(_rank_files(source, regions)), _vocabulary(source, regions))


def _regions(source: Path) -> dict[str, Region]:
    """The files of a release that matter, by their path, which begins with the folder's name."""
    wanted = (*_WEIGHTS, *MODEL_FILES, _LATEST)
    if source.is_dir():
        root = source.resolve()
        paths = sorted(path for path in root.rglob("*") if path.name in wanted and not path.is_dir())
        return {path.relative_to(root.parent).as_posix(): Region.of_file(path) for path in paths}
    size = Region.of_file(source).length
    try:
        with tarfile.open(source, "r:") as archive:  # the colon: not compressed, so that members are in place
            members = [member for member in archive if member.isreg() and PurePosixPath(member.name).name in wanted]
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{source} is not a tar file, or is compressed or damaged ({error}): unpack it with `tar -xf` and give "
            f"the folder"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}") from error
    for member in members:
        if member.issparse() or member.offset_data + member.size > size:
            raise CheckpointError(f"{source}: its member {member.name} is truncated or sparse: download it again")
    return {
        PurePosixPath(member.name).as_posix(): Region(
            path=source, offset=member.offset_data, length=member.size, member=member.name
        )
        for member in members
    }


def _rank_files(source: Path, regions: Mapping[str, Region]) -> list[Region]:
    """The weights of each tensor-parallel rank, in order, of the latest iteration."""
    iterations: dict[PurePosixPath, dict[int, Region]] = {}
    for path in map(PurePosixPath, regions):
        match = _RANK.fullmatch(path.parent.name)
        if path.name not in _WEIGHTS or match is None:
            continue
        if match[2] is not None:
            raise CheckpointError(
                f"{source}: {path} belongs to a pipeline-parallel checkpoint; only tensor-parallel checkpoints can be "
                f"merged"
            )
        ranks = iterations.setdefault(path.parent.parent, {})
        if int(match[1]) not in ranks or path.name == _WEIGHTS[0]:
            ranks[int(match[1])] = regions[str(path)]
    if not iterations:
        raise CheckpointError(f"{source}: no mp_rank_00/{_WEIGHTS[0]} in it, where Adept's release has its weights")
    if len(iterations) > 1:
        latest = {path.parent / _iteration_folder(regions[str(path)]) for path in _named(regions, _LATEST)}
        iterations = {folder: ranks for folder, ranks in iterations.items() if folder in latest} or iterations
    if len(iterations) > 1:
        listed = ", ".join(sorted(map(str, iterations)))
        raise CheckpointError(f"{source} holds several checkpoints ({listed}): give the folder of one")
    (ranks,) = iterations.values()
    if sorted(ranks) != list(range(len(ranks))):
        raise CheckpointError(f"{source}: tensor-parallel ranks are missing; found only {sorted(ranks)}")
    return [ranks[number] for number in range(len(ranks))]


def _named(regions: Mapping[str, Region], name: str) -> list[PurePosixPath]:
    """The paths of files of a name, those nearest to the top first."""
    paths = [path for path in map(PurePosixPath, regions) if path.name == name]
    return sorted(paths, key=lambda path: (len(path.parts), path))


def _iteration_folder(latest: Region) -> str:
    content = small_file(latest).decode(errors="replace").strip()
    return f"iter_{int(content):07d}" if content.isdecimal() and len(content) < 20 else content


def _vocabulary(source: Path, regions: Mapping[str, Region]) -> Region:
    names = tuple(reversed(MODEL_FILES))
    inside = [regions[str(path)] for name in names for path in _named(regions, name)]
    neighbours = [path for name in names if os.path.lexists(path := source.resolve().parent / name)]
    found = [*inside, *map(Region.of_file, neighbours)]
    if not found:
        raise CheckpointError(f"{source}: no {names[0]} (the tokenizer) in it or next to it")
    return found[0]
