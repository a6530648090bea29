"""The order in which settings change logits, against the logits that Transformers' `generate` draws from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persimmon.kernels.cpu.native import NativeKernels
from persimmon.kernels.reference_sampling import kept
from persimmon.model import sampler
from persimmon.model.adjustments import adjust_, penalize
from persimmon.model.native_draw import NativeDraw
from persimmon.model.row_sampling import RowSampling
from persimmon.model.token_counts import TokenCounts
from tests.cpu_builds import FLOAT_BUILDS
from tests.model import transformers_reference
from tests.model.rows import changed, row_with

STEPS = 6
PROMPT = [3, 17, 42, 17, 99]
BIASES = {3: 6.0, 17: -6.0, 42: 20.0, 99: -20.0, 7: 4.0}
EVEN = range(0, 128, 2)
EOS = 8
ONLY_DRAWN = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Setting:
    """The same request in our words and in Transformers'.

    Attributes:
        own: of `RowSampling`.
        theirs: of `generate`.
        min_tokens: tokens before which the end of the text may not come.
    """

    own: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    min_tokens: int = 0


def biased(biases: dict[int, float]) -> Setting:
    return Setting({"logit_bias": biases}, {"sequence_bias": {(token,): bias for token, bias in biases.items()}})


def same(**settings: Any) -> Setting:
    """A setting that has one name."""
    return Setting(settings, settings)


def only(tokens: Sequence[int]) -> Setting:
    """What a grammar does: only these tokens may come."""
    return Setting({"allowed": tokens}, {"prefix_allowed_tokens_fn": lambda batch, ids: list(tokens)})


def together(*settings: Setting) -> Setting:
    own: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for each in settings:
        own |= each.own
        theirs |= each.theirs
    return Setting(own, theirs, max(each.min_tokens for each in settings))


REPETITION = same(repetition_penalty=1.8)
ENCOURAGED = same(repetition_penalty=0.6)
NO_END_YET = Setting(theirs={"min_new_tokens": 3}, min_tokens=3)
HOT = same(temperature=1.7)
CASES = {
    "a bias and a repetition penalty": together(biased(BIASES), REPETITION),
    "a bias and a repetition penalty below one": together(biased(BIASES), ENCOURAGED),
    "a bias towards a banned token": together(biased({EOS: 100.0}), NO_END_YET),
    "a bias and a penalty below one on a banned token": together(biased({EOS: 90.0}), ENCOURAGED, NO_END_YET),
    "a bias towards a token outside the grammar": together(biased({7: 100.0, 42: 5.0}), only(EVEN)),
    "a grammar and a ban": together(only([EOS, 10, 12]), NO_END_YET),
    "temperature after bias and penalty": together(biased(BIASES), REPETITION, HOT),
    "top_k after temperature": together(HOT, same(top_k=5)),
    "top_p after temperature": together(HOT, same(top_p=0.7)),
    "min_p after temperature": together(HOT, same(min_p=0.2)),
    "top_p within what top_k kept": same(top_k=6, top_p=0.6),
    "top_k and min_p": together(HOT, same(top_k=6, min_p=0.1)),
    "all together": together(
        biased(BIASES), REPETITION, NO_END_YET, only([*EVEN, 7]), same(temperature=0.8, top_k=20, top_p=0.9)
    ),
}


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> Any:
    return transformers_reference.load(random_checkpoint)


def mask(allowed: Sequence[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def params_of(setting: Setting, output: Sequence[int], vocab_size: int, *, drawn: bool) -> RowSampling:
    """How the token after `output` is drawn."""
    own = {"temperature": 1.0} | setting.own
    if "repetition_penalty" in own:
        own["seen"] = TokenCounts(PROMPT)
        for token in output:
            own["seen"].append(token)
    if "allowed" in own:
        words = mask(own["allowed"], vocab_size)
        own["allowed"] = lambda: words
    if len(output) < setting.min_tokens:
        own["banned"] = (EOS,)
    if not drawn:
        own["temperature"] = 0.0
    return row_with(**own)


def draws() -> list[sampler.Draw]:
    """Plain torch, and each build of the C kernels that this processor runs."""
    return [sampler.draw, *(NativeDraw(NativeKernels(build)) for build in FLOAT_BUILDS)]


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("case", CASES)
def test_is_transformers_own(model: Any, case: str, *, drawn: bool) -> None:
    setting = CASES[case]
    theirs = {"top_k": 0} | setting.theirs
    if not drawn:
        theirs = {name: value for name, value in theirs.items() if name not in ONLY_DRAWN}
    torch.manual_seed(5)
    generated = model.generate(
        torch.tensor([PROMPT]),
        do_sample=drawn,
        max_new_tokens=STEPS,
        eos_token_id=EOS,
        pad_token_id=0,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **theirs,
    )
    output = generated.sequences[0, len(PROMPT) :].tolist()
    for place, (logits, scores) in enumerate(zip(generated.logits, generated.scores, strict=True)):
        own = logits.float().clone()
        vocab_size = own.shape[1]
        params = params_of(setting, output[:place], vocab_size, drawn=drawn)
        adjust_(own, [params], penalize)
        possible = torch.isfinite(scores[0])
        if drawn:
            keep = kept(
                own[0], params.asked.temperature, params.asked.top_k, params.asked.top_p, params.asked.min_p
            ) & torch.isfinite(own[0])
            assert keep.nonzero().flatten().tolist() == possible.nonzero().flatten().tolist()
            own /= params.asked.temperature
        else:
            assert int(own.argmax()) == output[place]
        torch.testing.assert_close(own[0, possible], scores[0, possible], rtol=1e-5, atol=1e-4)
        assert bool(torch.isneginf(own[0, ~possible]).all()) or drawn
        rows = [changed(params, seed=seed) for seed in range(50)]
        for draw in draws():
            assert bool(possible[sampler.sample(logits.float().repeat(len(rows), 1), rows, draw).tokens].all())


def test_min_p_comes_before_top_p_as_in_vllm() -> None:
    # Of 0.4, 0.3, 0.2 and 0.1 min_p drops the last; of the other three's 0.9, the first two are 0.78.  Transformers,
    # where top_p comes first, would keep three.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    params = [row_with(temperature=1.0, min_p=0.3, top_p=0.75, seed=seed) for seed in range(500)]
    tokens = sampler.sample(logits.repeat(500, 1), params).tokens
    assert set(tokens.tolist()) == {0, 1}
