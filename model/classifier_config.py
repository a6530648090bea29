"""What config.json says of a classifier: its labels, what it was trained for, its padding.  Imports no torch."""

from typing import Literal, cast, get_args

from persimmon.model.json_object import JsonObject

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

MAX_LABELS = 1 << 20
"""More labels than this are a mistake in the file, which is found here before a name is made for each."""


def read_labels(file: JsonObject) -> tuple[str, ...]:
    """A classifier's labels in the order of their numbers.

    Transformers writes id2label unless there are two labels with the names it gives by itself, LABEL_0 and LABEL_1.
    """
    stored = file.table("id2label")
    count = None if file.values.get("num_labels") is None else file.positive_integer("num_labels")
    if count is not None and count > MAX_LABELS:
        raise file.error("num_labels", f"at most {MAX_LABELS}")
    if stored is None:
        return tuple(f"LABEL_{number}" for number in range(count or 2))
    names = [stored.text(str(number)) for number in range(len(stored.values))]
    labels = tuple(name for name in names if name is not None)
    if not labels or len(labels) < len(names):
        raise file.error("id2label", "a name for each number from 0 on, without gaps")
    if count not in (None, len(labels)):
        raise file.error("num_labels", f"{len(labels)}, the number of labels in id2label")
    return labels


def read_problem_type(file: JsonObject) -> ProblemType | None:
    """What a classifier was trained for; None where the file does not say."""
    value = file.text("problem_type")
    if value is not None and value not in get_args(ProblemType):
        raise file.error("problem_type", f"one of {', '.join(get_args(ProblemType))}")
    return cast("ProblemType | None", value)


def read_pad_token_id(file: JsonObject, vocab_size: int) -> int | None:
    """A sequence classifier's padding; None where it has none."""
    token_ids = file.token_ids("pad_token_id")
    if len(token_ids) > 1 or any(token_id >= vocab_size for token_id in token_ids):
        raise file.error("pad_token_id", f"one token id below vocab_size {vocab_size}")
    return next(iter(token_ids), None)
