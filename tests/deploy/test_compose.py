"""compose.yaml: what it mounts is there, what it sets exists, and a container has the time that its drain takes."""

from typing import Any

import pytest

from persimmon.server.config import Settings, environment_variable
from persimmon.server.supervisor import FINAL_ERROR_SECONDS, FLUSH_SECONDS
from tests.deploy.files import DEPLOY, read_json, read_yaml


@pytest.fixture(scope="module")
def services() -> Any:
    return read_yaml(DEPLOY / "compose.yaml")["services"]


def test_what_is_mounted_is_there(services: Any):
    named = read_yaml(DEPLOY / "compose.yaml")["volumes"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in named or (DEPLOY / source).exists(), source


def test_variables_are_settings_of_the_server(services: Any):
    gpu = read_yaml(DEPLOY / "compose.gpu.yaml")["services"]["persimmon"]
    known = {environment_variable(name) for name in Settings.model_fields}
    assert services["persimmon"]["environment"].keys() | gpu["environment"].keys() <= known


def test_the_server_has_the_time_that_its_drain_takes(services: Any):
    server = services["persimmon"]
    drain = float(server["environment"]["PERSIMMON_DRAIN_TIMEOUT"])
    assert drain + FINAL_ERROR_SECONDS + FLUSH_SECONDS < float(server["stop_grace_period"].removesuffix("s"))


def test_the_server_may_write_to_nothing_but_tmp(services: Any):
    server = services["persimmon"]
    assert server["read_only"] is True
    assert server["tmpfs"] == ["/tmp:exec"]
    assert "volumes" not in server


def test_nobody_else_on_the_network_is_listened_to(services: Any):
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])


def test_prometheus_scrapes_the_server_and_reads_the_alert_rules(services: Any):
    config = read_yaml(DEPLOY / "prometheus" / "prometheus.yaml")
    assert [(DEPLOY / "prometheus" / path).exists() for path in config["rule_files"]] == [True]
    (scraped,) = config["scrape_configs"]
    (target,) = scraped["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in services
    assert services[name]["ports"] == [f"127.0.0.1:8000:{port}"]


def test_grafana_finds_its_dashboard_and_asks_prometheus(services: Any):
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    (provider,) = read_yaml(provisioning / "dashboards" / "persimmon.yaml")["providers"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in services["grafana"]["volumes"])
    dashboards = DEPLOY / mounts[provider["options"]["path"]]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (dashboards / home.removeprefix(provider["options"]["path"] + "/")).exists()


def test_a_dashboards_panels_have_places_and_numbers_of_their_own():
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        panels = read_json(path)["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24


def test_an_alert_says_what_is_wrong_and_how_bad_it_is():
    for group in read_yaml(DEPLOY / "prometheus" / "alerts.yaml")["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
            assert rule["annotations"]["description"]
            assert "for" in rule
