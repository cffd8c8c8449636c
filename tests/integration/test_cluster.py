"""Three daemons on three hosts, behind nginx and behind gRPC's own round robin: each is stopped and
comes back while stock clients call without pause."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from client import Client, make_request
from cluster import PORT, Host, Network, Nginx
from cluster_load import Case
from conftest import rng_for, small_weights
from daemon import EINSUMCTL, count, environment, run, seconds, wait_until

HOSTS = 3
LAME_DUCK_MS = 1000
NGINX_SLEEP_S = 0.06  # less than an eighth of LAME_DUCK_MS, see connections_leave_idle
NGINX_SLEEPS = 10  # in LAME_DUCK_MS
TOKENS = [1, 3, 200]  # the last is larger than what gRPC keeps for a retry by default, 256 KiB
LOAD = Path(__file__).with_name("cluster_load.py")


class Cluster:
    nginx: Nginx

    def __init__(self, directory: Path, network: Network):
        self.network = network
        self.weights = small_weights(1)
        model = write_checkpoint(directory / "root/model", self.weights, shards=1)
        self.hosts = [
            Host(network, index, directory / f"host{index}", lame_duck_ms=LAME_DUCK_MS,
                 weights_roots=[str(directory / "root")], compute_threads=1, rpc_threads=1,
                 weights=[{"path": str(model), "output_dim": 256}])
            for index in range(HOSTS)
        ]  # fmt: skip
        self.cases = directory / "cases"
        self.cases.write_bytes(pickle.dumps(self.make_cases()))

    def make_cases(self) -> list[Case]:
        rng = rng_for("cluster")
        name = TENSOR_NAME.format(0)
        weight = self.weights[name]
        cases = []
        with Client(self.hosts[0].socket) as client:
            self.schema = client.schema
            for tokens in TOKENS:
                activations = oracle.random_activations(rng, weight, tokens, "UE8M0")
                request = make_request(client, name, weight, activations)
                output = client.einsum(request).output
                expected = oracle.project(activations, weight, client.sums_by_wgmma())
                oracle.check(output, "BF16", *expected)
                cases.append(Case(request.SerializeToString(), output, expected))
        return cases

    def answered(self) -> list[int]:
        """By each daemon since it was started."""
        counts = []
        for host in self.hosts:
            with Client(host.socket, self.schema) as client:
                counts.append(client.counters().answered)
        return counts

    def wait_spread(self) -> None:
        """Every daemon answers, the one that was started last among them."""
        before = self.answered()
        wait_until(lambda: all(now - then >= count(20) for then, now in
                               zip(before, self.answered(), strict=True)), 20,
                   "load on every daemon")  # fmt: skip

    def restart_each(self) -> None:
        for host in self.hosts:
            self.wait_spread()
            host.restart()
        self.wait_spread()

    def targets(self) -> dict[str, str]:
        return {
            "nginx": f"{self.network.hub_address}:{PORT}",
            "round robin": "ipv4:" + ",".join(host.address for host in self.hosts),
        }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with Network(HOSTS) as network:
        site = Cluster(directory, network)
        with Nginx(directory / "nginx", network) as site.nginx:
            yield site
        for host in site.hosts:
            host.daemon.stop()


class Caller:
    """cluster_load.py in the hub."""

    def __init__(self, cluster: Cluster, balancer: str, channels: int = 2, callers: int = 8,
                 streams: int = 1):  # fmt: skip
        arguments = [cluster.targets()[balancer], cluster.cases, channels, callers, streams]
        inside = cluster.network.inside(cluster.network.hub)
        self.process = subprocess.Popen(
            [*inside, sys.executable, LOAD, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.process.kill()
        output, _ = self.process.communicate(timeout=seconds(60))
        if kind is None:
            assert self.process.returncode == 0
            self.result = json.loads(output)
            print(self.result)

    def judge(self, stream_ends: set[str], failures_max: int = 0) -> None:
        result = self.result
        assert len(result["failures"]) <= failures_max, result["failures"]
        assert result["wrong"] == 0
        assert result["calls"] > 0 and result["stream_calls"] > 0
        ends = {key for key in result if key.startswith("stream ended ")}
        assert ends <= {f"stream ended {code}" for code in stream_ends}


@pytest.mark.parametrize("drains", [HOSTS, pytest.param(102, marks=pytest.mark.slow)])
@pytest.mark.parametrize("balancer", ["nginx", "round robin"])
def test_rolling_restart(cluster: Cluster, balancer: str, drains: int) -> None:
    """No call fails, none is answered wrongly, and who comes back gets work again."""
    with Caller(cluster, balancer) as caller:
        for _ in range(drains // HOSTS):
            cluster.restart_each()
    caller.judge({"UNAVAILABLE"})


def test_restart_while_nginx_sleeps(cluster: Cluster) -> None:
    """No connection's end reaches nginx together with a reply, late as it may look."""
    with Caller(cluster, "nginx") as caller:
        for host in cluster.hosts * 2:
            cluster.wait_spread()
            host.daemon.process.send_signal(signal.SIGTERM)
            for _ in range(NGINX_SLEEPS):
                time.sleep(LAME_DUCK_MS / 1000 / NGINX_SLEEPS - NGINX_SLEEP_S)
                with cluster.nginx.asleep():
                    time.sleep(NGINX_SLEEP_S)
            host.restart()
        cluster.wait_spread()
    caller.judge({"UNAVAILABLE"})


def test_rolling_restart_c_client(cluster: Cluster) -> None:
    """The same for the C client, by its own retries."""
    network = cluster.network
    bench = subprocess.Popen(
        [*network.inside(network.hub), EINSUMCTL, "--endpoint", cluster.targets()["nginx"], "bench",
         "--retry", "--tokens", "1,8", "--concurrency", "4", "--connections", "2",
         "--duration", "12"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    for host in cluster.hosts:
        cluster.wait_spread()
        host.restart()
    output, _ = bench.communicate(timeout=seconds(60))
    assert bench.returncode == 0, output


def test_nginx_keeps_to_itself_what_is_of_one_daemon(cluster: Cluster) -> None:
    network = cluster.network
    result = run(*network.inside(network.hub), EINSUMCTL, "--endpoint", cluster.targets()["nginx"],
                 "weights", "unload", TENSOR_NAME.format(0))  # fmt: skip
    assert result.returncode == 4 and "PERMISSION_DENIED" in result.stderr, result


@pytest.mark.parametrize("balancer", ["nginx", "round robin"])
def test_kill(cluster: Cluster, balancer: str) -> None:
    """Without a farewell, what was in flight is asked again elsewhere, by the retry policy; but for
    a call whose reply had begun to arrive."""
    with Caller(cluster, balancer) as caller:
        for host in cluster.hosts:
            cluster.wait_spread()
            host.daemon.kill()
            time.sleep(0.5)
            host.start()
        cluster.wait_spread()
    caller.judge({"UNAVAILABLE", "INTERNAL"}, failures_max=HOSTS)
