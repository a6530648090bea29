"""Trains the vision demo: a Fuyu of 1.2 million parameters that says which colored shapes are in an image, and where.

    python -m tools.train_vision_demo OUT

Draws its images itself, so it needs no data.  Takes some minutes on two CPU cores.
"""

import argparse
import io
import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import FuyuConfig, FuyuForCausalLM, PreTrainedTokenizerFast
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from persimmon.model.config import VisionConfig
from persimmon.model.images import ImagePatches, ImageReader, ImageSettings

BEGIN, END, PLACEHOLDER, NEWLINE, ANSWER = "<s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<0x04>"
MAX_SIDE = 120
"""Larger images are made smaller: four patches in each direction are enough for two shapes."""

COLORS: Mapping[str, Sequence[tuple[int, int, int]]] = {
    "red": ((255, 0, 0), (210, 45, 45)),
    "green": ((0, 128, 0), (50, 170, 70)),
    "blue": ((0, 0, 255), (50, 90, 220)),
    "yellow": ((255, 255, 0), (245, 210, 40)),
    "purple": ((128, 0, 128), (150, 60, 190)),
    "orange": ((255, 165, 0), (250, 130, 30)),
    "black": ((0, 0, 0), (45, 45, 45)),
}
"""Two shades of each, between which others lie."""

SHAPES = ("circle", "square", "triangle")

_QUESTIONS = (
    "Describe this image.",
    "Describe the image.",
    "describe this picture",
    "What is in this image?",
    "What is in the picture?",
    "What is this?",
    "What do you see?",
    "What does the image show?",
    "Which shapes are in the image?",
    "Write a caption.",
    "Caption this image.",
    "Generate a coco-style caption.",
    "",
)
_REMARKS = ("Hello!", "Hi", "Who are you?", "What can you do?", "Tell me a story.", "How are you?", *_QUESTIONS)
_WITHOUT_IMAGE = "Send me an image of colored shapes."
_GAP = 3
"""Pixels between two shapes, at least."""


@dataclass(frozen=True)
class Figure:
    """A shape in an image.

    Attributes:
        shape: one of SHAPES.
        color: red, green and blue.
        center: in pixels from the left and from the top.
        size: width and height, in pixels.
    """

    shape: str
    color: tuple[int, ...]
    center: tuple[float, float]
    size: float


@dataclass(frozen=True)
class Example:
    """A question and its answer.

    Attributes:
        image: what it is about; None where no image was sent.
        question: the client's text.
        answer: what is to be learned.
    """

    image: Image.Image | None
    question: str
    answer: str


class Scenes:
    """Random examples.

    Args:
        seed: the same one gives the same examples.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def sample(self) -> Example:
        """One example: one or two shapes on a light background, or in a few cases no image."""
        draw = self._random
        if draw.random() < 0.04:
            return Example(None, draw.choice(_REMARKS), _WITHOUT_IMAGE)
        grey = draw.randint(240, 255) if draw.random() < 0.7 else draw.randint(205, 240)
        if draw.random() < 0.35:
            return self._one((grey,) * 3)
        return self._two((grey,) * 3)

    def _one(self, background: tuple[int, ...]) -> Example:
        draw = self._random
        width, height = (draw.randint(60, MAX_SIDE) for _ in range(2))
        size = draw.uniform(35, min(width, height) - 10)
        where = draw.uniform(size / 2, width - size / 2), draw.uniform(size / 2, height - size / 2)
        name, (shape, color) = self._shape()
        figure = Figure(shape=shape, color=color, center=where, size=size)
        image = self._picture((width, height), background, [figure])
        return Example(image, draw.choice(_QUESTIONS), f"{with_article(name, capital=True)}.")

    def _two(self, background: tuple[int, ...]) -> Example:
        """One shape left of another, or above it."""
        draw = self._random
        sizes = [draw.uniform(35, 52) for _ in range(2)]
        long, short = draw.randint(110, MAX_SIDE), draw.randint(60, MAX_SIDE)
        first = draw.uniform(sizes[0] / 2, long - sizes[1] - sizes[0] / 2 - _GAP)
        second = draw.uniform(first + sum(sizes) / 2 + _GAP, long - sizes[1] / 2)
        # Across the direction they differ less than along it.
        middle, apart = draw.uniform(0, short), 0.4 * draw.uniform(-1, 1) * (second - first)
        across = [
            min(max(middle + shift, size / 2), short - size / 2)
            for shift, size in zip((-apart / 2, apart / 2), sizes, strict=True)
        ]
        names, looks = zip(*(self._shape() for _ in range(2)), strict=True)
        horizontal = draw.random() < 0.5
        places = zip((first, second), across, strict=True) if horizontal else zip(across, (first, second), strict=True)
        image = self._picture(
            (long, short) if horizontal else (short, long),
            background,
            [
                Figure(shape=shape, color=color, center=place, size=size)
                for (shape, color), place, size in zip(looks, places, sizes, strict=True)
            ],
        )
        relation = "left of" if horizontal else "above"
        answer = f"{with_article(names[0], capital=True)} {relation} {with_article(names[1])}."
        return Example(image, draw.choice(_QUESTIONS), answer)

    def _shape(self) -> tuple[str, tuple[str, tuple[int, ...]]]:
        """Its name, and how it is painted."""
        draw = self._random
        color, shape = draw.choice(list(COLORS)), draw.choice(SHAPES)
        share = draw.random()
        one, other = COLORS[color]
        shade = tuple(
            min(255, max(0, round(share * a + (1 - share) * b) + draw.randint(-12, 12)))
            for a, b in zip(one, other, strict=True)
        )
        return f"{color} {shape}", (shape, shade)

    def _picture(self, size: tuple[int, int], background: tuple[int, ...], figures: Sequence[Figure]) -> Image.Image:
        """An image of figures, with hard or with soft edges."""
        return picture(size, background, figures, scale=self._random.choice((1, 2)))


def with_article(name: str, *, capital: bool = False) -> str:
    """A name behind "a" or "an", which may begin a sentence."""
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article.capitalize() if capital else article} {name}"


def picture(
    size: tuple[int, int], background: tuple[int, ...], figures: Sequence[Figure], scale: int = 1
) -> Image.Image:
    """Draws figures.

    Args:
        size: width and height of the image.
        background: its color.
        figures: what is on it, the first at the back.
        scale: how much larger it is drawn before it is made small, which makes edges soft.
    """
    image = Image.new("RGB", (size[0] * scale, size[1] * scale), background)
    canvas = ImageDraw.Draw(image)
    for figure in figures:
        (x, y), half = figure.center, figure.size / 2
        left, top, right, bottom = ((place * scale) for place in (x - half, y - half, x + half, y + half))
        match figure.shape:
            case "circle":
                canvas.ellipse((left, top, right, bottom), fill=figure.color)
            case "square":
                canvas.rectangle((left, top, right, bottom), fill=figure.color)
            case "triangle":
                canvas.polygon([(left, bottom), (right, bottom), (x * scale, top)], fill=figure.color)
    return image.resize(size, Image.Resampling.BILINEAR)


def make_tokenizer(folder: Path) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json, of the kind that Fuyu-8B has.

    Each word of the questions and answers has a token; all other text is spelled in letters and bytes.
    """
    answers = [*(f" an {color}" for color in COLORS), *(f" {shape}." for shape in SHAPES), " A An a left of above"]
    text = " ".join(["", *_REMARKS, _WITHOUT_IMAGE, *answers])
    words = {word.replace(" ", "▁") for word in re.findall(r" ?\w+|\S", text)}
    apart = ["<unk>", BEGIN, END, PLACEHOLDER, NEWLINE, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *map(chr, range(0x21, 0x7F))]
    pieces = [
        *((piece, 0.0) for piece in apart),
        *((letter, -10.0) for letter in letters),
        *((word, -1.0) for word in sorted(words.difference(letters))),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<unk>", BEGIN, END)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN}:0 $A:0",
        pair=f"{BEGIN}:0 $A:0 {BEGIN}:1 $B:1",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        unk_token="<unk>",  # noqa: S106 - not a password
        model_max_length=2048,
    ).save_pretrained(folder)
    return tokenizer


class Rows:
    """Examples as batches of token ids, whose images are prepared as the server prepares them.

    Args:
        tokenizer: of the model.
        settings: of its images.
        seed: of the examples.
    """

    def __init__(self, tokenizer: Tokenizer, settings: ImageSettings, seed: int) -> None:
        self._tokenizer = tokenizer
        self._reader = ImageReader(settings)
        self._scenes = Scenes(seed)
        self._ids = tokenizer.get_vocab()

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next examples.

        Returns:
            Token ids [size, longest], ended by END; the labels, -100 where nothing is to be learned; and the images'
            patches [1, patches, numbers] in float32.
        """
        examples = [self._scenes.sample() for _ in range(size)]
        images = [None if each.image is None else self._read(each.image) for each in examples]
        prompts = [self._prompt(each.question, image) for each, image in zip(examples, images, strict=True)]
        answers = [[*self._encode(each.answer), self._ids[END]] for each in examples]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        token_ids = torch.full((size, longest), self._ids[END])
        labels = torch.full((size, longest), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            token_ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        pixels = b"".join(row for image in images if image is not None for row in image.pixels)
        patches = torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(1, -1, 2700).astype(np.float32))
        return token_ids, labels, (patches / 255 - 0.5) / 0.5

    def _read(self, image: Image.Image) -> ImagePatches:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=0)
        return self._reader.read(file.getvalue())

    def _prompt(self, question: str, image: ImagePatches | None) -> list[int]:
        begin = [] if image is None else image.token_ids(self._ids[PLACEHOLDER], self._ids[NEWLINE])
        return [*begin, self._ids[BEGIN], *self._encode(f"{question}\n"), self._ids[ANSWER]]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def learning_rates(highest: float, steps: int) -> Iterator[float]:
    """Rising over the first 100 steps, then falling to a twentieth."""
    for step in range(steps):
        yield highest * min(1, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def accuracy(model: FuyuForCausalLM, rows: Rows, batches: int) -> float:
    """The share of answers every token of which is the model's best one: those that greedy decoding gives."""
    right, total = 0, 0
    with torch.no_grad():
        for _ in range(batches):
            token_ids, labels, patches = rows.batch(50)
            best = model(input_ids=token_ids, image_patches=patches, use_cache=False).logits[:, :-1].argmax(-1)
            asked = labels[:, 1:]
            right += int(((best == asked) | (asked == -100)).all(dim=1).sum())
            total += len(asked)
    return right / total


def train(out: Path, sizes: Mapping[str, int], learning_rate: float) -> None:
    """Trains the network, writes it with a tokenizer, and prints how many of 1,000 new images get the right answer.

    Args:
        out: an existing folder.
        sizes: the whole numbers of the command line, by their names.
        learning_rate: the highest one.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer(out)
    FuyuImageProcessorPil(size={"height": MAX_SIDE, "width": MAX_SIDE}).save_pretrained(out)
    ids = tokenizer.get_vocab()
    settings = ImageSettings.from_folder(out, VisionConfig(image_token_id=ids[PLACEHOLDER]))
    config = FuyuConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=sizes["hidden"],
        intermediate_size=4 * sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["hidden"] // 64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
        bos_token_id=ids[BEGIN],
        eos_token_id=ids[END],
        image_token_id=ids[PLACEHOLDER],
    )
    model = FuyuForCausalLM(config)
    parameters = list(model.parameters())
    print(f"{sum(each.numel() for each in parameters) / 1e6:.2f}M parameters", flush=True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.05},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    rows, held_out = Rows(tokenizer, settings, seed=0), Rows(tokenizer, settings, seed=1)
    started, steps = time.monotonic(), sizes["steps"]
    for step, rate in enumerate(learning_rates(learning_rate, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        token_ids, labels, patches = rows.batch(sizes["batch"])
        logits = model(input_ids=token_ids, image_patches=patches, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            print(f"step {step + 1} right answers {accuracy(model, held_out, 2):.1%}", flush=True)
            model.half().save_pretrained(out)
            model.float()
    stored = FuyuForCausalLM.from_pretrained(out, dtype=torch.float32)
    print(f"right answers to 1,000 new images: {accuracy(stored, Rows(tokenizer, settings, seed=2), 20):.1%}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains the vision demo.")
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    numbers = {"steps": 3800, "hidden": 128, "layers": 4, "batch": 32}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="[default: %(default)s]")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate [default: %(default)s]")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out, {name: getattr(arguments, name) for name in numbers}, arguments.lr)


if __name__ == "__main__":
    main()
