import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient, EngineDeadError
from persimmon.server.engine.messages import SequenceOutput, Submit
from persimmon.server.http.app import create_app
from tests.server.http.fake_engine import MAX_MODEL_LEN, FakeEngine, says

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"


async def scrape(http: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def metric(http: httpx.AsyncClient, name: str, **labels: str) -> float:
    return (await scrape(http))[name, frozenset(labels.items())]


async def test_probes_follow_the_engine_from_loading_to_its_end(tokenizer: Tokenizer, config: PersimmonConfig) -> None:
    async with FakeEngine(ready=False) as engine:
        client = EngineClient(engine.address)
        transport = httpx.ASGITransport(create_app(client, tokenizer, config, "demo"))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:

            async def statuses() -> list[int]:
                return [(await http.get(path)).status_code for path in ("/health", "/readyz", "/livez", "/metrics")]

            await client.start()
            assert await statuses() == [503, 503, 200, 200]
            assert (await http.get("/health")).json() == {
                "status": "loading",
                "reason": "the model is still loading",
            }
            refused = await http.post(COMPLETIONS, json={"prompt": "Hello"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "engine_not_ready"
            assert (await http.get("/v1/models")).status_code == 200

            await engine.until(lambda engine: bool(engine.workers))
            await engine.become_ready()
            async with asyncio.timeout(20):
                await client.wait_until_ready()
            assert await statuses() == [200, 200, 200, 200]
            assert (await http.get("/health")).json() == {"status": "ready"}

            assert engine.submitted == []  # no probe asked it for anything
            with client.submit(Submit(token_ids=[5], max_tokens=9)) as (outputs,):
                await engine.die()
                with pytest.raises(EngineDeadError):
                    await anext(outputs)
            assert await statuses() == [503, 503, 200, 200]
            assert (await http.get("/health")).json()["status"] == "dead"
            refused = await http.post(COMPLETIONS, json={"prompt": "Hello"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_dead"
        await client.close()


async def test_the_served_model_is_listed_and_no_other(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    [model] = listed["data"]
    assert listed["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == ("demo", "model", MAX_MODEL_LEN)
    assert (await http.get("/v1/models/demo")).json() == model
    missing = await http.get("/v1/models/adept/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_the_version_is_told(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json()["version"].count(".") == 2


async def test_the_engines_last_report_is_scraped(http: httpx.AsyncClient) -> None:
    scraped = (await scrape(http)).items()
    metrics = {name: value for (name, labels), value in scraped if labels == {("engine", "0")}}
    assert {name: value for name, value in metrics.items() if not name.endswith(("_sum", "_count"))} == {
        "persimmon_engine_ready": 1,
        "persimmon_requests_running": 3,
        "persimmon_requests_waiting": 2,
        "persimmon_kv_blocks_free": 25,
        "persimmon_kv_blocks": 100,
        "persimmon_kv_cache_usage_ratio": 0.75,
        "persimmon_steps_total": 7,
        "persimmon_prompt_tokens_total": 11,
        "persimmon_generated_tokens_total": 13,
        "persimmon_prefix_cache_hit_tokens_total": 17,
        "persimmon_prefix_cache_queried_tokens_total": 19,
        "persimmon_preemptions_total": 23,
        "persimmon_recomputed_tokens_total": 29,
        "persimmon_spec_decode_drafts_total": 37,
        "persimmon_spec_decode_draft_tokens_total": 43,
        "persimmon_spec_decode_accepted_tokens_total": 41,
        "persimmon_graph_replays_total": 31,
    }


async def test_requests_are_counted_by_endpoint_and_status(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    await http.post(COMPLETIONS, json={"prompt": "Hello"})
    await http.post(COMPLETIONS, json={"prompt": "Hello", "stream": True})
    await http.post(COMPLETIONS, json={})
    await http.get("/v1/models/other")
    await http.get("/nowhere/" + "x" * 50)
    count = "persimmon_http_requests_total"
    assert await metric(http, count, endpoint=COMPLETIONS, status="200") == 2
    assert await metric(http, count, endpoint=COMPLETIONS, status="400") == 1
    assert await metric(http, count, endpoint="/v1/models/{name:path}", status="404") == 1
    assert await metric(http, count, endpoint="unknown", status="404") == 1


async def test_latencies_are_observed_for_each_sequence(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    await http.post(COMPLETIONS, json={"prompt": ["a", "b"]})
    await http.post(COMPLETIONS, json={"prompt": "a", "temperature": 5})
    assert await metric(http, "persimmon_time_to_first_token_seconds_count") == 2
    assert await metric(http, "persimmon_inter_token_latency_seconds_count") == 0
    assert await metric(http, "persimmon_e2e_request_latency_seconds_count") == 1


async def test_sizes_are_observed_for_each_sequence_that_ended_by_itself(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = says([9, 8, 7], cached_tokens=1)
    body = {"prompt": [[5, 6], [5, 6, 7]], "n": 2, "max_tokens": 3}
    await http.post(COMPLETIONS, json=body)
    await http.post(COMPLETIONS, json=body | {"stream": True, "max_tokens": 2})
    engine.script = lambda sample: [SequenceOutput(sample.sequence_id, [], "error", error="It cannot be run.")]
    assert (await http.post(COMPLETIONS, json=body)).status_code == 500
    metrics = {name: value for (name, labels), value in (await scrape(http)).items() if not labels}
    sums = {
        "prompt_tokens": 2 * (2 + 2 + 3 + 3),
        "computed_prompt_tokens": 2 * (1 + 1 + 2 + 2),
        "generated_tokens": 4 * 3 + 4 * 2,
        "max_tokens": 4 * 3 + 4 * 2,
        "n": 4 * 2,
        "max_generated_tokens": 2 * 3 + 2 * 2,
    }
    assert {name: metrics[f"persimmon_request_{name}_sum"] for name in sums} == sums
    for phase in ("prefill_time", "decode_time", "inference_time", "time_per_output_token"):
        assert metrics[f"persimmon_request_{phase}_seconds_count"] == 8
    prefill, inference = (metrics[f"persimmon_request_{phase}_time_seconds_sum"] for phase in ("prefill", "inference"))
    assert 0 < prefill <= inference
    assert await metric(http, "persimmon_prompt_tokens_by_source_total", source="local_cache_hit") == 4
    assert await metric(http, "persimmon_prompt_tokens_by_source_total", source="local_compute") == 2 * (1 + 2)


async def test_probes_are_no_requests_whose_duration_counts(http: httpx.AsyncClient) -> None:
    await http.get("/health")
    await http.get("/v1/models")
    count = "persimmon_http_request_duration_seconds_count"
    counted = {dict(labels)["endpoint"] for name, labels in await scrape(http) if name == count}
    assert counted == {"/v1/models"}
