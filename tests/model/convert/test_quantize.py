"""persimmon convert --quantize: this server and Transformers read what it writes; cut off, it goes on."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from persimmon import kernels
from persimmon.kernels import KernelsUnavailableError, QuantizedMatrix
from persimmon.kernels.cpu import library
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import calibrate, convert_checkpoint, writer
from persimmon.model.convert.calibration_texts import read_calibration_texts
from persimmon.model.convert.quantize import QuantizationRequest
from persimmon.model.errors import CheckpointError
from persimmon.model.persimmon import Persimmon
from persimmon.model.quantization.rounding import quantize
from persimmon.model.tokenizer import Tokenizer
from tests.engine_harness import CPU
from tests.model.checkpoints import DEMO, DEMO_VOCAB_SIZE, make_checkpoint
from tests.model.convert.gguf_layout import make_gguf
from tests.model.convert.plain_checkpoint import plain_checkpoint
from tests.model.forward_pass import hidden_states

INT8 = QuantizationRequest("int8")
INT4 = QuantizationRequest("int4", 32)
WORDS = ["galaxy", "tree", "river", "house", "music", "doctor", "winter", "bread", "stone", "garden", "window", "money"]
TOKENS = [1, 100, 200, 300, 7, 8, 9, 10, 400, 2000]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("original"), num_hidden_layers=2, intermediate_size=256, dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": dialogue(word)}) + "\n" for word in WORDS[:10]))
    return path


def words() -> list[str]:
    """Words that the demo's tokenizer has as pieces, in an order that has nothing to do with them."""
    tokenizer = Tokenizer.from_folder(DEMO)
    pieces = (tokenizer.decode([token_id]).strip() for token_id in range(300, DEMO_VOCAB_SIZE))
    found = sorted(piece for piece in pieces if piece.isalpha() and piece.islower() and len(piece) > 4)
    random.Random(0).shuffle(found)
    return found


def dialogue(word: str) -> str:
    return f'human: What does {word} mean?\n\nadept: "{word.title()}" is a noun. It means a part of {word}.'


def convert(source: Path, out: Path, request: QuantizationRequest | None, **more: Any) -> list[str]:
    lines: list[str] = []
    given: dict[str, Any] = {"layout": "hugging_face", "dtype": None, "max_shard_bytes": 10**9, **more}
    convert_checkpoint(str(source), out, print_line=lines.append, quantization=request, **given)
    return lines


def parameters(folder: Path) -> dict[str, torch.Tensor | QuantizedMatrix]:
    return dict(Checkpoint.open(folder, PersimmonConfig.from_folder(folder)).parameters())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def network(folder: Path) -> Persimmon:
    """In float32, quantized matrices widened."""
    dense = {
        name: part.dequantized() if isinstance(part, QuantizedMatrix) else part.float()
        for name, part in parameters(folder).items()
    }
    config = PersimmonConfig.from_folder(folder)
    return Persimmon(config, dense.items(), torch.float32, CPU, kernels.for_device(CPU))


def log_probabilities(of: Persimmon, token_ids: list[int]) -> torch.Tensor:
    return of.logits(hidden_states(of, token_ids)).log_softmax(-1)


@pytest.mark.parametrize(
    "request_", [INT8, INT4, QuantizationRequest("int4", 128), QuantizationRequest("int4", 32, vocabulary=True)]
)
def test_matrices_come_back_rounded_to_nearest_and_all_else_as_it_was(original, request_, tmp_path):
    convert(original, tmp_path / "out", request_, max_shard_bytes=300_000)
    stored = parameters(original)
    made = parameters(tmp_path / "out")
    assert made.keys() == stored.keys()
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, tensor in stored.items():
        matrix = made[name]
        assert isinstance(tensor, torch.Tensor)
        assumed = name.startswith("model.layers.") and tensor.dim() == 2
        if assumed or (request_.vocabulary and name in tables):
            assert isinstance(matrix, QuantizedMatrix), name
            assert matrix.bits == (8 if name in tables or request_.quantization == "int8" else 4)
            assert torch.equal(matrix.dequantized(), quantize(tensor, matrix.format).dequantized()), name
        else:
            assert isinstance(matrix, torch.Tensor)
            assert torch.equal(matrix, tensor), name


@pytest.mark.parametrize(
    "request_",
    [INT8, INT4, QuantizationRequest("int8", vocabulary=True), QuantizationRequest("int4", vocabulary=True)],
    ids=["int8", "int4", "int8 throughout", "int4 with an int8 vocabulary"],
)
def test_transformers_computes_the_same_with_it(original, request_, tmp_path):
    from transformers import AutoModelForCausalLM

    convert(original, tmp_path / "out", request_)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    actual = log_probabilities(network(tmp_path / "out"), TOKENS)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0], ids=["Q8_0", "Q4_0"])
def test_transformers_computes_the_same_with_numbers_of_a_gguf_file(kind, tmp_path):
    """They are kept as they are: of lm_head in 8 bits in groups, which are not packed."""
    from transformers import AutoModelForCausalLM

    source = make_gguf(plain_checkpoint(tmp_path / "plain"), tmp_path / "model.gguf", kind)
    convert(source, tmp_path / "out", None, layout="gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    torch.testing.assert_close(log_probabilities(network(tmp_path / "out"), TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_calibrated_numbers_lose_less_than_rounded_ones(tmp_path):
    """On the demo: KL divergence from the network in 16 bits, on words that are not among the texts."""
    tokenizer, of_texts = Tokenizer.from_folder(DEMO), words()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": dialogue(word)}) for word in of_texts[:150]))
    held_out = tokenizer.encode("\n\n".join(map(dialogue, of_texts[-20:])))
    exact = log_probabilities(network(DEMO), held_out)
    losses = []
    for name, calibration in (("calibrated", texts), ("rounded", None)):
        convert(DEMO, tmp_path / name, QuantizationRequest("int4", 128, calibration=calibration))
        actual = log_probabilities(network(tmp_path / name), held_out)
        losses.append((exact.exp() * (exact - actual)).sum(-1).mean().item())
    assert losses[0] < 0.85 * losses[1]


def test_a_calibration_that_was_cut_off_goes_on_and_makes_the_same_bits(original, texts, tmp_path, monkeypatch):
    request = QuantizationRequest("int4", 32, calibration=texts)
    convert(original, tmp_path / "whole", request)
    write, written = calibrate._write, list[str]()

    def cut_off(path: Path, tensors: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, tensors)

    monkeypatch.setattr(calibrate, "_write", cut_off)
    with pytest.raises(KeyboardInterrupt):
        convert(original, tmp_path / "out", request)
    assert written == ["hidden-00001.safetensors", "layer-00000.safetensors"]
    monkeypatch.setattr(calibrate, "_write", write)
    lines = convert(original, tmp_path / "out", request)
    assert [line for line in lines if "calibrated" in line] == ["  layer 2 of 2 calibrated"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_shard_is_kept_and_a_damaged_one_written_again(original, tmp_path, monkeypatch):
    convert(original, tmp_path / "whole", INT4, max_shard_bytes=300_000)
    write, cut = writer._write_file, KeyboardInterrupt()

    def cut_off(path: Path, content: bytes) -> None:
        if path.name == "model.safetensors.index.json":
            raise cut
        write(path, content)

    monkeypatch.setattr(writer, "_write_file", cut_off)
    with pytest.raises(KeyboardInterrupt):
        convert(original, tmp_path / "out", INT4, max_shard_bytes=300_000)
    monkeypatch.setattr(writer, "_write_file", write)
    damaged = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    lines = convert(original, tmp_path / "out", INT4, max_shard_bytes=300_000)
    assert [line.split()[0] for line in lines if "written and verified" in line] == [damaged.name]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_request_or_other_texts_are_another_conversion(original, texts, tmp_path, monkeypatch):
    def cut_off(path: Path, tensors: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "_write", cut_off)
    with pytest.raises(KeyboardInterrupt):
        convert(original, tmp_path / "out", QuantizationRequest("int4", 32, calibration=texts))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": dialogue("other")}))
    for request in (INT4, QuantizationRequest("int4", 32, calibration=other)):
        with pytest.raises(
            CheckpointError, match="holds an unfinished conversion of another source, or with other set"
        ):
            convert(original, tmp_path / "out", request)


def test_the_type_of_other_tensors_and_of_scales_is_the_one_asked_for(original, tmp_path):
    convert(original, tmp_path / "out", INT4, dtype="float16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}


def test_a_trimmed_vocabulary_is_quantized_and_calibrated(texts, tmp_path):
    source = make_checkpoint(tmp_path / "in", num_hidden_layers=1, intermediate_size=128, vocab_size=4160)
    request = QuantizationRequest("int4", 32, vocabulary=True, calibration=texts)
    convert(source, tmp_path / "out", request, drop_ids=[range(4096, 4160)])
    made = parameters(tmp_path / "out")
    assert made["model.embed_tokens.weight"].shape == made["lm_head.weight"].shape == (4096, 128)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected an object like"),
        ("[]", "line 1: expected an object like"),
        ('{"input": "x"}', "line 1: expected an object like"),
        ('{"text": "a", "prompt": "b"}', "line 1: expected an object like"),
        ('\n{"text": 5}', 'line 2: "text" is not a string'),
        ('{"prompt": [1, "a"]}', 'line 1: "prompt" is not a string or a list of token ids'),
        ('{"prompt": [1, 4096]}', "line 1: the token id 4096 does not exist; expected 0 to 4,095"),
        ('{"messages": []}', 'line 1: "messages" is not a list of messages'),
        ('{"messages": [{"role": "user"}]}', 'line 1: "messages" is not a list of messages'),
        ('{"messages": [{"role": "poet", "content": "x"}]}', "line 1: the chat format cannot hold the conversation"),
        ("", "has no texts of at least two tokens"),
    ],
)
def test_a_line_that_is_not_a_text_is_refused(original, line, message, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(line)
    with pytest.raises(CheckpointError, match=message):
        convert(original, tmp_path / "out", QuantizationRequest("int8", calibration=path))
    assert not (tmp_path / "out").exists()


def test_texts_are_read_as_prompts_and_conversations(original, tmp_path):
    question = {"role": "user", "content": "What is a tree?"}
    answer = {"role": "assistant", "content": "A plant."}
    parts = {"role": "user", "content": [{"type": "text", "text": "What is a tree?"}]}
    text = "human: What is a tree?\n\nadept:"
    lines: list[tuple[dict[str, Any], str]] = [
        ({"text": text}, text),
        ({"prompt": text, "max_tokens": 5}, text),
        ({"messages": [question]}, text),
        ({"messages": [parts]}, text),
        ({"messages": [question, answer]}, f"{text} A plant."),
        ({"text": "a line\u2028separator"}, "a line\u2028separator"),
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line, _ in lines) + '\n{"prompt": [1, 7, 9]}\n')
    config = PersimmonConfig.from_folder(original)
    files = {
        name: (original / name).read_bytes() for name in ("tokenizer.model", "tokenizer_config.json", "config.json")
    }
    tokenizer = Tokenizer.from_folder(original)
    expected = [*(tokenizer.encode(text) for _, text in lines), [1, 7, 9]]
    assert read_calibration_texts(path, files, config) == expected


def test_a_weight_that_is_not_finite_is_refused_by_its_name_and_row(tmp_path):
    source = make_checkpoint(tmp_path / "in", num_hidden_layers=1, intermediate_size=128)
    from safetensors.torch import save_file

    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.dense_4h_to_h.weight"][100, 3] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"tensor model.layers.0.mlp.dense_4h_to_h.weight: row 100 has the weight"
    ):
        convert(source, tmp_path / "out", INT8)


def test_a_build_of_other_sources_is_one_line(original, tmp_path, monkeypatch):
    def refuse(build: str) -> None:
        raise KernelsUnavailableError(f"{build} was compiled from a different version of the C kernels")

    if not library.builds():
        pytest.skip("no build of the C kernels for this processor")
    monkeypatch.setattr(library, "load", refuse)
    with pytest.raises(CheckpointError, match="was compiled from a different version"):
        convert(original, tmp_path / "out", INT8)


def test_a_shared_embedding_is_refused_where_it_would_be_quantized(tmp_path):
    source = make_checkpoint(tmp_path / "in", num_hidden_layers=1, intermediate_size=128, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="lm_head shares the embedding"):
        convert(source, tmp_path / "out", QuantizationRequest("int8", vocabulary=True))
    convert(source, tmp_path / "out", INT8)
    assert "lm_head.weight" not in parameters(tmp_path / "out")
