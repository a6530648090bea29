"""The random checkpoints that other tests compare with: a network that lost a norm or a bias has to show."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PersimmonForCausalLM

    return PersimmonForCausalLM.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def greedy(reference: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    continuation: list[int] = output[0, len(prompt) :].tolist()
    return continuation


def test_random_checkpoint_does_not_repeat_itself(reference: Any) -> None:
    for prompt in ([1], [1, 500, 600], list(range(300, 340))):
        assert len(set(greedy(reference, prompt, 48))) > 16


@pytest.mark.parametrize(
    "kind", ["layernorm.weight", "layernorm.bias", "query_key_value.bias", "dense.bias", "4h.bias"]
)
def test_every_norm_and_bias_of_a_random_checkpoint_matters(reference: Any, kind: str) -> None:
    prompt = [1, 700, 20, 3000]
    right = greedy(reference, prompt, 16)
    original = {name: tensor.clone() for name, tensor in reference.state_dict().items() if name.endswith(kind)}
    assert original
    for name, tensor in reference.state_dict().items():
        if name in original:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    wrong = greedy(reference, prompt, 16)
    reference.load_state_dict(original, strict=False)
    assert wrong != right
    assert greedy(reference, prompt, 16) == right


def test_random_checkpoints_follow_from_the_seed(tmp_path: Path) -> None:
    def content(name: str, seed: int) -> bytes:
        make_checkpoint(tmp_path / name, seed=seed, vocab_size=64, hidden_size=32, num_hidden_layers=1)
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert content("a", seed=1) == content("b", seed=1) != content("c", seed=2)
