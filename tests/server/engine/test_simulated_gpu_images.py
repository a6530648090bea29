"""Prompts with images on a simulated GPU: tokens are those of the same kernels on a CPU."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from persimmon.kernels import launch
from persimmon.model.runner import SequenceInput
from persimmon.server.engine import loading
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import GREEDY, Harness, new_tokens
from tests.fake_cuda import fake_cuda
from tests.fake_cuda.checkpoint import write_checkpoint
from tests.fuyu import ImagePrompt, random_image
from tests.interpreter import keep_language_patched
from tests.server.engine.test_simulated_gpu import SETTINGS, harness_of, on_cpu, warm_up

SPEAKER, NEWLINE, PATCH = 9, 10, 4 * 4 * 3
PROMPT = ImagePrompt.of([5, 6], random_image(2, 7, 1, PATCH), [7, 8], speaker=SPEAKER, newline=NEWLINE)


def write_fuyu(folder: Path) -> Path:
    """The smallest checkpoint, with a projection of patches."""
    write_checkpoint(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"architectures": ["FuyuForCausalLM"], "model_type": "fuyu", "patch_size": 4, "image_token_id": SPEAKER}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, shape in (("weight", (64, PATCH)), ("bias", (64,))):
        tensors[f"model.vision_embed_tokens.{name}"] = (torch.randn(shape, generator=generator) / 4).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def one_warm_up_with_an_image(*args: Any, **named: Any) -> Iterator[list[SequenceInput]]:
    return islice((batch for batch in warm_up(*args, **named) if batch[0].patches), 1)


def outputs(harness: Harness) -> list[list[int]]:
    """Of two prompts that share their image's blocks, and of one with other pixels."""
    other = ImagePrompt.of([5, 6], random_image(2, 7, 2, PATCH), [7, 8], speaker=SPEAKER, newline=NEWLINE)
    sequences = [
        Sequence(number, list(prompt.token_ids), 4, sampling=GREEDY, spans=prompt.spans)
        for number, prompt in enumerate((PROMPT, PROMPT, other))
    ]
    harness.run(sequences)
    return [new_tokens(own) for own in sequences]


def test_the_engine_gives_the_tokens_that_a_cpu_gives(tmp_path: Path) -> None:
    keep_language_patched()
    launch._device_facts.cache_clear()  # of the simulated GPU of another test
    folder = write_fuyu(tmp_path)
    model, runner = on_cpu(folder)
    lines: list[str] = []
    with fake_cuda():
        with mock.patch.object(loading, "warm_up_steps", one_warm_up_with_an_image):
            loaded = loading.load_model(SETTINGS, folder, lines.append)
        found = outputs(harness_of(model, loaded.runner, overlap=loaded.executor.overlaps))
        assert loaded.runner.graph_replays > 0
    assert found == outputs(harness_of(model, runner, overlap=False))
    assert found[0] == found[1] != found[2]
    assert any("images take up to 512.0 MiB more" in line for line in lines)
