"""A conversion -> the same one without the rows of unused token ids, and with the map from ids to rows.

Knows which tensors have a row for each id and which files hold ids.  Reads no tensor.

Adept says that its models have 70,000 unused embeddings (adept.ai/blog/persimmon-8b), not which.  A public tool drops
ids 3 to 70002 (github.com/phillip-kravtsov/fine-tune-fuyu, scripts/surgery.py), and a model that was cut so has the
numbers 0, 1, 2 and so on right after (github.com/EleutherAI/lm-evaluation-harness, issue 1297), which texts need.
Whether the 70,000 are control or user-defined pieces is not known here: control pieces are found, user-defined ones
have to be requested.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from persimmon.model.config import PersimmonConfig, check_vocabulary
from persimmon.model.convert.sources import SelectedRows
from persimmon.model.convert.unused_ids import Vocabulary, runs_of
from persimmon.model.convert.writer import Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.tokenizer_json import TOKENIZER_JSON
from persimmon.model.vocabulary import VOCABULARY_FILE, VocabularyMap

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_FILES_WITH_IDS = ("config.json", "generation_config.json")

# Triton compiles for a number of rows that is divisible by 16 if it is, and reads 16 bytes of logits at a time then.
_DROPPED_TOGETHER = 16


def trim_vocabulary(
    conversion: Conversion, drop_ids: Sequence[range] | None, print_line: Callable[[str], None]
) -> Conversion:
    """The conversion with fewer rows in the embedding and in lm_head.

    Ids are dropped 16 at a time, the last of the unused ones, so that the number of rows stays as divisible as before.
    config.json and generation_config.json then hold rows where they held ids.  The tokenizer's files stay as they are,
    and VOCABULARY_FILE says which ids the rows are; it is not written if the remaining ids equal their rows and none of
    the dropped ids is the tokenizer's.

    Args:
        conversion: of a checkpoint.
        drop_ids: ranges of the token ids to drop; None for those that the checkpoint's files show to be unused.
        print_line: takes lines that say what is dropped and why.

    Raises:
        CheckpointError: there is no tokenizer.model or tokenizer.json has other pieces, the vocabulary is trimmed
            already, nothing is unused, or an id that was asked for may not be dropped.
    """
    source, config = str(conversion.origin["source"]), conversion.config
    if VOCABULARY_FILE in conversion.files:
        raise CheckpointError(f"{source}: its vocabulary is already trimmed; see {VOCABULARY_FILE}")
    vocabulary = Vocabulary(source, conversion.files, config)
    check_vocabulary(Path(source), config, vocabulary.pieces)
    if TOKENIZER_JSON in conversion.files:
        _follow(vocabulary, Path(source))
    reasons = vocabulary.unused() if drop_ids is None else {"requested ids": _ids(drop_ids, vocabulary)}
    unused = sorted(id for ids in reasons.values() for id in ids)
    dropped = frozenset(unused[len(unused) % _DROPPED_TOGETHER :])
    lines = [f"{len(ids):,} {reason}: {vocabulary.describe(ids)}" for reason, ids in reasons.items()]
    if len(dropped) < len(unused):
        lines.append(
            f"{len(unused) - len(dropped)} of these are kept, because rows are dropped {_DROPPED_TOGETHER} at a time"
        )
    if drop_ids is None and (spelled := vocabulary.spelled()):
        lines.append(
            f"{len(spelled):,} user-defined pieces are kept, because text that spells them is tokenized to them: "
            f"{vocabulary.describe(spelled)} (use --drop-ids to drop ids that you know to be unused)"
        )
    if not dropped:
        found = "none" if not unused else "too few"
        message = f"{source}: {found} of its {config.vocab_size:,} token ids are unused; there is nothing to trim"
        raise CheckpointError("; ".join([message, *lines]))
    kept = VocabularyMap(config.vocab_size, runs_of(id for id in range(config.vocab_size) if id not in dropped))
    trimmed = _trimmed(conversion, kept, vocabulary.pieces)
    saved = (conversion.total_bytes - trimmed.total_bytes) / 2**30
    print_line(f"{source}: dropping {len(dropped):,} of {config.vocab_size:,} token ids saves {saved:.2f} GiB")
    for line in lines:
        print_line(f"  {line}")
    return trimmed


def _follow(vocabulary: Vocabulary, source: Path) -> None:
    try:
        tokenizer = Tokenizer.from_folder(source)
    except CheckpointError:
        return  # of files that no server takes; the conversion reports it
    vocabulary.follow(tokenizer)


def _ids(ranges: Sequence[range], vocabulary: Vocabulary) -> list[int]:
    vocabulary.check_may_go(itertools.chain.from_iterable(ranges))
    return sorted({*itertools.chain.from_iterable(ranges)})


def _trimmed(conversion: Conversion, vocabulary: VocabularyMap, pieces: int) -> Conversion:
    config = vocabulary.trimmed(conversion.config)
    tensors = {
        name: SelectedRows(tensor, vocabulary.kept_ids) if name in _TABLES else tensor
        for name, tensor in conversion.tensors.items()
    }
    files = {
        name: _in_rows(content, vocabulary, config) if name in _FILES_WITH_IDS else content
        for name, content in conversion.files.items()
    }
    files["config.json"] = _config_json(files["config.json"], config)
    if vocabulary.kept_ids != (range(config.vocab_size),) or pieces > config.vocab_size:
        files[VOCABULARY_FILE] = _json(vocabulary.content)
    origin = {**conversion.origin, "kept_ids": vocabulary.content["kept_ids"]}
    return replace(conversion, origin=origin, config=config, tensors=tensors, files=files)


def _config_json(content: bytes, config: PersimmonConfig) -> bytes:
    values = json.loads(content)
    for network in (values, values.get("text_config")):
        if network is not None:
            network["vocab_size"] = config.vocab_size
    if config.vision is not None:
        # Older files leave it out, where it is an id of the whole vocabulary.
        values["image_token_id"] = config.vision.image_token_id
    return _json(values)


def _in_rows(content: bytes, vocabulary: VocabularyMap, config: PersimmonConfig) -> bytes:
    """A file with rows for token ids.

    What begins and ends a text is what `PersimmonConfig` has made of all files together: it knows a whole vocabulary
    of Adept's by its size, which is another one now.
    """

    def row_of(token_id: Any) -> Any:
        return vocabulary.to_rows([token_id])[0] if type(token_id) is int and vocabulary.kept(token_id) else token_id

    values = json.loads(content)
    for network in (values, values.get("text_config") or {}):
        for key, value in network.items():
            if key.endswith("_token_id"):
                network[key] = [*map(row_of, value)] if isinstance(value, list) else row_of(value)
    ends = config.eos_token_ids
    values["bos_token_id"] = config.bos_token_id
    values["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends), None)
    return _json(values)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
