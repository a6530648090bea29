"""Embeddings and classifications of running servers equal Transformers', in chunks, on prefix hits and side by side."""

import asyncio
import random
import re
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from persimmon.model.config import Architecture
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.http.endpoints.pooling import MAX_RUNNING
from tests.end_to_end.serving import Server, serving
from tests.model.checkpoints import DEMO, make_checkpoint

TOLERANCE = 1e-4
LABELS = {0: "calm", 1: "glad", 2: "sad", 3: "angry", 4: "calm"}
PAD = 7
TEXTS = ["What is a persimmon?", "Hello!", "A galaxy is a splendid assemblage. " * 6, "\u2603"]
RAW = {"normalize": False}


@dataclass(frozen=True)
class Case:
    """A checkpoint, served and in Transformers."""

    server: Server
    folder: Path
    model: Any

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)

    @torch.inference_mode()
    def states(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[tokens, hidden] final hidden states."""
        states: torch.Tensor = self.model.get_decoder()(torch.tensor([list(token_ids)])).last_hidden_state[0]
        return states

    @torch.inference_mode()
    def scores(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The classifier's logits: of the sequence [labels], or of each token [tokens, labels]."""
        scores: torch.Tensor = self.model(torch.tensor([list(token_ids)])).logits[0]
        return scores

    def post(self, path: str, given: object, **fields: Any) -> dict[str, Any]:
        response = httpx.post(f"{self.server.url}{path}", json={"input": given} | fields, timeout=120)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


def load(folder: Path, architecture: Architecture) -> Any:
    import transformers  # takes seconds

    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def generator(demo: Server) -> Case:
    return Case(demo, DEMO, load(DEMO, Architecture.CAUSAL_LM))


def classifier(folder: Path, architecture: Architecture) -> Iterator[Case]:
    """A server whose steps hold 24 tokens, so that most prompts take several."""
    make_checkpoint(folder, architecture=architecture, settings={"id2label": LABELS, "pad_token_id": PAD})
    limits = ["--max-num-batched-tokens", "24", "--max-num-seqs", "8", "--kv-cache-memory", "26MB"]
    with serving("--model", str(folder), *limits) as server:
        yield Case(server, folder, load(folder, architecture))


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from classifier(tmp_path_factory.mktemp("sequences"), Architecture.SEQUENCE_CLASSIFICATION)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from classifier(tmp_path_factory.mktemp("tokens"), Architecture.TOKEN_CLASSIFICATION)


def assert_close(given: Sequence[Any], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(given), expected, rtol=0, atol=TOLERANCE)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(PAD + 1, 4096), k=length)


@pytest.mark.parametrize("kind", ["generator", "sequences"])
def test_the_official_clients_embeddings_are_transformers_states(kind: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(kind)
    encoded = [case.tokenizer.encode(text) for text in TEXTS]
    states = [case.states(token_ids) for token_ids in encoded]
    with openai.OpenAI(base_url=f"{case.server.url}/v1", api_key="none", max_retries=0) as client:
        last = client.embeddings.create(model=case.server.name, input=TEXTS, extra_body=RAW)
        mean = client.embeddings.create(model=case.server.name, input=encoded, extra_body=RAW | {"pooling": "mean"})
        unit = client.embeddings.create(model=case.server.name, input=TEXTS[0], encoding_format="float")
    for index, own in enumerate(states):
        assert_close(last.data[index].embedding, own[-1])
        assert_close(mean.data[index].embedding, own.mean(0))
    assert_close(unit.data[0].embedding, states[0][-1] / states[0][-1].norm())
    assert last.usage.prompt_tokens == mean.usage.total_tokens == sum(map(len, encoded))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_chunks_prefix_hits_and_neighbours_change_no_embedding(sequences: Case, pooling: str) -> None:
    lengths = (1, 16, 23, 24, 25, 64, 150)
    prompts = [prompt(length) for length in lengths] + [prompt(150)[:130], prompt(150)[:32] + prompt(40)]
    before = sequences.server.metrics()["persimmon_prefix_cache_hit_tokens_total"]

    def embed(token_ids: list[int]) -> list[float]:
        answer = sequences.post("/v1/embeddings", token_ids, pooling=pooling, **RAW)
        embedding: list[float] = answer["data"][0]["embedding"]
        return embedding

    with ThreadPoolExecutor(len(prompts)) as crowd:
        rounds = [list(crowd.map(embed, prompts)) for _ in range(2)]
    for token_ids, *given in zip(prompts, *rounds, strict=True):
        states = sequences.states(token_ids)
        for own in given:
            assert_close(own, states[-1] if pooling == "last" else states.mean(0))
    hits = sequences.server.metrics()["persimmon_prefix_cache_hit_tokens_total"] - before
    # The states of a mean are all computed, cached or not.
    assert hits > 0 if pooling == "last" else hits == 0


def test_a_text_is_classified_as_by_transformers(sequences: Case) -> None:
    encoded = [sequences.tokenizer.encode(text) for text in TEXTS]
    plain = sequences.post("/classify", TEXTS, use_activation=False)["data"]
    answers = sequences.post("/classify", encoded)["data"]
    for token_ids, logits, answer in zip(encoded, plain, answers, strict=True):
        expected = sequences.scores(token_ids)
        assert_close(logits["probs"], expected)
        assert_close(answer["probs"], expected.softmax(-1))
        assert answer["label"] == LABELS[int(expected.argmax())]
        assert answer["num_classes"] == 5


def test_chunks_padding_and_neighbours_change_no_classification(sequences: Case) -> None:
    prompts = [prompt(length, 1) for length in (1, 23, 24, 25, 90)]
    prompts += [[*prompts[3], PAD, PAD], [PAD, 9, PAD], [PAD, PAD]]
    # Each twice: the second finds the first one's blocks.
    data = sequences.post("/classify", prompts * 2, use_activation=False)["data"]
    for token_ids, own in zip(prompts * 2, data, strict=True):
        assert_close(own["probs"], sequences.scores(token_ids))


def test_tokens_are_classified_as_by_transformers(tokens: Case) -> None:
    encoded = [tokens.tokenizer.encode(text) for text in TEXTS]
    plain = tokens.post("/classify/tokens", TEXTS, use_activation=False)["data"]
    answers = tokens.post("/classify/tokens", encoded)["data"]
    for token_ids, logits, answer in zip(encoded, plain, answers, strict=True):
        expected = tokens.scores(token_ids)
        assert_close([own["probs"] for own in logits["tokens"]], expected)
        assert_close([own["probs"] for own in answer["tokens"]], expected.softmax(-1))
        assert [own["label"] for own in answer["tokens"]] == [LABELS[best] for best in expected.argmax(-1).tolist()]
        assert [own["token_id"] for own in answer["tokens"]] == token_ids


def test_what_the_console_tells_to_try_works(sequences: Case, tokens: Case) -> None:
    for case in (sequences, tokens):
        command = case.server.wait_for_line(re.compile("^  curl .*"), 60)
        _, url, *_, body = shlex.split(command[0])
        assert httpx.post(url, content=body).status_code == 200


def test_classifiers_say_what_they_are_and_do_not_generate(sequences: Case, tokens: Case) -> None:
    for case, task in ((sequences, "classify"), (tokens, "token_classify")):
        with openai.OpenAI(base_url=f"{case.server.url}/v1", api_key="none", max_retries=0) as client:
            (model,) = client.models.list()
            assert (model.model_extra or {})["task"] == task
            with pytest.raises(openai.BadRequestError) as raised:
                client.completions.create(model=model.id, prompt="a")
        assert raised.value.code == "unsupported_by_model"


def test_a_client_that_leaves_a_long_list_leaves_nothing_behind(sequences: Case) -> None:
    inputs = [prompt(200, index) for index in range(2000)]
    before = sequences.server.metrics()["persimmon_prompt_tokens_total"]

    async def main() -> None:
        async with httpx.AsyncClient(base_url=sequences.server.url, timeout=120) as client:
            asking = asyncio.create_task(client.post("/v1/embeddings", json={"input": inputs}))
            while f"persimmon_open_streams {MAX_RUNNING}.0" not in (await client.get("/metrics")).text:
                assert not asking.done()
            asking.cancel()

    asyncio.run(main())
    computed = sequences.server.wait_until_idle()["persimmon_prompt_tokens_total"] - before
    assert computed < 200 * len(inputs)
