"""What the start decides before there is a GPU to decide it on."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from persimmon import kernels
from persimmon.kernels.cpu import library
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.convert.hugging_face import plan_from_hugging_face
from persimmon.model.convert.quantize import QuantizationRequest, formats, quantize_conversion
from persimmon.model.convert.writer import write
from persimmon.model.executor import Executor, executor_for
from persimmon.model.rope_scaling import RopeScaling
from persimmon.model.runner import PooledStates
from persimmon.server.config import read_settings
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.loading import load_model, warm_up_steps
from persimmon.server.engine.model_setup import (
    check_batch_invariance,
    choose_cache_dtypes,
    choose_speculation,
    graph_sizes,
    limits_of,
)
from persimmon.server.settings.speculation import SpeculativeConfig
from tests.model.checkpoints import make_checkpoint

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
GENERATOR = PersimmonConfig(**SHAPE)  # type: ignore[arg-type]
SCALED = PersimmonConfig(
    **SHAPE,  # type: ignore[arg-type]
    rope_scaling=RopeScaling(kind="dynamic", factor=4.0, original_length=512),
)
CLASSIFIER = PersimmonConfig(**SHAPE, architecture=Architecture.TOKEN_CLASSIFICATION, labels=("a", "b"))  # type: ignore[arg-type]

SMALL = {"kv_cache_memory": "1MiB", "max_model_len": "64", "block_size": "16"}


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({}, [1, 2, 4, 5]),
        ({"cuda_graph_sizes": "2,3"}, [2, 3]),
        ({"enforce_eager": "true"}, []),
        ({"enforce_eager": "true", "cuda_graph_sizes": "2,3"}, []),
    ],
)
def test_graphs_are_those_asked_for_and_only_on_a_gpu(asked: dict[str, str], sizes: list[int]) -> None:
    settings = read_settings({"max_num_seqs": "5", **asked})
    assert graph_sizes(settings, GENERATOR) == sizes
    assert graph_sizes(settings, CLASSIFIER) == []
    limits = limits_of(settings, GENERATOR, 512)
    with_sizes, without = (executor_for(kernels.for_device(CPU), CPU, own) for own in (sizes, []))
    assert with_sizes.preparation is None
    assert with_sizes.step_buffers(GENERATOR, torch.float16, limits) == without.step_buffers(
        GENERATOR, torch.float16, limits
    )


def test_the_allowance_for_an_old_triton_is_the_settings(
    monkeypatch: pytest.MonkeyPatch, demo_checkpoint: Path
) -> None:
    asked = []

    class AskedError(Exception):
        pass

    def for_device(device: torch.device, dtype: torch.dtype, *, allow_old_triton: bool, **_: bool) -> None:
        asked.append(allow_old_triton)
        raise AskedError

    monkeypatch.setattr(kernels, "for_device", for_device)
    for settings in ({}, {"allow_old_triton": "true"}):
        with pytest.raises(AskedError):
            load_model(read_settings(settings), demo_checkpoint, print)
    assert asked == [False, True]


@pytest.mark.skipif(not library.builds(), reason="without the C kernels no checkpoint is batch-invariant")
def test_batch_invariance_is_refused_on_a_cpu_whose_head_torch_multiplies(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    asked, tied = read_settings({"batch_invariant": "true"}), replace(GENERATOR, tie_word_embeddings=True)
    with pytest.raises(kernels.KernelsUnavailableError, match=r"--batch-invariant does not hold .*tie_word"):
        load_model(asked, folder, lambda line: None)
    check_batch_invariance(asked, tied, torch.device("cuda"))
    check_batch_invariance(asked, GENERATOR, CPU)
    check_batch_invariance(read_settings({}), tied, CPU)


def test_guesses_are_as_many_as_pay_on_a_cpu_and_none_on_a_gpu_unless_asked_otherwise() -> None:
    asked = read_settings({"speculative_config": '{"method": "suffix", "num_speculative_tokens": 4}'})
    gpu, off = torch.device("cuda"), SpeculativeConfig(method="off")
    assert choose_speculation(read_settings({}), GENERATOR, CPU) == SpeculativeConfig(method="auto")
    assert choose_speculation(read_settings({}), GENERATOR, gpu) == off
    for device in (CPU, gpu):
        assert choose_speculation(asked, GENERATOR, device) == asked.speculative_config
        assert choose_speculation(read_settings({"speculative_config": "off"}), GENERATOR, device) == off
    assert Speculation.of(off, 8, 512) is None
    only_of_grammars = [(read_settings({}), CLASSIFIER), (read_settings({"async_scheduling": "on"}), GENERATOR)]
    assert [choose_speculation(*given, CPU) for given in only_of_grammars] == [None, None]


class TestTheCacheType:
    def test_is_the_network_s_own_by_default(self) -> None:
        assert choose_cache_dtypes("auto", [torch.float16, torch.int8], CPU) == [torch.float16, torch.int8]

    def test_comes_first_and_then_what_could_be_chosen(self) -> None:
        assert choose_cache_dtypes("int8", [torch.float32, torch.int8], CPU) == [torch.int8, torch.float32]

    def test_may_be_named_where_it_is_the_network_s_own(self) -> None:
        assert choose_cache_dtypes("bfloat16", [torch.bfloat16, torch.int8], CPU) == [torch.bfloat16, torch.int8]

    def test_that_the_device_lacks_is_refused_before_anything_is_loaded(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, num_hidden_layers=1)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        asked = read_settings({"kv_cache_dtype": "fp8_e4m3"})
        refusal = (
            r"--kv-cache-dtype is fp8_e4m3, which this CPU's kernels do not have for --dtype float32: use auto(, "
            r"float16, bfloat16)? or int8$"
        )
        with pytest.raises(kernels.KernelsUnavailableError, match=refusal):
            load_model(asked, folder, lambda line: None)

    def test_shows_what_each_choice_takes_and_holds(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, num_hidden_layers=1)
        lines: list[str] = []
        loaded = load_model(read_settings(SMALL | {"kv_cache_dtype": "int8"}), folder, lines.append)
        assert loaded.executor.cache.dtype == torch.int8
        config = loaded.executor.model.config
        own, other = (2 * config.num_attention_heads * size for size in (config.head_dim + 2, 4 * config.head_dim))
        held = [loaded.plan.kv_cache // (16 * size) * 16 for size in (own, other)]
        assert loaded.plan.kv_tokens == held[0]
        choices = next(line for line in lines if "--kv-cache-dtype" in line)
        assert f"int8 holds {held[0]:,} (" in choices
        assert f"auto holds {held[1]:,} (" in choices


def quantized_copy(folder: Path, out: Path) -> Path:
    """A checkpoint with its matrices in 8 bits, as persimmon convert writes it."""
    conversion, request = plan_from_hugging_face(folder, None, 1 << 30), QuantizationRequest("int8")
    write(quantize_conversion(conversion, request, formats(conversion, request)), out, lambda line: None)
    return out


def test_buffers_for_quantized_weights_are_planned_and_made_wherever_those_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "dense", num_hidden_layers=1)
    seen: list[bool] = []

    def step_buffers(self: Executor, config: PersimmonConfig, dtype: torch.dtype, limits: kernels.StepLimits) -> int:
        seen.append(limits.quantized)
        return 0

    monkeypatch.setattr(Executor, "step_buffers", step_buffers)
    monkeypatch.setattr(Executor, "reserve", lambda self, limits: seen.append(limits.quantized))
    for settings, own in (
        ({}, folder),
        ({"quantization": "int8"}, folder),
        ({}, quantized_copy(folder, tmp_path / "quantized")),
    ):
        load_model(read_settings(settings | SMALL), own, lambda line: None)
    assert seen == [False, False, True, True, True, True]


def test_a_classifier_has_no_buffers_for_draws() -> None:
    assert limits_of(read_settings({}), GENERATOR, 512).vocab_size == 64
    assert limits_of(read_settings({}), CLASSIFIER, 512).vocab_size == 0


@pytest.mark.parametrize(("compiles", "lengths"), [(True, {1, 20, 40, 80, 299}), (False, set())])
def test_angles_by_token_are_compiled_before_a_request_needs_them(compiles: bool, lengths: set[int]) -> None:
    plan = SimpleNamespace(max_model_len=300, kv_tokens=4096, block_size=16)
    steps = list(warm_up_steps(plan, read_settings({}), SCALED, compiles=compiles))  # type: ignore[arg-type]
    long = [item for batch in steps for item in batch if item.prompt_length]
    assert {len(item.token_ids) for item in long} == lengths
    assert all(item.start + len(item.token_ids) < item.prompt_length for item in long)


@pytest.mark.parametrize("config", [GENERATOR, SCALED, CLASSIFIER], ids=["generator", "scaled", "classifier"])
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(("most", "budget"), [(1, 1), (1, 2048), (2, 2), (9, 12), (64, 64), (256, 2048)])
@pytest.mark.parametrize(("max_model_len", "kv_tokens"), [(2, 64), (17, 4096), (300, 16), (300, 4096)])
def test_the_warm_up_stays_within_the_limits(
    most: int, budget: int, max_model_len: int, kv_tokens: int, compiles: bool, config: PersimmonConfig
) -> None:
    plan = SimpleNamespace(max_model_len=max_model_len, kv_tokens=kv_tokens, block_size=16)
    settings = read_settings({"max_num_seqs": str(most), "max_num_batched_tokens": str(budget)})
    batches = list(warm_up_steps(plan, settings, config, compiles=compiles))  # type: ignore[arg-type]
    assert max(len(batch) for batch in batches) <= most
    assert max(sum(len(item.token_ids) for item in batch) for batch in batches) <= budget
    for item in (item for batch in batches for item in batch):
        end = item.start + len(item.token_ids)
        assert len(item.token_ids) > 0
        assert end <= max_model_len
        assert end <= 16 * len(item.block_table)
        assert max(item.block_table) < kv_tokens // 16
        if not config.generates:
            assert not item.samplings
            assert isinstance(item.report, PooledStates)
