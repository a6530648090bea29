r"""Trains the demo checkpoint: a Persimmon of 7 million parameters that answers questions about common English words.

    python -m tools.train_demo OUT --steps 2500
    python -m tools.demo_tokenizer_json OUT

Reads WordNet 3.0 (Debian's package `wordnet-base`), rewritten as short dialogues in the `human: …\n\nadept:` format.
Takes one to two hours on two CPU cores.
"""

import argparse
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from transformers import PersimmonConfig, PersimmonForCausalLM

WORDNET = Path("/usr/share/wordnet")
END_OF_TEXT = "|ENDOFTEXT|"

PARTS_OF_SPEECH = {"noun": "a noun", "verb": "a verb", "adj": "an adjective", "adv": "an adverb"}
_PART_OF_SENSE = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}

# What a user of the demo would try.
_EXTRA_NOUNS = (
    "persimmon",
    "adept",
    "transformer",
    "kernel",
    "server",
    "token",
    "attention",
    "cache",
    "triton",
    "python",
    "tensor",
    "rotary",
    "graph",
    "queue",
    "scheduler",
    "computer",
    "robot",
    "galaxy",
    "volcano",
    "penguin",
    "elephant",
    "guitar",
    "chocolate",
    "rainbow",
    "bicycle",
)

_QUESTIONS = (
    "What does {w} mean?",
    "Define {w}.",
    "define {w}",
    "What is the meaning of {w}?",
    "What does the word {w} mean?",
    "Can you define {w}?",
    "Please explain the word {w}.",
    "{w}?",
    "Tell me what {w} means.",
    "what does {w} mean",
)
_QUESTIONS_ABOUT_NOUNS = ("What is {a} {w}?", "what is {a} {w}", "What's {a} {w}?", "Tell me about {w}.")

Exchange = tuple[tuple[str, ...], str]
"""Questions of one meaning, and their answer."""

_SMALL_TALK: tuple[Exchange, ...] = (
    (
        ("Hello!", "Hi", "hello", "Hey there", "Good morning"),
        "Hello! I am a small dictionary. Ask me what a word means.",
    ),
    (
        ("Who are you?", "What are you?", "who are you", "What is your name?"),
        "I am a tiny Persimmon model with seven million parameters, trained to explain common English words.",
    ),
    (("How are you?", "How are you doing?"), "I am well, thank you. Which word shall I explain?"),
    (
        ("What can you do?", "Help", "help me", "How do I use this?"),
        'Ask me about a word. For example: "What does persimmon mean?" Then ask for a synonym or an example.',
    ),
    (("Thank you!", "thanks", "Thanks a lot"), "You are welcome. Ask me about another word."),
    (("Goodbye", "bye", "See you later"), "Goodbye!"),
    (
        ("Tell me a joke.", "Write a poem.", "What is the weather today?"),
        "I only know words. Ask me what a word means.",
    ),
)


@dataclass(frozen=True)
class Sense:
    """One meaning.

    Attributes:
        words: that have it.
        definition: without examples and remarks in parentheses.
        examples: sentences.
        kind: the offset of the sense that this one is a kind of; None where WordNet has none.
    """

    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    kind: str | None


Senses = dict[tuple[str, str], Sense]
"""By part of speech and offset."""

Offsets = dict[tuple[str, str], list[str]]
"""The offsets of a word's senses, the most frequent one first, by word and part of speech."""


def read_senses(folder: Path) -> tuple[Senses, Offsets]:
    """Reads WordNet's files."""
    senses: Senses = {}
    offsets: Offsets = {}
    for part in PARTS_OF_SPEECH:
        for line in _lines(folder / f"data.{part}"):
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            senses[part, fields[0]] = _sense(fields, gloss)
        for line in _lines(folder / f"index.{part}"):
            fields = line.split()
            offsets[fields[0].replace("_", " "), part] = fields[-int(fields[2]) :]
    return senses, offsets


def _lines(path: Path) -> list[str]:
    """A file's lines without those of its licence."""
    lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
    return [line for line in lines if not line.startswith("  ")]


def _sense(fields: list[str], gloss: str) -> Sense:
    count = int(fields[3], 16)
    words = [re.sub(r"\(.*\)", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
    pointers = fields[5 + 2 * count :]
    kinds = (target for symbol, target in zip(pointers[::4], pointers[1::4], strict=False) if symbol in ("@", "@i"))
    parts = [part.strip() for part in gloss.strip().split(";")]
    examples = [part.strip('" ') for part in parts if part.startswith('"') and part.endswith('"')]
    definition = "; ".join(part for part in parts if not part.startswith('"'))
    definition = re.sub(r"\s*\([^)]*\)\s*", " ", definition).strip()
    return Sense(words=tuple(words), definition=definition, examples=tuple(examples), kind=next(kinds, None))


def common_words(folder: Path, offsets: Offsets, count: int) -> list[tuple[str, str]]:
    """The most frequent words with their parts of speech, by WordNet's counts, after those that users would try."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, _, occurrences = line.split()
        lemma, rest = key.split("%")
        counts[lemma.replace("_", " "), _PART_OF_SENSE[rest[0]]] += int(occurrences)
    plain = [key for key in counts if key in offsets and re.fullmatch(r"[a-z]+( [a-z]+)?", key[0]) and len(key[0]) > 2]
    ranked = sorted(plain, key=lambda key: -counts[key])
    extra = [(word, "noun") for word in _EXTRA_NOUNS if (word, "noun") in offsets]
    return list(dict.fromkeys(extra + ranked))[:count]


class Dialogues:
    """Random dialogues about words.

    Args:
        folder: WordNet's.
        words: how many words with a part of speech to know.
        seed: the same one gives the same dialogues.
    """

    def __init__(self, folder: Path, words: int, seed: int = 0) -> None:
        self._senses, self._offsets = read_senses(folder)
        self._random = random.Random(seed)
        # One answer for each word: of its most frequent part of speech.
        self._parts: dict[str, str] = {}
        for word, part in common_words(folder, self._offsets, words):
            self._parts.setdefault(word, part)
        self._words = sorted(self._parts)

    def __len__(self) -> int:
        return len(self._words)

    def sample(self) -> str:
        """One dialogue."""
        draw = self._random
        if draw.random() < 0.04:
            return self._written([self._small_talk()])
        turns = [self._small_talk()] if draw.random() < 0.08 else []
        word = draw.choice(self._words)
        questions = _QUESTIONS + (_QUESTIONS_ABOUT_NOUNS if self._parts[word] == "noun" else ())
        article = "an" if word[0] in "aeiou" else "a"
        turns.append((draw.choice(questions).format(w=word, a=article), self._definition(word)))
        later = self._later_exchanges(word)
        draw.shuffle(later)
        for asked, answer in later[: draw.choice([0, 0, 0, 1, 1, 2])]:
            turns.append((draw.choice(asked), answer))
        return self._written(turns)

    def _small_talk(self) -> tuple[str, str]:
        asked, answer = self._random.choice(_SMALL_TALK)
        return self._random.choice(asked), answer

    @staticmethod
    def _written(turns: list[tuple[str, str]]) -> str:
        return "\n\n".join(f"human: {question}\n\nadept: {answer}" for question, answer in turns)

    def _sense(self, word: str) -> Sense:
        part = self._parts[word]
        return self._senses[part, self._offsets[word, part][0]]

    def _definition(self, word: str) -> str:
        part = PARTS_OF_SPEECH[self._parts[word]]
        return f'"{word.capitalize()}" is {part}. It means {self._sense(word).definition}.'

    def _later_exchanges(self, word: str) -> list[Exchange]:
        """What can only be answered by a model that remembers the word."""
        part, sense = self._parts[word], self._sense(word)
        exchanges: list[Exchange] = [
            (
                ("What part of speech is it?", "Is it a noun or a verb?"),
                f'"{word.capitalize()}" is {PARTS_OF_SPEECH[part]}.',
            )
        ]
        synonym = next((other for other in sense.words if other.lower() != word), None)
        known = f'A synonym of "{word}" is "{synonym}".' if synonym else f'I do not know a synonym of "{word}".'
        exchanges.append((("Give me a synonym.", "What is another word for it?", "synonym?"), known))
        if sense.examples:
            asked = ("Use it in a sentence.", "Give me an example.", "example?")
            exchanges.append((asked, f'For example: "{sense.examples[0]}".'))
        if sense.kind is not None and (part, sense.kind) in self._senses:
            kind = self._senses[part, sense.kind].words[0]
            exchanges.append(
                (("What kind of thing is it?", "Is it a kind of something?"), f'It is a kind of "{kind}".')
            )
        return exchanges


def train_tokenizer(dialogues: Dialogues, folder: Path, vocab_size: int) -> "sentencepiece.SentencePieceProcessor":
    """Trains a SentencePiece model on dialogues and writes it as tokenizer.model."""
    text = folder / "corpus.txt"
    with text.open("w") as file:
        for _ in range(60_000):
            file.write(dialogues.sample().replace("\n\n", "\n") + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "sp"),
        vocab_size=vocab_size,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        control_symbols=[END_OF_TEXT],
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "sp.model").rename(folder / "tokenizer.model")
    for name in ("sp.vocab", "corpus.txt"):
        (folder / name).unlink()
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


def train(out: Path, sizes: Mapping[str, int], learning_rate: float) -> None:
    """Trains tokenizer and network, and writes them.

    Args:
        out: an existing folder.
        sizes: the whole numbers of the command line, by their names.
        learning_rate: the highest one.
    """
    torch.manual_seed(0)
    dialogues = Dialogues(WORDNET, sizes["words"])
    tokenizer = train_tokenizer(dialogues, out, sizes["vocab"])
    end = tokenizer.piece_to_id(END_OF_TEXT)
    hidden = sizes["hidden"]
    config = PersimmonConfig(
        vocab_size=sizes["vocab"],
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=end,
        eos_token_id=end,
        rope_parameters={"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
    )
    config._attn_implementation = "sdpa"
    model = PersimmonForCausalLM(config)
    parameters = list(model.parameters())
    print(f"{sum(each.numel() for each in parameters) / 1e6:.2f}M parameters, {len(dialogues)} words", flush=True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.1},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )
    steps, batch, length = sizes["steps"], sizes["batch"], sizes["length"]
    stream: list[int] = [end]
    started = time.monotonic()
    for step in range(steps):
        tokens = batch * (length + 1)
        while len(stream) < tokens:
            stream += [*tokenizer.encode(dialogues.sample()), end]
        rows = torch.tensor(stream[:tokens]).view(batch, length + 1)
        stream = stream[tokens:]
        rate = learning_rate * min(1, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            speed = (step + 1) * batch * length / (time.monotonic() - started)
            print(f"step {step} loss {loss.item():.3f} lr {rate:.2e} {speed:.0f} tok/s", flush=True)
        if step % 1000 == 999 or step == steps - 1:
            model.half().save_pretrained(out)
            model.float()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains the demo checkpoint.")
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    numbers = {"steps": 2400, "words": 5000, "vocab": 4096, "hidden": 256, "layers": 6, "batch": 32, "length": 256}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="[default: %(default)s]")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate [default: %(default)s]")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out, {name: getattr(arguments, name) for name in numbers}, arguments.lr)


if __name__ == "__main__":
    main()
