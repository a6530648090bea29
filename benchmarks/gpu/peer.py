"""Hugging Face's Persimmon on the same card: the same shape, random weights, float16, its own generate().

Knows nothing of this project's network.
"""

import time
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import time_loop
from persimmon.model.config import PersimmonConfig

DTYPE = torch.float16
ROUNDS = 2


def run(setting: Setting, report: Report) -> None:
    """Decode tokens/s of a few batch sizes, and one prompt."""
    if find_spec("transformers") is None:
        report.note("transformers is not installed: no peer was measured")
        return
    import transformers

    report.note(f"transformers {transformers.__version__}")
    suite = setting.suite
    model = report.prepare("transformers", partial(_model, suite.config, setting.device))
    for batch in suite.peer_batches:
        report.attempt(f"batch {batch}", partial(_decode, setting, report, model, batch), seconds=6)
    report.attempt("prompt", partial(_prompt, setting, report, model), seconds=2)


@torch.inference_mode()
def _prompt(setting: Setting, report: Report, model: Any) -> None:
    suite = setting.suite
    ids = torch.randint(suite.config.vocab_size, (1, suite.peer_prefill), device=setting.device)
    timing = time_loop(partial(model, ids, logits_to_keep=1), setting.device, 4 * suite.seconds_per_figure)
    report.row(
        "Hugging Face, prompts",
        tokens=suite.peer_prefill,
        ms=timing.median / 1e3,
        tokens_s=suite.peer_prefill / timing.seconds,
    )


def _model(config: PersimmonConfig, device: torch.device) -> Any:
    from transformers import PersimmonConfig as TheirConfig
    from transformers import PersimmonForCausalLM

    theirs = TheirConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act="relu2",
        layer_norm_eps=config.layer_norm_eps,
        qk_layernorm=True,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.partial_rotary_factor,
        },
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE if device.type == "cuda" else torch.float32)
    try:
        with device:
            return PersimmonForCausalLM(theirs).eval()
    finally:
        torch.set_default_dtype(default)


@torch.inference_mode()
def _decode(setting: Setting, report: Report, model: Any, batch: int) -> None:
    """The time of some tokens more, so that neither the prompt nor generate()'s beginning counts."""
    suite = setting.suite
    ids = torch.randint(suite.config.vocab_size, (batch, suite.peer_prompt), device=setting.device)

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        # The tokens come back to the host, which waits for them.
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        ).tolist()
        return time.perf_counter() - begin

    few = 2
    seconds(few)
    rates = [suite.peer_tokens * batch / (seconds(few + suite.peer_tokens) - seconds(few)) for _ in range(ROUNDS)]
    report.row(
        "Hugging Face, decode",
        batch=batch,
        context=suite.peer_prompt,
        tokens=suite.peer_tokens,
        tokens_s=max(rates),
        least_tokens_s=min(rates),
    )
