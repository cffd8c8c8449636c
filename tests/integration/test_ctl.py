"""einsumctl, the command line tool, against a running daemon: what it prints, writes and exits
with."""

from __future__ import annotations

import json
import re
import shutil
import signal
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from conftest import Site, serving, small_weights
from daemon import EINSUMCTL, EINSUMD, Daemon, environment, run, seconds

OK, FAILED, USAGE, UNREACHABLE, REFUSED = range(5)

NAME = TENSOR_NAME.format(0)
COMMANDS = ["info", "health", "weights", "selftest", "run", "check", "bench", "make-checkpoint"]


class Ctl:
    """Runs einsumctl against one daemon, and checks how it ends."""

    def __init__(self, site: Site):
        self.address = site.daemon.address

    def __call__(
        self, *arguments: Any, expect: int = OK, cwd: Path | None = None
    ) -> subprocess.CompletedProcess:
        done = run(EINSUMCTL, "--endpoint", self.address, *arguments, cwd=cwd)
        assert done.returncode == expect, f"{done.args}\n{done.stdout}\n{done.stderr}"
        assert (done.stderr == "") == (expect == OK) or expect == FAILED, done.stderr
        return done

    def json(self, *arguments: Any, expect: int = OK) -> Any:
        """What it prints with --json must be one JSON document, whatever happened."""
        return json.loads(self("--json", *arguments, expect=expect).stdout)


@pytest.fixture
def ctl(small: Site) -> Ctl:
    return Ctl(small)


# --- looking --------------------------------------------------------------------------------------


def test_help() -> None:
    shown = run(EINSUMCTL, "--help")
    assert shown.returncode == OK
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", shown.stdout, re.M), command
        of_command = run(EINSUMCTL, command, "--help")
        assert of_command.returncode == OK
        assert f"einsumctl {command}" in of_command.stdout
        assert of_command.stderr == ""
    for code in range(5):
        assert re.search(rf"^  {code}  ", shown.stdout, re.M), f"exit code {code} is told"
    version = run(EINSUMD, "--version").stdout.split()[-1]
    assert version in run(EINSUMCTL, "--version").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["info", "--no-such-option"],
        ["info", "stray"],
        ["--timeout", "soon", "info"],
        ["--endpoint"],
        ["run"],
        ["run", "--weight", NAME],
        ["run", "--weight", NAME, "--random", "0"],
        ["run", "--weight", NAME, "--random", "4", "--scale-type", "fp64"],
        ["bench", "--concurrency", "0"],
        ["bench", "--tokens", "1,,2"],
        ["check"],
        ["weights"],
        ["weights", "polish"],
        ["weights", "get"],
        ["make-checkpoint"],
        ["make-checkpoint", "--model", "v9", "somewhere"],
    ],
)
def test_usage(small: Site, tmp_path: Path, arguments: list[str]) -> None:
    done = run(EINSUMCTL, *arguments, cwd=tmp_path, timeout=10)
    if arguments[:1] == ["run"] and len(arguments) > 2:  # these ask the daemon first
        done = run(EINSUMCTL, "--endpoint", small.daemon.address, *arguments, cwd=tmp_path)
    assert done.returncode == USAGE, done
    assert done.stderr.startswith("einsumctl: ")
    assert list(tmp_path.iterdir()) == []


def test_info(ctl: Ctl, small: Site) -> None:
    info = ctl.json("info")
    served = small.client.call("ServerInfo")
    assert info["version"] == served.version
    assert info["state"] == "serving"
    assert info["device"] == served.device
    assert info["buckets"] == list(served.buckets)
    for part in ("limits", "memory"):
        message = getattr(served, part)
        expected = {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}
        if part == "memory":
            expected["graphs"] = [
                {"bucket": of.bucket, "graphs": of.graphs, "device_bytes": of.device_bytes}
                for of in message.graphs
            ]
        assert info[part] == expected
    assert len(info["counters"]["bucket_batches"]) == len(info["buckets"])
    assert set(info["counters"]) == set(served.counters.DESCRIPTOR.fields_by_name)
    text = ctl("info").stdout
    assert served.version in text and served.kernel in text


def test_health(ctl: Ctl) -> None:
    assert ctl("health").stdout == "SERVING\n"
    assert ctl.json("health", "einsum.v1.Einsum") == {
        "service": "einsum.v1.Einsum",
        "status": "SERVING",
    }
    ctl("health", "no.such.service", expect=REFUSED)


def test_health_while_draining(tmp_path: Path) -> None:
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=2000) as site:
        site.daemon.terminate()
        site.daemon.wait_event("draining")
        assert Ctl(site)("health", expect=FAILED).stdout == "NOT_SERVING\n"


def test_unreachable(tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", f"unix:{tmp_path}/none.sock"):
        for command in (["info"], ["health"], ["weights", "list"]):
            done = run(EINSUMCTL, "--endpoint", address, "--timeout", 500, "--json", *command)
            assert done.returncode == UNREACHABLE, done
            error = json.loads(done.stdout)["error"]
            assert error["status"] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
            assert done.stderr


def test_endpoint_by_environment_and_socket(tmp_path: Path) -> None:
    with Daemon(tmp_path, listen=[f"unix:{tmp_path}/e.sock"]) as daemon:
        settings = environment({"EINSUMD_ENDPOINT": daemon.address})
        done = subprocess.run(
            [EINSUMCTL, "health"], capture_output=True, text=True, env=settings, timeout=seconds(20)
        )
        assert (done.returncode, done.stdout) == (OK, "SERVING\n"), done.stderr


def test_selftest(ctl: Ctl, small: Site) -> None:
    verdict = ctl.json("selftest")
    assert verdict["passed"] is True
    assert [result["weight"] for result in verdict["results"]] == sorted(small.weights)
    assert all(result["worst_error_ratio"] <= 1 for result in verdict["results"])
    assert "passed" in ctl("selftest", NAME).stdout
    assert ctl.json("selftest", "none", expect=REFUSED)["error"]["status"] == "NOT_FOUND"


# --- weights --------------------------------------------------------------------------------------


def test_weights(ctl: Ctl, small: Site, rng: np.random.Generator) -> None:
    listed = ctl.json("weights", "list")["weights"]
    assert [weight["name"] for weight in listed] == sorted(small.weights)
    assert ctl.json("weights", "get", NAME) == listed[0]
    assert NAME in ctl("weights", "get", f"model.{NAME}.weight").stdout
    error = ctl.json("weights", "get", "none", expect=REFUSED)["error"]
    assert (error["status"], error["code"], error["from_server"]) == ("NOT_FOUND", 5, True)

    weights = {TENSOR_NAME.format(i): oracle.random_weight(rng, 4, 256, 512) for i in range(3)}
    write_checkpoint(small.root / "for ctl", weights)
    load = ["weights", "load", "for ctl", "--output-dim", 256, "--name-prefix", "ctl."]
    loaded = ctl.json(*load, "--tp-rank", 1, "--tp-size", 2)["weights"]
    assert [weight["name"] for weight in loaded] == [f"ctl.{name}" for name in weights]
    assert all(weight["groups"] == 2 for weight in loaded)
    assert ctl.json(*load, expect=REFUSED)["error"]["status"] == "ALREADY_EXISTS"
    pattern = "layers.[02].*"
    reloaded = ctl.json(*load, "--replace", "--tensors", f"{pattern}wo_a.weight")["weights"]
    assert [weight["groups"] for weight in reloaded] == [4, 4]
    gone = ctl.json("weights", "unload", "ctl.layers.1.attn.wo_a", "ctl.*")["unloaded"]
    assert sorted(gone) == [f"ctl.{name}" for name in weights]
    error = ctl.json("weights", "load", "/etc", expect=REFUSED)["error"]
    assert (error["status"], error["field"]) == ("PERMISSION_DENIED", "path")


# --- run ------------------------------------------------------------------------------------------


def flags(activation_layout: str, scale_layout: str, scale_type: str, output_type: str) -> list:
    return [
        "--activation-layout", activation_layout.lower(), "--scale-layout", scale_layout.lower(),
        "--scale-type", scale_type.lower(), "--output-type", output_type.lower(),
    ]  # fmt: skip


def shaped_activations(activations: oracle.Activations, layout: str) -> np.ndarray:
    values = activations.values
    return np.ascontiguousarray(values if layout == "TGR" else values.transpose(1, 0, 2))


def shaped_scales(activations: oracle.Activations, layout: str) -> np.ndarray:
    """As a caller would hold them: packed UE8M0 as 32-bit words."""
    scales = activations.scales
    if layout == "TGK":
        return scales
    tokens, groups, blocks = scales.shape
    packed = oracle.pack_scales(activations, layout)
    if scales.dtype == np.float32:
        return np.frombuffer(packed, np.float32).reshape(groups, blocks, -1)
    return np.frombuffer(packed, np.int32).reshape(groups, blocks // 4, -1)


def check_output(got: bytes, kind: str, activations: oracle.Activations, site: Site) -> None:
    weight = site.weights[NAME]
    exact, error = site.expected(activations, weight)
    oracle.check(got, kind, exact, error)


@pytest.mark.parametrize(
    "layouts", [("TGR", "TGK", "FP32", "BF16"), ("GTR", "GKT", "UE8M0", "FP32"),
                ("TGR", "GKT", "FP32", "FP32"), ("GTR", "TGK", "UE8M0", "BF16")],
)  # fmt: skip
def test_run_npy(
    ctl: Ctl, small: Site, tmp_path: Path, rng: np.random.Generator, layouts: tuple
) -> None:
    activation_layout, scale_layout, scale_type, output_type = layouts
    activations = oracle.random_activations(rng, small.weights[NAME], 5, scale_type)
    np.save(tmp_path / "a.npy", shaped_activations(activations, activation_layout))
    np.save(tmp_path / "s.npy", shaped_scales(activations, scale_layout))
    result = ctl.json(
        "run", "--weight", NAME, "--activations", tmp_path / "a.npy", "--scales",
        tmp_path / "s.npy", *flags(*layouts), "--output", tmp_path / "out.npy",
    )  # fmt: skip
    output = np.load(tmp_path / "out.npy")
    assert output.shape == (5, 4, 256) and result["shape"] == [5, 4, 256]
    assert output.dtype == (np.uint16 if output_type == "BF16" else np.float32)
    assert result["crc32"] == zlib.crc32(output.tobytes())
    check_output(output.tobytes(), output_type, activations, small)


def test_run_safetensors(ctl: Ctl, small: Site, tmp_path: Path, rng: np.random.Generator) -> None:
    activations = oracle.random_activations(rng, small.weights[NAME], 6, "UE8M0")
    tensors = {
        "activations": activations.values.view(ml_dtypes.float8_e4m3fn),
        "step.scales": activations.scales.view(ml_dtypes.float8_e8m0fnu),
    }
    save_file(tensors, tmp_path / "step.safetensors")
    out = tmp_path / "out.safetensors"
    ctl(
        "run", "--weight", NAME, "--activations", tmp_path / "step.safetensors", "--scales",
        f"{tmp_path}/step.safetensors:step.scales", *flags("TGR", "TGK", "UE8M0", "BF16"),
        "--output", out,
    )  # fmt: skip
    with safe_open(out, "np") as file:
        (name,) = file.keys()
    output = load_file(out)[name]
    assert (output.shape, output.dtype) == ((6, 4, 256), ml_dtypes.bfloat16)
    check_output(output.tobytes(), "BF16", activations, small)


def test_run_random_and_digest(ctl: Ctl, tmp_path: Path) -> None:
    run_random = ["run", "--weight", NAME, "--random", 4, "--seed", 9]
    digest = ctl.json(*run_random, "--digest")["digest"]
    whole = ctl.json(*run_random, "--output", tmp_path / "out.npy")
    assert digest["crc32"] == whole["crc32"] == zlib.crc32(np.load(tmp_path / "out.npy").tobytes())
    assert digest["elements"] == 4 * 4 * 256
    assert f"{digest['crc32']:08x}" in ctl(*run_random).stdout
    other = ctl.json("run", "--weight", NAME, "--random", 4, "--seed", 10)
    assert other["crc32"] != digest["crc32"]


def test_run_mistakes(ctl: Ctl, small: Site, tmp_path: Path, rng: np.random.Generator) -> None:
    """Files that do not fit are refused with a reason, and no output is left behind."""
    activations = oracle.random_activations(rng, small.weights[NAME], 5, "FP32")
    a, s, out = tmp_path / "a.npy", tmp_path / "s.npy", tmp_path / "out.npy"
    np.save(a, activations.values)
    np.save(s, activations.scales)
    layouts = flags("TGR", "TGK", "FP32", "BF16")
    command = ["run", "--weight", NAME, "--activations", a, "--scales", s, "--output", out]

    ctl(*command, expect=USAGE)  # layouts are never guessed
    error = ctl.json(*command, *layouts, "--scale-layout", "gkt", expect=REFUSED)["error"]
    assert (error["status"], error["field"]) == ("INVALID_ARGUMENT", "activation_scales")
    ctl(*command, *layouts, "--scale-type", "ue8m0", expect=USAGE)
    ctl(*command, *layouts, "--recipe", "1,32,32", expect=REFUSED)

    np.save(a, activations.values.astype(np.float32))
    ctl(*command, *layouts, expect=USAGE)
    a.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{'descr': '|u1'")
    ctl(*command, *layouts, expect=FAILED)
    a.write_bytes(b"")
    ctl(*command, *layouts, expect=FAILED)
    a.unlink()
    ctl(*command, *layouts, expect=FAILED)
    assert not out.exists()


# --- check, bench, make-checkpoint ----------------------------------------------------------------


def test_check(ctl: Ctl, small: Site) -> None:
    verdict = ctl.json(
        "check", "--checkpoint", small.root / "model", "--tokens", "1,9", "--repeat", 2
    )
    assert verdict["passed"] is True
    assert verdict["cases"] == len(verdict["results"]) == 2 * len(small.weights)
    assert all(result["worst_error_ratio"] <= 1 for result in verdict["results"])


def test_check_finds_a_difference(small: Site, tmp_path: Path, rng: np.random.Generator) -> None:
    """Held against another checkpoint than the one that is served, it must fail."""
    other = {name: oracle.random_weight(rng, 4, 256, 512) for name in small.weights}
    write_checkpoint(tmp_path / "other", other)
    command = ["check", "--checkpoint", tmp_path / "other", "--tokens", "3", "--repeat", 1]
    verdict = Ctl(small).json(*command, expect=FAILED)
    assert verdict["passed"] is False


def test_bench(ctl: Ctl, small: Site) -> None:
    before = small.client.counters().answered
    for mode in ([], ["--stream"], ["--rate", 200], ["--digest", "--connections", 2]):
        result = ctl.json(
            "bench", "--concurrency", 4, "--tokens", "1,3", "--duration", 0.5, "--warmup", 0.1,
            "--mixed", *mode,
        )  # fmt: skip
        assert result["calls"] > 10
        assert result["errors"] == {}
        latency = result["latency_ns"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    assert small.client.counters().answered - before > 40
    text = ctl("bench", "--duration", 0.2, "--warmup", 0).stdout
    for word in ("calls", "phases", "eager launches"):
        assert word in text
    result = ctl.json("bench", "--requests", 50, "--duration", 60, "--warmup", 0)
    assert result["calls"] == 50


def png_size(file: Path) -> tuple[int, int]:
    raw = file.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and raw[-8:-4] == b"IEND"
    return struct.unpack(">II", raw[16:24])


@pytest.mark.skipif(not shutil.which("gnuplot"), reason="gnuplot is not installed")
def test_bench_plot(ctl: Ctl, tmp_path: Path) -> None:
    """Drawn beside the usual result, over what was there, whatever the file is called."""
    file = tmp_path / "it's \"my\" $(latency) `plot`.png"
    file.write_text("old")
    result = ctl.json("bench", "--duration", 1, "--warmup", 0, "--plot", file)
    assert result["calls"] > 0
    assert png_size(file) == (1200, 500)
    assert file.stat().st_size > 5000  # an empty picture is smaller
    short = tmp_path / "short.png"
    ctl("bench", "--requests", 3, "--warmup", 0, "--plot", short)
    assert png_size(short) == (1200, 500)
    assert {path.name for path in tmp_path.iterdir()} == {file.name, short.name}


def test_bench_plot_refused(small: Site, tmp_path: Path) -> None:
    """Found out before the run, not after."""
    empty = tmp_path / "bin"
    empty.mkdir()
    file = tmp_path / "a.png"
    cases = [
        (["--plot", file], {"PATH": str(empty)}, "gnuplot is not installed"),
        (["--plot", tmp_path / "a.jpg"], {}, "ends in .png"),
    ]
    if shutil.which("gnuplot"):
        cases.append((["--plot", tmp_path / "none" / "a.png"], {}, "No such file or directory"))
    for arguments, extra, text in cases:
        result = subprocess.run(
            [EINSUMCTL, "--endpoint", small.daemon.address, "bench", "--duration", "600",
             *map(str, arguments)],
            capture_output=True, text=True, timeout=seconds(30), env=environment(extra),
        )  # fmt: skip
        assert result.returncode == 2 and text in result.stderr, result.stderr
        assert not result.stdout and not file.exists()


def test_bench_says_what_the_server_did(ctl: Ctl, small: Site) -> None:
    """The server's own counters around the run."""
    before = small.client.counters()
    server = ctl.json("bench", "--requests", 200, "--duration", 60, "--warmup", 0)["server"]
    after = small.client.counters()
    assert server["batches"] == after.batches - before.batches > 0
    assert sum(server["buckets"].values()) == server["batches"]
    assert server["phase_batches"] == after.phase_batches - before.phase_batches
    assert abs(server["phase_batches"] - server["batches"] / 16) <= 1  # phase_sample's default
    assert server["kernel_ns_mean"] > 0
    assert server["queue_ns_mean"] > 0
    assert server["eager_launches"] == 0
    replays = server["batches"] if small.client.call("ServerInfo").engine == "cuda" else 0
    assert server["graph_replays"] == replays


def test_bench_interrupted(small: Site) -> None:
    """Ctrl-C ends it with what was measured so far."""
    process = subprocess.Popen(
        [EINSUMCTL, "--endpoint", small.daemon.address, "--json", "bench", "--duration", "600",
         "--warmup", "0"],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=seconds(1.5))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=seconds(20))
    assert process.returncode == FAILED
    result = json.loads(output)
    assert result["interrupted"] is True and result["calls"] > 0


def test_make_checkpoint_is_what_the_daemon_loads(tmp_path: Path) -> None:
    """From nothing to a checked answer, by the tool alone."""
    made = run(
        EINSUMCTL, "--json", "make-checkpoint", "--model", "v4-flash", "--layers", 2, "--shards", 2,
        "--name-prefix", "model.", "--scale-suffix", "weight_scale_inv", tmp_path / "model",
    )  # fmt: skip
    assert made.returncode == OK, made.stderr
    assert json.loads(made.stdout)["layers"] == 2
    with safe_open(tmp_path / "model/model-00001-of-00002.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert shapes["model.layers.0.attn.wo_a.weight"] == [8192, 4096]
    assert shapes["model.layers.0.attn.wo_a.weight_scale_inv"] == [64, 32]
    with Daemon(tmp_path, weights_roots=[str(tmp_path)], weights=[{"path": "model"}]) as daemon:
        done = run(
            EINSUMCTL, "--endpoint", daemon.address, "--json", "check", "--checkpoint",
            tmp_path / "model", "--tokens", "2", "--repeat", 1,
        )  # fmt: skip
        assert done.returncode == OK, done.stderr
        assert json.loads(done.stdout)["cases"] == 2
