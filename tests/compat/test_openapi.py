"""Schemathesis against the server's own OpenAPI document: whatever the document allows, and much that it does not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.canary import Canary
from tests.end_to_end.serving import Server

MIN_CASES = 5_000
SERVED = re.compile(r'^persimmon_http_requests_total{endpoint="([^"]+)",status="200"} (\S+)$', re.MULTILINE)
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


@pytest.mark.timeout(900)
def test_thousands_of_generated_requests_get_documented_answers(demo: Server, canary: Canary, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command: list[str | Path] = [
        *(Path(sys.executable).with_name("schemathesis"), "--no-color", "run", f"{demo.url}/openapi.json"),
        *("--checks", ",".join(CHECKS)),
        *("--phases", "coverage,fuzzing"),
        *("--max-examples", "600"),
        *("--seed", "4"),
        *("--generation-database", "none"),
        *("--request-timeout", "60"),
        *("--continue-on-failure", "--warnings", "off"),
        *("--report", "json", "--report-json-path", report),
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.compat.schemathesis_hooks"}
    run = subprocess.run(command, env=os.environ | hooks, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout
    facts = json.loads(report.read_text())
    assert facts["operations"]["tested"] == facts["operations"]["total"]
    assert facts["test_cases"]["with_failures"] == facts["test_cases"]["errored"] == 0
    assert facts["test_cases"]["generated"] >= MIN_CASES
    served = dict(SERVED.findall(httpx.get(f"{demo.url}/metrics").text))
    assert all(float(served[path]) > 100 for path in ("/v1/completions", "/v1/chat/completions", "/tokenize")), served
