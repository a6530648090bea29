"""The request that Adept's README gives, as it stands there, and what its client would see of logprobs."""

import json
import shutil
import subprocess

import httpx
import openai
import pytest

from tests.end_to_end.serving import Server

# From github.com/persimmon-ai-labs/adept-inference, README.md.
README_CURL = (
    r"""curl '<address of server>/api' -X 'PUT' -H 'Content-Type: application/json; charset=UTF-8' """
    r"""-d '{"prompts": ["human: Hello, how are you?\n\nadept:"], "tokens_to_generate": 128, "top_p": 0.9, """
    r""""random_seed": 1234, "logprobs": false}'"""
)
PROMPT = "human: Hello, how are you?\n\nadept:"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_of_adepts_readme_works_as_printed_there(demo: Server) -> None:
    command = README_CURL.replace("<address of server>", demo.url)
    ran = [subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120) for _ in range(2)]
    first, again = (json.loads(each.stdout) for each in ran)
    assert first == again
    assert first.keys() == {"text", "logprobs", "generations", "human_readable_tokens"}
    assert first["logprobs"] is None
    (text,), (generation,), (tokens,) = first["text"], first["generations"], first["human_readable_tokens"]
    assert text == f"{PROMPT} {generation}"
    assert "".join(tokens).replace("<0x0A>", "\n") == generation


def test_greedy_answers_and_their_logprobs_are_those_of_completions(demo: Server) -> None:
    asked = {"prompts": [PROMPT], "tokens_to_generate": 20, "top_k": 1, "logprobs": True, "add_BOS": True}
    answer = httpx.put(f"{demo.url}/api", json=asked, timeout=120).json()
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        completion = client.completions.create(
            model=demo.name, prompt=PROMPT, max_tokens=20, temperature=0, logprobs=0, echo=True
        )
    (choice,) = completion.choices
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert answer["logprobs"] == [pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)]
    assert answer["text"] == [f"|ENDOFTEXT| {choice.text}"]
