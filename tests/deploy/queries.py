"""The PromQL of the dashboards, alert rules and autoscalers, and the series that it selects.

Knows PromQL's syntax and what a matcher means; nothing of values.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import promql_parser
from promql_parser import MatchOp

from tests.deploy.files import DEPLOY, KUBERNETES, read_json, read_yaml

SCRAPER_LABELS = frozenset({"instance", "job", "namespace", "pod", "service"})
"""Labels that the scraper puts on series; the server does not know them."""

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Query:
    """An expression, and the name of what shows or acts on it."""

    place: str
    expression: str

    @property
    def selectors(self) -> list["Selector"]:
        """Everything that it selects.

        Raises:
            ValueError: it is not PromQL.
        """
        return list(_selectors(promql_parser.parse(self.expression)))


@dataclass(frozen=True)
class Selector:
    """A name and what the labels of its series must be."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        inside = ",".join(f'{label}{operator}"{value}"' for label, operator, value in self.matchers)
        return f"{self.name}{{{inside}}}" if inside else self.name

    @property
    def of_the_server(self) -> "Selector":
        """It without the labels that scrapers add."""
        return Selector(self.name, tuple(each for each in self.matchers if each[0] not in SCRAPER_LABELS))

    def selects(self, name: str, labels: Labels) -> bool:
        """Whether a series is among those that it selects."""
        return name == self.name and all(
            _matches(operator, value, labels.get(label, "")) for label, operator, value in self.matchers
        )


def dashboard_queries() -> Iterator[Query]:
    """What the panels of all dashboards ask."""
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        for panel in read_json(path)["panels"]:
            for target in panel["targets"]:
                # Grafana's own variable, which is a duration.
                expression = target["expr"].replace("$__rate_interval", "5m")
                yield Query(f"{path.name}, {panel['title']}", expression)


def alert_queries() -> Iterator[Query]:
    """What the alert rules ask."""
    for group in read_yaml(DEPLOY / "prometheus" / "alerts.yaml")["groups"]:
        for rule in group["rules"]:
            yield Query(rule["alert"], rule["expr"])


def autoscaler_queries() -> Iterator[Query]:
    """What the autoscaler asks."""
    for trigger in read_yaml(KUBERNETES / "autoscaling" / "scaled_object.yaml")["spec"]["triggers"]:
        yield Query("autoscaler", trigger["metadata"]["query"])


def all_queries() -> list[Query]:
    """All of them."""
    return [*dashboard_queries(), *alert_queries(), *autoscaler_queries()]


def _selectors(expression: promql_parser.Expr) -> Iterator[Selector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(part: promql_parser.Expr) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            found.append(part)

    promql_parser.walk(expression, visit)
    for selector in found:
        assert selector.name, f"{selector} selects by no name"
        matchers = tuple((each.name, _sign(each.op), each.value) for each in selector.matchers.matchers)
        yield Selector(selector.name, matchers)


def _sign(operator: MatchOp) -> str:
    signs = ((MatchOp.Equal, "="), (MatchOp.NotEqual, "!="), (MatchOp.Re, "=~"), (MatchOp.NotRe, "!~"))
    return next(sign for each, sign in signs if each == operator)  # they have no hash


def _matches(operator: str, wanted: str, value: str) -> bool:
    if operator in ("=", "!="):
        return (value == wanted) == (operator == "=")
    return bool(re.fullmatch(wanted, value)) == (operator == "=~")
