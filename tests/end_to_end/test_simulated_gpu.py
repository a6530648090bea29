"""A server whose engine process finds a GPU: the start and a request, with kernels interpreted on a CPU."""

import asyncio
import re
from pathlib import Path

import httpx

import persimmon
from tests.fake_cuda.checkpoint import write_checkpoint
from tests.fake_cuda.serving import engine_main


def test_a_request_is_answered_from_cuda_graphs(tmp_path: Path, monkeypatch, capfd) -> None:
    folder = write_checkpoint(tmp_path)
    monkeypatch.setattr("persimmon.server.embedded.engine_main", engine_main)
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "max_model_len": 64, "kv_cache_memory": "1MB"}
    limits |= {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 1}'}

    async def ask() -> tuple[dict, str]:
        async with persimmon.EmbeddedServer(model=folder, **limits, profile_steps=1, profile_dir=tmp_path) as server:
            transport = httpx.ASGITransport(app=server.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                body = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True, "temperature": 0}
                answer = await client.post("/v1/completions", json=body)
                return answer.json(), (await client.get("/metrics")).text

    answer, metrics = asyncio.run(ask())
    assert answer["usage"]["completion_tokens"] == 3
    (replays,) = re.findall(r"^persimmon_graph_replays_total\S* (\S+)", metrics, re.MULTILINE)
    assert float(replays) > 2
    assert list(tmp_path.glob("steps-*.json.gz"))
    assert "CUDA graphs" in capfd.readouterr().err
