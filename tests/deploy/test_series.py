"""A live server under load has every series that a dashboard, an alert rule or an autoscaler names, and they move."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.queries import SCRAPER_LABELS, Query, Selector, all_queries
from tests.end_to_end.serving import serving

STILL = {
    "persimmon_engine_ready": "1 for as long as all is well",
}
"""Selectors whose series stay as they are in a server that is well, and why."""

ABSENT = {
    "up": "Prometheus' own: whether a scrape succeeded",
    'persimmon_http_requests_total{status=~"5..",endpoint!~"/health|/readyz|/healthz"}': "no request fails",
}
"""Selectors that select nothing from a server that is well, and why."""

QUERIES = all_queries()
SELECTORS = sorted({selector.of_the_server for query in QUERIES for selector in query.selectors}, key=str)

Series = tuple[str, tuple[tuple[str, str], ...]]
Scrape = dict[Series, float]


@pytest.fixture(scope="module")
def scrapes() -> Iterator[list[Scrape]]:
    """What /metrics said before, during and after a load that a small cache cannot hold at once."""
    guesses = '{"method": "suffix", "num_speculative_tokens": 4}'
    with serving("--kv-cache-memory", "8MB", "--max-num-seqs", "8", "--speculative-config", guesses) as server:
        seen = [_scrape(server.url)]
        with ThreadPoolExecutor(16) as clients:
            answers = [clients.submit(_complete, server.url, number) for number in range(16)]
            while not all(answer.done() for answer in answers):
                seen.append(_scrape(server.url))
        assert {answer.result() for answer in answers} == {200}
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": -1}).status_code == 400
        seen.append(_scrape(server.url))
        yield seen


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_a_named_series_is_there_and_moves_under_load(selector: Selector, scrapes: list[Scrape]):
    states = _states(selector, scrapes)
    if str(selector) in ABSENT:
        assert not states, f"the server has {selector}: take it out of ABSENT"
    else:
        assert states, f"the server has no {selector}; {_askers(selector)} ask for it"
        still = f"{selector} {'moves' if len(states) > 1 else 'stays the same'}; {_askers(selector)} ask for it"
        assert (len(states) == 1) == (str(selector) in STILL), still


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_a_query_matches_labels_that_the_server_or_its_scraper_gives(query: Query, scrapes: list[Scrape]):
    # A label that is not there equals "", so a misspelt one would match nothing, or with != and !~ everything.
    for selector in query.selectors:
        given = {label for name, labels in scrapes[-1] if name == selector.name for label, _ in labels}
        unknown = {label for label, _, _ in selector.matchers} - given - SCRAPER_LABELS
        assert not unknown, f"{selector}: no series of that name has the labels {unknown}, they have {given}"


def test_every_exception_is_one_of_a_query():
    assert STILL.keys() | ABSENT.keys() <= {str(selector) for selector in SELECTORS}


def _complete(url: str, number: int) -> int:
    body = {"prompt": "the same beginning " * 16 + str(number), "max_tokens": 192, "ignore_eos": True, "seed": number}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120).status_code


def _scrape(url: str) -> Scrape:
    exposition = httpx.get(f"{url}/metrics", timeout=30).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def _states(selector: Selector, scrapes: Sequence[Scrape]) -> set[tuple[tuple[Series, float], ...]]:
    """The different states of the series that a selector selects, over some scrapes; those with none left out."""
    states = (
        tuple((series, value) for series, value in scrape.items() if selector.selects(series[0], dict(series[1])))
        for scrape in scrapes
    )
    return {state for state in states if state}


def _askers(selector: Selector) -> str:
    asks = {query.place for query in QUERIES if selector in [each.of_the_server for each in query.selectors]}
    return ", ".join(sorted(asks))
