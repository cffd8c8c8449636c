"""What deploy/ has for Prometheus and Grafana, against their own tools and a real Prometheus that
scrapes a real daemon: a query that names a series nobody has would just show nothing."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from conftest import Site, rng_for, serving, small_weights
from daemon import BUILD_DIR, REPOSITORY, run, seconds, wait_until
from scrape import Page, scrape

DASHBOARD = REPOSITORY / "deploy/grafana/einsumd.json"
PROMETHEUS = REPOSITORY / "deploy/prometheus"
RULES = PROMETHEUS / "einsumd.rules.yml"
RULES_TEST = REPOSITORY / "tests/prometheus/einsumd.rules.test.yml"

register_default_plugins()


def panels() -> list[dict]:
    return [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]


def dashboard_queries() -> dict[str, str]:
    """As Grafana sends them, its variables filled in."""
    filled = {"$__rate_interval": "5s", "$job": ".+", "$instance": ".+"}
    queries = {}
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in filled.items():
                query = query.replace(name, value)
            assert "$" not in query, query
            queries[f"{panel['title']} {target['refId']}"] = query
    return queries


def alerts() -> dict[str, str]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


# --- by their own tools ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", RULES), ("check", "config", PROMETHEUS / "prometheus.yml"),
     ("test", "rules", RULES_TEST)],
    ids=["rules", "config", "rules-tests"],
)  # fmt: skip
def test_promtool(arguments: tuple) -> None:
    result = run("promtool", *arguments)
    assert result.returncode == 0 and "FAILED" not in result.stdout, result.stdout + result.stderr


def test_compose_joins_them(tmp_path: Path) -> None:
    """Who scrapes whom, and what is mounted where, in the one node of deploy/compose."""
    folder = REPOSITORY / "deploy/compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    mounted = {
        name: {v["target"]: (folder / v["source"]).resolve() for v in service["volumes"]
               if isinstance(v, dict) and not v["source"].startswith("$")}
        for name, service in services.items()
    }  # fmt: skip
    for target, source in [item for mounts in mounted.values() for item in mounts.items()]:
        assert source.exists(), f"{target} is mounted from nothing"
    # As they lie in the container, promtool finds the rules that the configuration names.
    for target, source in mounted["prometheus"].items():
        (tmp_path / Path(target).name).write_text(source.read_text())
    checked = run("promtool", "check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0 and "14 rules found" in checked.stdout, checked.stdout
    scraped = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = scraped[0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    einsumd = json.loads((folder / "einsumd.json").read_text())
    assert host in services and einsumd["http_listen"] == f"0.0.0.0:{port}"

    provisioning = mounted["grafana"]["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    (provider,) = yaml.safe_load((provisioning / "dashboards/einsumd.yml").read_text())["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounted["grafana"][home] == DASHBOARD
    assert Path(home).parent == Path(provider["options"]["path"])


def test_every_alert_has_what_people_need() -> None:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "description"}
    tested = RULES_TEST.read_text()
    untested = [a for a in alerts() if not re.search(rf"alertname: {a}\b", tested)]
    assert set(untested) <= {
        "EinsumdConnectionsNearLimit", "EinsumdFileDescriptorsNearLimit", "EinsumdLosesLogOrTraces",
    }  # fmt: skip


def lost(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """What of `ours` is not in `theirs`."""
    if isinstance(ours, dict):
        if not isinstance(theirs, dict):
            return [at]
        return [x for key, value in ours.items() for x in lost(value, theirs.get(key), f"{at}.{key}")]
    if isinstance(ours, list):
        if not isinstance(theirs, list) or len(theirs) != len(ours):
            return [at]
        return [x for i, value in enumerate(ours) for x in lost(value, theirs[i], f"{at}[{i}]")]
    return [] if ours == theirs else [at]


def read_back(raw: dict) -> dict:
    """Through Grafana's own schema, which drops what it does not know."""
    return json.loads(json.dumps(Dashboard.from_json(raw), cls=JSONEncoder))


def test_dashboard_is_grafanas() -> None:
    raw = json.loads(DASHBOARD.read_text())
    assert not lost(raw, read_back(raw))


def test_schema_finds_mistakes() -> None:
    """Or else the test before shows nothing."""
    for path in (("title",), ("panels", 1, "gridPos"), ("panels", 1, "targets", 0, "expr"),
                 ("panels", 1, "options", "colorMode"), ("templating", "list", 1, "refresh")):  # fmt: skip
        raw = json.loads(DASHBOARD.read_text())
        inner: Any = raw
        for key in path[:-1]:
            inner = inner[key]
        inner[str(path[-1]) + "x"] = inner.pop(path[-1])
        assert lost(raw, read_back(raw)), path


def test_panels_do_not_overlap() -> None:
    raw = json.loads(DASHBOARD.read_text())
    taken: dict[tuple[int, int], str] = {}
    for panel in raw["panels"]:
        at = panel["gridPos"]
        assert 0 <= at["x"] and at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]
    assert len({panel["id"] for panel in raw["panels"]}) == len(raw["panels"])


# --- against a daemon -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With a GPU, as far as NVML goes, and every kind of figure."""
    fake = str(BUILD_DIR / "tests/fake_nvml")
    with serving(
        tmp_path_factory.mktemp("dashboard"), small_weights(1), 256,
        http_listen="127.0.0.1:0", phase_sample=1, extra_environment={"LD_LIBRARY_PATH": fake},
    ) as site:  # fmt: skip
        yield site


def series_of(query: str) -> set[str]:
    without_labels = re.sub(r'"[^"]*"', "", query)
    return set(re.findall(r"\b(?:einsumd|process)_\w+", without_labels))


def test_queries_name_what_there_is(site: Site) -> None:
    page: Page = scrape(site.daemon)
    there = {name for name, _ in page.samples}
    queries = dashboard_queries() | alerts()
    for what, query in queries.items():
        named = series_of(query)
        assert named or what == "EinsumdDown", what
        assert named <= there, f"{what}: {named - there}"
    # And the labels that they choose by.
    labels = {label for _, pairs in page.samples for label, _ in pairs} | {"job", "instance"}
    for what, query in queries.items():
        assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", query)) <= labels, what


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=seconds(30)) as reply:
            return json.load(reply)

    def query(self, expression: str) -> list:
        answer = self.get("/api/v1/query", query=expression)
        assert answer["status"] == "success", expression
        return answer["data"]["result"]

    def ready(self) -> bool:
        try:
            return bool(self.get("/api/v1/targets")["data"]["activeTargets"])
        except OSError:
            return False


@contextlib.contextmanager
def prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    """Debian's, with our rules, scraping every second."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={directory}/prometheus.yml",
             f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            server = Prometheus(port)
            wait_until(server.ready, 60, "prometheus is up")
            yield server
        finally:
            process.terminate()
            process.wait(30)


def test_queries_in_prometheus(site: Site, tmp_path: Path) -> None:
    """Every picture of the dashboard has something to show, and no alert fires on a daemon at work."""
    rng: np.random.Generator = rng_for("dashboard")
    request = site.good_request(rng)
    with prometheus(tmp_path, site.daemon.http_address) as server:

        def enough() -> bool:
            for _ in range(20):
                site.client.einsum(request)
            scraped = server.query("count_over_time(einsumd_ready[1m])")
            return bool(scraped) and int(scraped[0]["value"][1]) >= 5

        wait_until(enough, 60, "five scrapes")
        empty = [what for what, query in dashboard_queries().items() if not server.query(query)]
        assert not empty
        for _, expression in alerts().items():
            server.query(expression)
        rules = server.get("/api/v1/rules")["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
        firing = {rule["name"] for rule in rules if rule["state"] != "inactive"}
        # The stand-in for NVML says that its GPU is too hot.
        assert firing <= {"EinsumdGpuHeldDown"}, firing
        assert server.query('up{job="einsumd"}')[0]["value"][1] == "1"
