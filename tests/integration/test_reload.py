"""SIGHUP: the configuration read again, and all of it applied, or nothing and the reason told."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from client import EINSUM, Client, make_request
from conftest import Site, rng_for, serving, small_weights
from daemon import EINSUMD, Daemon, count, environment, run, seconds, wait_until
from scrape import scrape
from test_supervisor import Supervisor, supervisor  # noqa: F401

APPLIED = "configuration applied"
REFUSED = "configuration not applied, the old one holds"
ENTRY = {"output_dim": 256}
CALLERS = 4


def ends(daemon: Daemon) -> list[dict]:
    return [event for event in daemon.events if event["msg"] in (APPLIED, REFUSED)]


def hang_up(daemon: Daemon) -> dict:
    """SIGHUP, and what came of it."""
    before = len(ends(daemon))
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(ends(daemon)) > before, 30, "the end of a reload")
    return ends(daemon)[before]


def reload(daemon: Daemon, **changes: Any) -> dict:
    """Changes keys of the file; None takes one out."""
    daemon.config = {k: v for k, v in (daemon.config | changes).items() if v is not None}
    daemon.config_path.write_text(json.dumps(daemon.config))
    return hang_up(daemon)


def other_weights(seed: str, layers: int = 2) -> dict[str, oracle.Weight]:
    rng = rng_for(seed)
    return {
        TENSOR_NAME.format(layer): oracle.random_weight(rng, 4, 256, 512) for layer in range(layers)
    }


def names(client: Client) -> list[str]:
    return [weight.name for weight in client.call("ListWeights").weights]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving(tmp_path, small_weights(), 256, http_listen="127.0.0.1:0") as site:
        yield site


# --- what may change ------------------------------------------------------------------------------

# Keys that ServerInfo shows.
LIMITS = {"connections_max": 7, "stream_requests_max": 5, "queue_requests_max": 11,
          "deadline_ms_max": 4321}  # fmt: skip
ELSEWHERE = {"request_log", "request_log_sample", "trace_sample", "max_queue_delay_us",
             "reply_timeout_ms", "weights", "ropes", "drain_grace_ms", "lame_duck_ms",
             "log_level", "log_format"}  # fmt: skip


def test_help_says_which_keys_are_reloadable() -> None:
    """And here is what holds each to its word."""
    keys = set()
    for line in run(EINSUMD, "--help-config").stdout.splitlines():
        if match := re.match(r"  ([a-z]\w*)(?:\[\])?\s", line):
            key = match.group(1)
        elif line.startswith("      ") and line.endswith("[reloadable]"):
            keys.add(key)
    assert keys == set(LIMITS) | ELSEWHERE


def test_limits_change(site: Site, rng: np.random.Generator) -> None:
    event = reload(site.daemon, **LIMITS)
    assert event["msg"] == APPLIED and event["generation"] == 2
    assert set(event["changed"].split(", ")) == set(LIMITS)
    limits = site.client.call("ServerInfo").limits
    assert {key: getattr(limits, key) for key in LIMITS} == LIMITS
    site.check_serves(rng)
    reload(site.daemon, **dict.fromkeys(LIMITS))  # back to the defaults
    assert site.client.call("ServerInfo").limits.deadline_ms_max == 60000


def test_limits_are_held(site: Site, rng: np.random.Generator) -> None:
    """A batch that waits for company makes requests wait; the first limit is 1 of them."""
    assert reload(site.daemon, max_queue_delay_us=400_000)["msg"] == APPLIED
    begin = time.monotonic()
    site.check_serves(rng)
    assert time.monotonic() - begin >= 0.4
    assert reload(site.daemon, queue_requests_max=1)["msg"] == APPLIED
    futures = [site.client.einsum_future(site.good_request(rng)) for _ in range(8)]
    codes = [future.exception().code() for future in futures if future.exception()]
    assert codes and set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert reload(site.daemon, queue_requests_max=None, deadline_ms_max=50)["msg"] == APPLIED
    with pytest.raises(grpc.RpcError) as caught:
        site.client.einsum(site.good_request(rng))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    reload(site.daemon, deadline_ms_max=None, max_queue_delay_us=None)
    site.check_serves(rng)


def test_connections_max_changes(site: Site, rng: np.random.Generator) -> None:
    with Client(site.daemon.address, site.client.schema):
        reload(site.daemon, connections_max=1)
        site.check_serves(rng)  # who is there stays
        newcomer = grpc.insecure_channel(site.daemon.address,
                                         [("grpc.use_local_subchannel_pool", 1)])  # fmt: skip
        with newcomer, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(newcomer).result(0.5)
    reload(site.daemon, connections_max=None)
    with Client(site.daemon.address, site.client.schema) as client:
        site.check_serves(rng, client)


def test_logs_change(site: Site, rng: np.random.Generator) -> None:
    def lines(what: str) -> int:
        return sum(event["msg"] == what for event in site.daemon.events)

    site.check_serves(rng)
    assert lines("request") == 0
    reload(site.daemon, request_log="all")
    site.check_serves(rng)
    wait_until(lambda: lines("request") == 1)
    reload(site.daemon, request_log_sample=1000)
    before = lines("request")
    for _ in range(5):
        site.check_serves(rng)
    assert lines("request") <= before + 1

    def reload_unseen(**changes: Any) -> None:
        before = scrape(site.daemon).value("einsumd_config_generation")
        site.daemon.config |= changes
        site.daemon.config_path.write_text(json.dumps(site.daemon.config))
        site.daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: scrape(site.daemon).value("einsumd_config_generation") > before)

    reload_unseen(log_format="plain")
    wait_until(lambda: f" info {APPLIED} " in site.daemon.lines[-1])
    reload_unseen(log_level="error")
    reload_unseen(log_level="error")
    silent = len(site.daemon.lines)
    reload_unseen(log_level="warn", log_format="json")
    reload_unseen(log_level="info")
    wait_until(lambda: len(site.daemon.lines) > silent)
    assert json.loads(site.daemon.lines[silent])["generation"] == scrape(site.daemon).value(
        "einsumd_config_generation")  # fmt: skip


def test_drain_takes_the_new_times(tmp_path: Path) -> None:
    with serving(tmp_path, small_weights(1), 256) as site:
        reload(site.daemon, lame_duck_ms=700, drain_grace_ms=1234)
        begin = time.monotonic()
        site.daemon.terminate()
        event = site.daemon.wait_event("draining")
        assert (event["lame_duck_ms"], event["grace_ms"]) == (700, 1234)
        assert site.daemon.wait_exit() == 0
        assert time.monotonic() - begin >= 0.7


# --- weights --------------------------------------------------------------------------------------


def test_weights_come_go_and_are_replaced(site: Site, rng: np.random.Generator) -> None:
    first = dict(site.weights)
    second = other_weights("second")
    path = write_checkpoint(site.root / "second", second)
    entry = {"path": "model"} | ENTRY
    generations = {w.name: w.generation for w in site.client.call("ListWeights").weights}

    # One more comes; what was there is not touched.
    more = {"path": "second", "name_prefix": "b."} | ENTRY
    assert reload(site.daemon, weights=[*site.daemon.config["weights"], more])["msg"] == APPLIED
    assert len(names(site.client)) == 4
    now = {w.name: w.generation for w in site.client.call("ListWeights").weights}
    assert all(now[name] == generation for name, generation in generations.items())

    # The first is replaced by the second's, the other goes.
    replaced = [{"path": str(path)} | ENTRY]
    event = reload(site.daemon, weights=replaced)
    assert event["msg"] == APPLIED and event["changed"] == "weights"
    site.weights = second
    site.check_serves(rng)
    now = {w.name: w.generation for w in site.client.call("ListWeights").weights}
    assert now.keys() == generations.keys()
    assert all(now[name] > generation for name, generation in generations.items())

    # All go, and the first come back under a generation that was never theirs.
    assert reload(site.daemon, weights=[])["msg"] == APPLIED
    assert names(site.client) == []
    assert reload(site.daemon, weights=[entry])["msg"] == APPLIED
    site.weights = first
    site.check_serves(rng)
    assert {w.name: w.generation for w in site.client.call("ListWeights").weights} != now
    assert scrape(site.daemon).value("einsumd_config_generation") == 5


def test_what_load_weights_loaded_is_left_alone(site: Site, rng: np.random.Generator) -> None:
    write_checkpoint(site.root / "second", other_weights("second"))
    site.client.load("second", name_prefix="rpc.", output_dim=256)
    assert reload(site.daemon, weights=[])["msg"] == APPLIED
    assert {name.split(".")[0] for name in names(site.client)} == {"rpc"}

    # An entry of the same names would replace it, and so is refused.
    event = reload(site.daemon, weights=[{"path": "second", "name_prefix": "rpc."} | ENTRY])
    assert event["msg"] == REFUSED and event["key"] == "weights"
    assert "is resident by another entry, or by LoadWeights" in event["reason"]
    site.client.call("UnloadWeights", names=["rpc.*"])
    assert hang_up(site.daemon)["msg"] == APPLIED
    assert len(names(site.client)) == 2


def test_ropes_change(tmp_path: Path, rng: np.random.Generator) -> None:
    rope = [{"weights": "*", "theta": 10000}]
    with serving(tmp_path, small_weights(1), 256, ropes=rope) as site:
        name = names(site.client)[0]
        assert site.client.call("GetWeight", name=name).weight.rope.theta == 10000
        assert reload(site.daemon, ropes=[{"weights": "*", "theta": 500}])["msg"] == APPLIED
        assert site.client.call("GetWeight", name=name).weight.rope.theta == 500
        site.check_serves(rng)
        event = reload(site.daemon, ropes=[{"weights": "*", "cache": "gone.safetensors"}])
        assert event["msg"] == REFUSED and event["key"] == "ropes"
        assert event["reason"].startswith("ropes[0].")
        assert site.client.call("GetWeight", name=name).weight.rope.theta == 500


class Callers:
    """Calls each layer in turn without pause, and notes which checkpoint answered: the old bits, or
    the new ones."""

    def __init__(self, site: Site, *checkpoints: dict[str, oracle.Weight]):
        self.site = site
        self.checkpoints = checkpoints
        self.stop = threading.Event()
        self.calls = [0] * CALLERS
        rng = rng_for("callers")
        self.cases = []
        for name, weight in checkpoints[0].items():
            activations = oracle.random_activations(rng, weight, 5, "UE8M0")
            request = make_request(site.client, name, weight, activations)
            self.cases.append((name, activations, request))

    def learn(self, checkpoint: int) -> None:
        """The daemon's own answers, checked by the oracle once."""
        for index, (name, activations, request) in enumerate(self.cases):
            output = self.site.client.einsum(request).output
            expected = self.site.expected(activations, self.checkpoints[checkpoint][name])
            oracle.check(output, "BF16", *expected)
            self.answers.setdefault(index, {})[checkpoint] = output, expected

    answers: dict[int, dict[int, Any]]

    def checkpoint_of(self, index: int, output: bytes) -> int:
        """By the bits; their last may depend on who else is in the batch, and then by the oracle."""
        for checkpoint, (wanted, _) in self.answers[index].items():
            if output == wanted:
                return checkpoint
        for checkpoint, (_, expected) in self.answers[index].items():
            with contextlib.suppress(AssertionError):
                oracle.check(output, "BF16", *expected)
                return checkpoint
        raise AssertionError(f"layer {index}: the answer is neither checkpoint's")

    def call_on_and_on(self, worker: int) -> int:
        """Once a caller has seen the next checkpoint, no layer of the one before is seen again."""
        seen = changes = 0
        with Client(self.site.daemon.address, self.site.client.schema) as client:
            while not self.stop.is_set():
                for index, (_, _, request) in enumerate(self.cases):
                    came = self.checkpoint_of(index, client.einsum(request, seconds(30)).output)
                    self.calls[worker] += 1
                    # Alternately 0 and 1, so a step back shows as a second change.
                    changes += came != seen
                    seen = came
        return changes


def test_weights_are_replaced_under_load(site: Site) -> None:
    second = other_weights("second")
    paths = ["model", "second"]
    write_checkpoint(site.root / "second", second)
    callers = Callers(site, site.weights, second)
    callers.answers = {}
    for checkpoint in (0, 1, 0):  # learn both, and begin with the first
        reload(site.daemon, weights=[{"path": paths[checkpoint]} | ENTRY])
        if checkpoint not in callers.answers.get(0, {}):
            callers.learn(checkpoint)
    rounds = count(20)
    with ThreadPoolExecutor(CALLERS) as pool:
        futures = [pool.submit(callers.call_on_and_on, i) for i in range(CALLERS)]
        for i in range(rounds):
            event = reload(site.daemon, weights=[{"path": paths[(i + 1) % 2]} | ENTRY])
            assert event["msg"] == APPLIED
            before = list(callers.calls)
            # The call after one that was under way has seen the change.
            wait_until(lambda before=before: any(future.done() for future in futures) or
                       all(now > then + 2 for now, then in
                           zip(callers.calls, before, strict=True)),
                       30, "everybody's calls go on")  # fmt: skip
            [future.result() for future in futures if future.done()]
        callers.stop.set()
        changes = [future.result() for future in futures]  # raises if a call failed
    # One change for each reload: never mixed, never back.
    assert changes == [rounds] * CALLERS


# --- what may not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, key, mentions", [
    ({"batch_tokens_max": 256}, "batch_tokens_max", "needs a restart: 512 is in force, got 256"),
    ({"listen": ["127.0.0.1:1"]}, "listen", "needs a restart"),
    ({"lanes": 1, "log_level": "debug"}, "lanes", "needs a restart"),
    ({"weights_roots": []}, "weights_roots", "must name the directory"),
    ({"deadline_ms_max": 0}, "deadline_ms_max", "expected an integer from 1"),
    ({"deadlines_ms_max": 5}, "deadlines_ms_max", 'did you mean "deadline_ms_max"?'),
    ({"weights": [{"path": "gone"}]}, "weights", "weights[0]: "),
    ({"weights": [{"path": "../.."}]}, "weights", "weights[0]: "),
    ({"weights": [{"path": "model"} | ENTRY, {"path": "model"} | ENTRY]}, "weights",
     "comes with another entry"),
    ({"weights": [{"path": "second", "name_prefix": "x."} | ENTRY, {"path": "gone"}]}, "weights",
     "weights[1]: "),
    ({"ropes": [{"weights": "*", "theta": 10000}]}, "ropes", "the first needs a restart"),
])  # fmt: skip
def test_refused(
    site: Site, rng: np.random.Generator, changes: dict, key: str, mentions: str
) -> None:
    """One line that names the key; and all is as it was, also what could have changed."""
    write_checkpoint(site.root / "second", other_weights("second"))
    good = dict(site.daemon.config)
    before = site.client.call("ListWeights")
    event = reload(site.daemon, lame_duck_ms=1, **changes)
    assert event["msg"] == REFUSED and event["level"] == "warn"
    assert event["key"] == key and mentions in event["reason"]
    assert site.client.call("ListWeights").weights == before.weights
    site.check_serves(rng)
    page = scrape(site.daemon)
    assert page.value("einsumd_config_generation") == 1
    assert page.value("einsumd_config_reloads_total", outcome="refused") == 1
    site.daemon.config = good
    assert reload(site.daemon)["changed"] == ""  # the old one is a good one
    site.daemon.terminate()
    assert site.daemon.wait_event("draining")["lame_duck_ms"] == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"log_level": "info", "log_level": "info"}'])
def test_refused_text(site: Site, rng: np.random.Generator, text: str) -> None:
    site.daemon.config_path.write_text(text)
    event = hang_up(site.daemon)
    assert event["msg"] == REFUSED and str(site.daemon.config_path) in event["reason"]
    site.check_serves(rng)


def test_refused_files(site: Site, rng: np.random.Generator) -> None:
    path = site.daemon.config_path
    text = path.read_text()
    path.unlink()
    assert "No such file" in hang_up(site.daemon)["reason"]
    os.mkfifo(path)
    assert "is not a file that can be read again" in hang_up(site.daemon)["reason"]
    path.unlink()
    path.mkdir()
    assert hang_up(site.daemon)["msg"] == REFUSED
    path.rmdir()
    path.write_text(text)
    assert hang_up(site.daemon)["msg"] == APPLIED
    site.check_serves(rng)


def test_a_damaged_checkpoint_is_refused_and_its_memory_freed(
    site: Site, rng: np.random.Generator
) -> None:
    path = write_checkpoint(site.root / "second", other_weights("second"), shards=2)
    shard = sorted(path.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-4096])
    bytes_before = scrape(site.daemon).value("einsumd_memory_bytes", kind="weights")
    for _ in range(3):
        event = reload(site.daemon, weights=[{"path": "second"} | ENTRY])
        assert event["msg"] == REFUSED and event["key"] == "weights"
    page = scrape(site.daemon)
    assert page.value("einsumd_memory_bytes", kind="weights") == bytes_before
    site.check_serves(rng)


# --- when -----------------------------------------------------------------------------------------


def test_tokens_are_read_again_with_the_rest_or_not(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """A table of tokens that is no good keeps the weights of the same reload out, too."""
    tokens = tmp_path / "tokens.json"

    def entry(token: str) -> dict[str, Any]:
        digest = hashlib.sha256(token.encode()).hexdigest()
        return {"name": token, "sha256": digest, "scopes": ["infer"]}

    def may(client: Client, token: str) -> bool:
        request = client.schema.message("einsum.v1.SelfTestRequest")()
        try:
            client.callable(EINSUM, "SelfTest")(
                request, timeout=30, metadata=[("authorization", f"Bearer {token}")]
            )
        except grpc.RpcError as error:  # without weights there is nothing to test
            return error.code() != grpc.StatusCode.UNAUTHENTICATED
        return True

    tokens.write_text(json.dumps({"tokens": [entry("old")]}))
    with serving(
        tmp_path, small_weights(), 256, tokens_file=str(tokens), tcp_scopes=["read"],
        access_look_ms=86_400_000,
    ) as site:  # fmt: skip
        assert may(site.client, "old")
        before = names(site.client)
        tokens.write_text(json.dumps({"tokens": [entry("new"), {"name": "half"}]}))
        refused = reload(site.daemon, weights=[])
        assert refused["msg"] == REFUSED and "tokens[1]" in refused["reason"]
        assert refused["key"] == "tokens_file"
        assert names(site.client) == before
        tokens.write_text(json.dumps({"tokens": [entry("new")]}))
        assert hang_up(site.daemon)["msg"] == APPLIED
        assert names(site.client) == []
        assert may(site.client, "new") and not may(site.client, "old")


def test_a_storm(site: Site, rng: np.random.Generator) -> None:
    """However many come, the file as it was last is what holds."""
    for i in range(count(300)):
        site.daemon.config["deadline_ms_max"] = 1000 + i
        new = site.daemon.config_path.with_suffix(".new")
        new.write_text(json.dumps(site.daemon.config))
        new.rename(site.daemon.config_path)
        site.daemon.process.send_signal(signal.SIGHUP)
        if i % 50 == 0:
            site.check_serves(rng)
    wanted = site.daemon.config["deadline_ms_max"]
    wait_until(lambda: site.client.call("ServerInfo").limits.deadline_ms_max == wanted)
    assert all(event["msg"] == APPLIED for event in ends(site.daemon))


def test_while_draining(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=800) as site:
        site.daemon.terminate()
        site.daemon.wait_event("draining")
        site.daemon.process.send_signal(signal.SIGHUP)
        site.daemon.wait_event("SIGHUP ignored: draining")
        site.check_serves(rng)
        assert site.daemon.wait_exit() == 0


@pytest.mark.parametrize("delay", [0, 0.002, 0.01, 0.05])
def test_drain_while_reloading(tmp_path: Path, delay: float) -> None:
    """Whichever comes first, the end is an orderly one."""
    with serving(tmp_path, small_weights(1), 256) as site:
        write_checkpoint(site.root / "second", other_weights("second", layers=12))
        site.daemon.config["weights"] = [{"path": "second"} | ENTRY]
        site.daemon.config_path.write_text(json.dumps(site.daemon.config))
        site.daemon.process.send_signal(signal.SIGHUP)
        time.sleep(delay)
        site.daemon.terminate()
        assert site.daemon.wait_exit() == 0


def blocks_hangup(daemon: Daemon) -> bool:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return bool(int(re.search(r"SigBlk:\s*(\w+)", status).group(1), 16) & 1)


@pytest.mark.parametrize("delay", [0, 0.03, 0.1, 0.2])
def test_while_starting(tmp_path: Path, delay: float) -> None:
    """It waits until the daemon serves; many are one."""
    write_checkpoint(tmp_path / "model", other_weights("many", layers=24))
    daemon = Daemon(tmp_path, wait=False, weights_roots=[str(tmp_path)],
                    weights=[{"path": "model"} | ENTRY])  # fmt: skip
    with daemon:
        wait_until(lambda: blocks_hangup(daemon))  # it has come to main
        time.sleep(seconds(delay))
        for _ in range(10):
            daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_ready()
        wait_until(lambda: ends(daemon))
        assert ends(daemon)[0]["msg"] == APPLIED
        with Client(daemon.address) as client:
            assert len(names(client)) == 24


def test_without_a_file_to_read_again(tmp_path: Path) -> None:
    """A configuration that came by a pipe is gone."""
    socket = tmp_path / "socket"
    read_end, write_end = os.pipe()
    os.write(write_end, json.dumps({"listen": [f"unix:{socket}"]}).encode())
    os.close(write_end)
    process = subprocess.Popen([EINSUMD, "--config", f"/dev/fd/{read_end}"], pass_fds=[read_end],
                               stderr=subprocess.PIPE, text=True, env=environment())  # fmt: skip
    os.close(read_end)
    for line in process.stderr:
        if " ready " in line:
            process.send_signal(signal.SIGHUP)
        if "not applied" in line:
            assert "is not a file that can be read again" in line or "No such" in line
            process.send_signal(signal.SIGTERM)
    assert process.wait(seconds(30)) == 0


def test_the_supervisor_is_told(tmp_path: Path, supervisor: Supervisor) -> None:  # noqa: F811
    with Daemon(tmp_path, extra_environment=supervisor.environment) as daemon:
        supervisor.wait_for("READY")
        for changes, status in (({"log_level": "debug"}, f"serving on {daemon.address}"),
                                ({"lanes": 9}, "lanes: needs a restart")):  # fmt: skip
            asked_us = time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6
            reload(daemon, **changes)
            begun = supervisor.wait_for("RELOADING")
            assert asked_us <= int(begun["MONOTONIC_USEC"])
            assert status in supervisor.wait_for("READY")["STATUS"]
