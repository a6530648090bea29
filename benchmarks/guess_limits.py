"""How many tokens a step can bring at most by repeating earlier ones, and how many each way of guessing brings.

    python -m benchmarks.guess_limits --out benchmarks/results/guess_limits_demo.json

On the answers of benchmarks.speculation, one at a time and with no model: what is measured is how often guesses are
right, not what they cost.  "hindsight" knows the answer, and in each step repeats the earlier tokens that go right for
longest, of all that follow an occurrence of the last token.  So nothing that repeats earlier tokens of the sequence
after its last one brings more.  The others guess as many tokens as they may, as if guesses cost nothing.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.checkpoint import DEMO
from benchmarks.speculation import WORKLOADS, workload
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.guess_memory import GuessMemory
from persimmon.server.engine.proposers import Lookup, LookupProposer

TEXTS = tuple(name for name in WORKLOADS if name != "schema")
"""The answers of "schema" are those of "json"."""

MAX_GUESSES = 64
"""Of a step, as of `--speculative-config auto`."""

Guesser = Callable[[Sequence[int]], Sequence[int]]
"""Guesses from the tokens so far at those that follow."""


def hindsight(prompt: Sequence[int], answer: Sequence[int]) -> Guesser:
    """Knows the answer, and repeats what goes right for longest."""
    whole = [*prompt, *answer]

    def guess(known: Sequence[int]) -> Sequence[int]:
        end, best = len(known), 0
        for place in range(1, end):
            if whole[place - 1] != whole[end - 1]:
                continue
            length = 0
            # What goes on past the last token known is repeated from the guesses, as proposers do.
            while length < MAX_GUESSES and end + length < len(whole) and whole[place + length] == whole[end + length]:
                length += 1
            best = max(best, length)
        return whole[end : end + best]

    return guess


def lookup(own: Lookup) -> Callable[[Sequence[int], Sequence[int]], Guesser]:
    """Guesses as the engine does, without recent answers."""

    def of(prompt: Sequence[int], answer: Sequence[int]) -> Guesser:
        memory = GuessMemory(1, len(prompt) + len(answer), keeps_answers=False)
        proposer = LookupProposer(
            own, memory, prompt=memory.index(len(prompt)), prompt_length=len(prompt), max_tokens=len(answer)
        )

        def guess(known: Sequence[int]) -> Sequence[int]:
            memory.begin_step()
            return proposer.propose(known, MAX_GUESSES).token_ids

        return guess

    return of


WAYS: Mapping[str, Callable[[Sequence[int], Sequence[int]], Guesser]] = {
    "hindsight": hindsight,
    "auto": lookup(Lookup(MAX_GUESSES)),
    "suffix": lookup(Lookup(MAX_GUESSES, as_many_as_matched=True)),
    "ngram": lookup(Lookup(5, shortest=2, longest=4)),
}
"""Ways to guess, by their names."""


def steps(guesser: Guesser, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """The steps that an answer takes; the first has no guesses."""
    known, count = [*prompt, answer[0]], 1
    end = len(prompt) + len(answer)
    while len(known) < end:
        left = answer[len(known) - len(prompt) :]
        right = 0
        for guessed, token_id in zip(guesser(known), left, strict=False):
            if guessed != token_id:
                break
            right += 1
        known += left[: right + 1]
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guess_limits", description="Count the tokens that a step brings with guesses."
    )
    parser.add_argument("--answers", type=int, default=32, metavar="N", help="of each kind [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_folder(DEMO)
    results: dict[str, dict[str, float]] = {}
    print("| answers | " + " | ".join(WAYS) + " |\n| --- " + "| ---: " * len(WAYS) + "|")
    for name in TEXTS:
        asked = [workload(name, tokenizer, seed) for seed in range(arguments.answers)]
        tokens = sum(len(answer) for _, answer in asked)
        results[name] = {
            way: round(tokens / sum(steps(make(prompt, answer), prompt, answer) for prompt, answer in asked), 3)
            for way, make in WAYS.items()
        }
        print(f"| {name} | " + " | ".join(f"{own:.2f}" for own in results[name].values()) + " |")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"answers": arguments.answers, "tokens_per_step": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
