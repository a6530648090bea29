"""lm-eval's `local-completions` against the server, and its `hf` on Transformers: the same scores.

The tasks are local files; `lm_eval run --tasks tests/compat/lm_eval_tasks` runs them from a shell.
"""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from tests.end_to_end.serving import Server
from tests.model.checkpoints import DEMO

TASKS = Path(__file__).with_name("lm_eval_tasks")
WORDS = "persimmon_words"
TEXTS = "persimmon_texts"
DEFINITIONS = "persimmon_definitions"


@pytest.fixture(scope="module", autouse=True)
def _no_cache_but_our_own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def evaluate(kind: str, tasks: list[str], **arguments: object) -> Any:
    return lm_eval.simple_evaluate(
        kind,
        arguments | {"add_bos_token": True},
        tasks,
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        bootstrap_iters=0,
    )


@pytest.fixture(scope="module")
def transformers() -> Any:
    """What lm-eval finds with Transformers' PersimmonForCausalLM in float32."""
    return evaluate("hf", [WORDS, TEXTS, DEFINITIONS], pretrained=str(DEMO), dtype="float32", device="cpu")


def served(demo: Server, task: str, **arguments: object) -> Any:
    return evaluate(
        "local-completions",
        [task],
        model=demo.name,
        base_url=f"{demo.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(DEMO),
        max_retries=1,
        **arguments,
    )


def answers(results: Any, task: str) -> list[Any]:
    """What the model said to each request of a task, in order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["filtered_resps"]]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_concurrent": 8}, {"num_concurrent": 4, "batch_size": 6}],
    ids=str,
)
def test_log_likelihoods_and_scores_of_choices_are_transformers(
    demo: Server, transformers: Any, arguments: dict[str, Any]
) -> None:
    ours = served(demo, WORDS, **arguments)
    found, expected = answers(ours, WORDS), answers(transformers, WORDS)
    assert len(found) == len(expected) == 24 * 4
    assert [sum_ for sum_, _ in found] == pytest.approx([sum_ for sum_, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in found)
    scores = ours["results"][WORDS]
    assert scores["acc,none"] == transformers["results"][WORDS]["acc,none"] > 0.8
    assert scores["acc_norm,none"] == transformers["results"][WORDS]["acc_norm,none"]


def test_perplexities_of_whole_texts_are_transformers(demo: Server, transformers: Any) -> None:
    ours = served(demo, TEXTS, num_concurrent=8)
    assert answers(ours, TEXTS) == pytest.approx(answers(transformers, TEXTS), abs=2e-4)
    for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        assert ours["results"][TEXTS][metric] == pytest.approx(transformers["results"][TEXTS][metric], rel=1e-5)


def test_greedy_texts_are_transformers(demo: Server, transformers: Any) -> None:
    ours = served(demo, DEFINITIONS, num_concurrent=8)
    # Transformers decodes only the new tokens, and so without the space that they begin with.
    assert answers(ours, DEFINITIONS) == [f" {text}" for text in answers(transformers, DEFINITIONS)]
    assert ours["results"][DEFINITIONS]["exact_match,none"] > 0.5
