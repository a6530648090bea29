r"""Writes the dialogues that quantized weights are calibrated with and judged on: like the demo's, not among its own.

    python -m tools.demo_texts OUT

Three JSONL files of {"text": …}: calibration.jsonl, other draws of the dialogues that the demo was trained on;
familiar.jsonl, more of them, to judge what it has learnt; unseen.jsonl, about words that it was not trained on.  Reads
WordNet 3.0 like tools/train_demo.py.
"""

import argparse
import json
from collections.abc import Collection
from pathlib import Path

from tools.train_demo import WORDNET, Dialogues

TRAINED_WORDS = 5000
"""As in the demo's training, which drew with seed 0."""

UNSEEN_WORDS = 1000


def dialogues(folder: Path, words: int, seed: int, *, without: Collection[str] = ()) -> Dialogues:
    """A source of dialogues about the most common words, or of those that come after the words `without`."""
    source = Dialogues(folder, words, seed)
    source.drop(without)
    return source


def write(source: Dialogues, path: Path, count: int) -> None:
    """Writes `count` dialogues, no two alike."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[source.sample()] = None
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Writes the dialogues that quantized weights are judged on.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="WordNet's folder [default: %(default)s]")
    parser.add_argument("--count", type=int, default=150, help="dialogues of each file [default: %(default)s]")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    trained = dialogues(arguments.wordnet, TRAINED_WORDS, seed=0).words
    for name, source in {
        "calibration": dialogues(arguments.wordnet, TRAINED_WORDS, seed=1_000_001),
        "familiar": dialogues(arguments.wordnet, TRAINED_WORDS, seed=1_000_002),
        "unseen": dialogues(arguments.wordnet, TRAINED_WORDS + UNSEEN_WORDS, seed=1_000_003, without=trained),
    }.items():
        write(source, arguments.out / f"{name}.jsonl", arguments.count)


if __name__ == "__main__":
    main()
