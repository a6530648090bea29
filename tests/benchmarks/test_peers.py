import argparse
import json
import sys
from itertools import islice
from pathlib import Path

import psutil
import pytest

from benchmarks.machine import Rates, floor_tokens_per_s
from benchmarks.peer_figures import Measurement, agreement, comparisons, summarize, table
from benchmarks.peer_servers import OURS, VLLM, Contender, openvino_server, our_server, vllm_server
from benchmarks.peers import workload_at
from benchmarks.serve import Round, Workload
from benchmarks.servers import Server, ServerFailedError, running
from persimmon.model.config import PersimmonConfig
from persimmon.server.bench.answer import Answer
from persimmon.server.bench.report import Distribution, Report

LIMITS = ("--max-model-len", "64", "--max-num-seqs", "4")
HEALTHY = """
import http.server, json, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"version": "7", "child": child.pid}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def python_server(script: str) -> Server:
    return Server(
        name="fake",
        program=(sys.executable, "-c", script),
        shown_program="fake",
        arguments=("{port}", "{checkpoint}"),
        environment={},
    )


def measurement(server: str, tokens_per_s: float) -> Measurement:
    latency = Distribution.of([0.25, 0.5])
    report = Report(
        workload=Workload(prompts=2, streams=2),
        duration_s=1.0,
        answered=2,
        errors={},
        prompt_tokens=6,
        output_tokens=8,
        output_tokens_per_s=tokens_per_s,
        requests_per_s=2.0,
        chunks_per_token=1.0,
        ttft_ms=latency,
        itl_ms=latency,
        tpot_ms=latency,
        e2e_ms=latency,
        client_cpu_s=0.1,
    )
    return Measurement(server=server, round=1, start_s=3.0, report=report, server_cores=1.5, other_cores=0.1)


def round_of(*texts: str) -> Round:
    answers = tuple(
        Answer(started=0.0, arrivals=(1.0,), finished=2.0, text=text, prompt_tokens=3, completion_tokens=4)
        for text in texts
    )
    return Round(measurement(OURS, 1.0).report, answers)


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    broken = python_server("import sys; print('cannot open the checkpoint'); sys.exit(2)")
    with (
        pytest.raises(ServerFailedError, match=r"(?s)ended with code 2.*cannot open the checkpoint"),
        running(broken, tmp_path, tmp_path / "log", start_timeout_s=60),
    ):
        pass


def test_a_server_that_is_never_healthy_is_reported_and_stopped(tmp_path: Path) -> None:
    stuck = python_server("import signal; print('loading', flush=True); signal.pause()")
    with (
        pytest.raises(ServerFailedError, match=r"(?s)not healthy in 1 s"),
        running(stuck, tmp_path, tmp_path / "log", start_timeout_s=1),
    ):
        pass
    assert not [child for child in psutil.Process().children() if "signal.pause" in " ".join(child.cmdline())]


def test_no_process_of_a_server_outlives_its_measurement(tmp_path: Path) -> None:
    with running(python_server(HEALTHY), tmp_path, tmp_path / "log", start_timeout_s=60) as server:
        first = psutil.Process(server.process_id)
        family = [first, *first.children()]
        assert len(family) == 2
        assert server.version == "7"
        assert server.cpu_seconds() > 0
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_reported_commands_carry_no_path_of_this_machine(tmp_path: Path) -> None:
    for server in (
        our_server({"PYTHONPATH": str(tmp_path / "view")}, LIMITS),
        vllm_server(tmp_path / "bin" / "vllm", {"OMP_NUM_THREADS": "2"}, LIMITS),
        openvino_server(python=tmp_path / "python", script=tmp_path / "serve.py", environment={}, flags=LIMITS),
    ):
        assert "/" not in server.shown_command
        assert "CHECKPOINT" in server.shown_command
        assert str(tmp_path / "model") in server.command(tmp_path / "model", 8000)
        assert "8000" in server.command(tmp_path / "model", 8000)


def test_the_table_has_the_ratio_of_medians() -> None:
    rounds = [measurement(OURS, tokens) for tokens in (300.0, 100.0, 200.0)]
    rounds += [measurement(VLLM, tokens) for tokens in (80.0, 100.0, 5000.0)]
    row = next(line for line in table(summarize(rounds), [(OURS, VLLM)]).splitlines() if "output tokens/s" in line)
    assert row == "| 2 | output tokens/s | 200.0 (100.0-300.0) | 100.0 (80.0-5,000.0) | 2.00 |"


def test_ratios_are_of_one_precision_and_of_this_server_at_several() -> None:
    contenders = [
        Contender(
            server=our_server({}, (), f"{program} {precision}"),
            program=program,
            precision=precision,
            instructions="avx2",
            checkpoint=Path(),
        )
        for precision in ("float32", "int8")
        for program in (OURS, VLLM)
    ]
    assert comparisons(contenders) == [
        ("ours float32", "vLLM float32"),
        ("ours int8", "vLLM int8"),
        ("ours int8", "ours float32"),
    ]


def test_no_workload_of_a_comparison_has_prompts_of_another() -> None:
    arguments = argparse.Namespace(
        prompts=8, input_len=(4, 4), output_len=(1, 1), prefix_len=0, token_ids=(300, 4000), seed=0
    )
    workloads = [workload_at(streams, arguments, number) for streams in (1, 2, 8) for number in (1, 2, 3)]
    prompts = [repr(prompt) for own in workloads for prompt in islice(own.random_workload.prompts(own.seed), 8)]
    assert len(set(prompts)) == len(prompts)


def test_the_table_stands_with_one_server_alone() -> None:
    row = next(line for line in table(summarize([measurement(OURS, 100.0)])).splitlines() if "output tokens/s" in line)
    assert row == "| 2 | output tokens/s | 100.0 (100.0-100.0) |"


class TestFloor:
    # One layer of 4 * 100^2 + 2 * 100 * 300 weights, and 100 * 1000 of the head: 200,000.
    CONFIG = PersimmonConfig(
        vocab_size=1000,
        hidden_size=100,
        intermediate_size=300,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )

    def test_of_one_stream_is_reading_the_weights(self) -> None:
        rates = Rates(read_gb_s=0.0008, matmul_gflop_s=1e6, dtype="float32")
        floor = floor_tokens_per_s(self.CONFIG, rates, weight_bytes=4, streams=1, input_len=10, output_len=10)
        assert floor == pytest.approx(1.0, rel=1e-3)

    def test_of_many_is_multiplying_prompts_included(self) -> None:
        rates = Rates(read_gb_s=1e6, matmul_gflop_s=0.004, dtype="float32")
        floor = floor_tokens_per_s(self.CONFIG, rates, weight_bytes=4, streams=100, input_len=1, output_len=1)
        # A token is 400,000 operations, and so is a prompt of one.
        assert floor == pytest.approx(5.0, rel=1e-3)


def test_answers_agree_where_their_texts_do() -> None:
    compared = agreement(VLLM, 1, round_of("a", "b", "c"), round_of("a", "x", "c"))
    assert (compared.prompts, compared.same_text) == (3, 2)


def test_summaries_can_be_written_as_json() -> None:
    assert json.loads(json.dumps([vars(summary) for summary in summarize([measurement(OURS, 1.0)])]))
