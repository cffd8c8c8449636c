"""OutputProject: attention's output in, the projection out, held against the oracle; by itself, in
streams and in a flood with Einsum; and every way in which it can be wrong."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import grpc
import ml_dtypes
import numpy as np
import pytest
from grpc import StatusCode
from safetensors.numpy import save_file

import oracle
from checkpoints import TENSOR_NAME
from client import Client, field_violations
from conftest import Site, rng_for, serving
from daemon import EINSUMCTL, Daemon, count, run, seconds
from oracle_attention import HEAD_DIM, Cache, Rope, activations_of, random_attention

CACHE_POSITIONS = 300

# name -> (G, R, block_d, block_r, type of the scales), rope; D is 256.
FORMATS = {
    TENSOR_NAME.format(0): ((8, 1024, 128, 128, "UE8M0"), Rope(10000)),
    TENSOR_NAME.format(1): ((4, 512, 32, 32, "UE8M0"), Rope(160000, 16, 65536)),
    TENSOR_NAME.format(2): ((2, 2048, 1, 128, "FP32"), "cache"),
    TENSOR_NAME.format(3): ((3, 512, 1, 32, "FP32"), Rope(500000.5, 4, 4096, 24, 2)),
    TENSOR_NAME.format(4): ((4, 1024, 1, 128, None), Rope(10000)),  # BF16
    TENSOR_NAME.format(5): ((4, 512, 128, 128, "UE8M0"), None),
    TENSOR_NAME.format(6): ((2, 640, 128, 128, "UE8M0"), Rope(10000)),  # no whole heads
}
PROJECTED = list(FORMATS)[:5]
NAME = PROJECTED[0]
WITHOUT_ROPE, BROKEN_HEADS = list(FORMATS)[5:]


def make_weights() -> dict[str, oracle.Weight]:
    rng = rng_for("weights of test_output_project")
    return {
        name: oracle.random_weight(rng, groups, 256, reduced_dim, block_d, block_r, scales)
        for name, ((groups, reduced_dim, block_d, block_r, scales), _) in FORMATS.items()
    }


def make_cache() -> Cache:
    """Of no formula's: what is in the file counts."""
    angles = rng_for("rope cache").uniform(0, 2 * np.pi, (CACHE_POSITIONS, 32))
    return Cache(np.hstack([np.cos(angles), np.sin(angles)]).astype(np.float32))


ROPES = {name: make_cache() if rope == "cache" else rope for name, (_, rope) in FORMATS.items()}


def rope_config(name: str, rope: Rope) -> dict[str, Any]:
    entry = {"weights": name, "theta": rope.theta}
    if rope.factor > 1:
        entry |= {
            "factor": rope.factor,
            "original_positions_max": rope.original_positions_max,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
    return entry


def start(directory: Path, **config: Any) -> Any:
    """A site whose first rules name single weights and whose last one all that are left, but for
    WITHOUT_ROPE."""
    (directory / "root").mkdir(parents=True)
    save_file({"rope.table": ROPES[PROJECTED[2]].table}, directory / "root/rope.safetensors")
    ropes = [rope_config(PROJECTED[1], ROPES[PROJECTED[1]]),
             {"weights": PROJECTED[2], "cache": "rope.safetensors", "cache_tensor": "rope.table"},
             rope_config(PROJECTED[3], ROPES[PROJECTED[3]]),
             rope_config("layers.[!5].*", Rope(10000))]  # fmt: skip
    return serving(directory, make_weights(), 256, ropes=ropes, **config)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with start(tmp_path_factory.mktemp("output_project")) as site:
        yield site


class Projection:
    """One request, and what its answer must be."""

    def __init__(
        self,
        rng: np.random.Generator,
        name: str = NAME,
        tokens: int = 3,
        output_type: str = "BF16",
        groups: tuple[int, int] | None = None,
        attention: np.ndarray | None = None,
        positions: np.ndarray | None = None,
    ):
        self.name, self.tokens, self.output_type = name, tokens, output_type
        self.weight = WEIGHTS[name]
        self.fields: dict[str, Any] = {}
        if groups:
            self.weight = self.weight.slice(*groups)
            self.fields = {"group_begin": groups[0], "group_end": groups[1]}
        heads = self.weight.groups * self.weight.reduced_dim // HEAD_DIM
        self.attention = random_attention(rng, tokens, heads) if attention is None else attention
        if positions is None:
            most = CACHE_POSITIONS if isinstance(ROPES[name], Cache) else 1 << 20
            positions = rng.integers(0, most, tokens)
        self.positions = positions.astype(np.int64)
        self.wgmma = False  # once it is a request: whether wgmma may sum its answer

    def request(self, client: Client, **fields: Any) -> Any:
        self.wgmma = client.sums_by_wgmma(fields.get("kernel", ""))
        return client.message(
            "OutputProjectRequest",
            **{
                "weight": self.name,
                "output_type": f"OUTPUT_TYPE_{self.output_type}",
                "tokens": self.tokens,
                "attention": self.attention.tobytes(),
                "positions": self.positions.tobytes(),
                **self.fields,
                **fields,
            },
        )

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        activations = activations_of(
            self.attention, self.positions, ROPES[self.name], self.weight.groups,
            self.weight.block_r,
        )  # fmt: skip
        return oracle.project(activations, self.weight, self.wgmma)

    def check(self, reply: Any) -> np.ndarray:
        assert (reply.tokens, reply.groups, reply.output_dim) == (
            self.tokens, self.weight.groups, self.weight.output_dim,
        )  # fmt: skip
        exact, error = self.expected()
        oracle.check(reply.output, self.output_type, exact, error)
        return oracle.decode_output(reply.output, self.output_type, exact.shape)


WEIGHTS = make_weights()


def output_project(client: Client, request: Any, timeout: float = 60) -> Any:
    return client.callable("einsum.v1.Einsum", "OutputProject")(request, timeout=seconds(timeout))


def check_answer(site: Site, projection: Projection) -> np.ndarray:
    return projection.check(output_project(site.client, projection.request(site.client)))


# --- right numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", oracle.OUTPUT_TYPES)
@pytest.mark.parametrize("name", PROJECTED)
def test_every_weight(site: Site, rng: np.random.Generator, name: str, output_type: str) -> None:
    for tokens in (1, 2, 7, 33):
        check_answer(site, Projection(rng, name, tokens, output_type))


@pytest.mark.parametrize("case", range(count(30)))
def test_random(site: Site, case: int) -> None:
    rng = rng_for(f"output projection {case}")
    name = str(rng.choice(PROJECTED))
    groups = None
    if rng.random() < 0.5:  # a tensor-parallel slice
        begin = int(rng.integers(0, WEIGHTS[name].groups))
        groups = (begin, int(rng.integers(begin + 1, WEIGHTS[name].groups + 1)))
    tokens = int(rng.integers(1, 200) if rng.random() < 0.3 else rng.integers(1, 17))
    check_answer(site, Projection(rng, name, tokens, str(rng.choice(oracle.OUTPUT_TYPES)), groups))


@pytest.mark.parametrize("name", PROJECTED)
def test_positions(site: Site, rng: np.random.Generator, name: str) -> None:
    """Both ends of what is allowed, runs as in a prefill, repeats as in a batch of many callers."""
    most = site.client.call("GetWeight", name=name).weight.rope.positions_max
    assert most == (CACHE_POSITIONS if isinstance(ROPES[name], Cache) else 1 << 20)
    run = np.arange(most - 9, most - 1)
    positions = np.concatenate([[0, 1, most - 1], run, run[::-1], [5, 5, 5]])
    check_answer(site, Projection(rng, name, len(positions), positions=positions))


def test_position_0_turns_nothing(site: Site, rng: np.random.Generator) -> None:
    """Then the answer is Einsum's for the quantised heads."""
    projection = Projection(rng, tokens=5, positions=np.zeros(5))
    got = output_project(site.client, projection.request(site.client))
    activations = activations_of(
        projection.attention, projection.positions, ROPES[NAME], 8, WEIGHTS[NAME].block_r
    )
    same = site.client.einsum(site.request(NAME, activations))
    assert oracle.same_but_for_rounding(got.output, same.output)
    turned = Projection(rng, tokens=5, attention=projection.attention, positions=np.full(5, 7))
    assert output_project(site.client, turned.request(site.client)).output != got.output


def test_one_real_layer(tmp_path: Path, rng: np.random.Generator) -> None:
    """V4-Flash: G 8, D 1024, R 4096: 64 heads."""
    name = TENSOR_NAME.format(0)
    weight = oracle.random_weight(rng, 8, 1024, 4096)
    config = {"ropes": [{"weights": "*", "theta": 10000}]}
    with serving(tmp_path, {name: weight}, 1024, **config) as site:
        attention = random_attention(rng, 9, 64)
        positions = np.arange(1000, 1009)
        request = site.client.message(
            "OutputProjectRequest", weight=name, output_type=1, tokens=9,
            attention=attention.tobytes(), positions=positions.tobytes(),
        )  # fmt: skip
        reply = output_project(site.client, request)
        activations = activations_of(attention, positions, Rope(10000), 8, 128)
        oracle.check(reply.output, "BF16", *site.expected(activations, weight))


NAN, INFINITY, LARGEST = 0x7FC1, 0xFF80, 0x7F7F


@pytest.mark.parametrize("output_type", oracle.OUTPUT_TYPES)
def test_nan_touches_what_it_must(
    site: Site, rng: np.random.Generator, output_type: str
) -> None:
    """A NaN or an infinity makes NaN of its token and group, and of nothing else."""
    attention = random_attention(rng, 7, 16)  # two heads of each group
    attention[1, 4, 17] = NAN
    attention[3, 1, 511] = INFINITY  # within the rotated dims
    attention[5, 15, 448] = NAN
    got = check_answer(site, Projection(rng, NAME, 7, output_type, attention=attention))
    nan = {(int(t), int(g)) for t, g, _ in np.argwhere(np.isnan(got))}
    assert nan == {(1, 2), (3, 0), (5, 7)}


def test_extremes(site: Site, rng: np.random.Generator) -> None:
    """Zeros, subnormals, what is below the clamp, the largest values, one of them among zeros."""
    attention = random_attention(rng, 6, 16)
    attention[0] = 0
    attention[1] = rng.integers(0, 128, attention[1].shape)  # BF16's subnormals
    attention[2] = 0x8000  # -0
    attention[3] = LARGEST
    attention[3, :, 448:] = 0x3F80  # so that no rotation overflows
    attention[4] = 0
    attention[4, :, 100] = LARGEST
    attention[5] = 0x2ED0  # about 9.5e-11
    positions = np.array([3, 1, 2, 99999, 5, 6])
    projection = Projection(rng, NAME, 6, "FP32", attention=attention, positions=positions)
    got = check_answer(site, projection)
    assert (got[[0, 2]] == 0).all()


def test_rotation_that_overflows_is_nan(site: Site, rng: np.random.Generator) -> None:
    attention = random_attention(rng, 1, 16)
    attention[0, 0, 448:] = LARGEST
    position = 4
    assert np.cos(position) * np.sin(position) > 0  # of the first pair: they add up
    projection = Projection(rng, NAME, 1, attention=attention, positions=np.array([position]))
    got = check_answer(site, projection)
    assert np.isnan(got[0, 0]).all() and not np.isnan(got[0, 1:]).any()


def test_digest_and_no_tokens(site: Site, rng: np.random.Generator) -> None:
    projection = Projection(rng, tokens=4)
    whole = output_project(site.client, projection.request(site.client, request_id=5))
    digest = output_project(site.client, projection.request(site.client, digest_only=True))
    values = np.frombuffer(whole.output, np.uint16)
    assert (whole.request_id, digest.output) == (5, b"")
    assert digest.digest.elements == values.size == 4 * 8 * 256
    none = Projection(rng, tokens=0)
    reply = output_project(site.client, none.request(site.client, request_id=77))
    assert (reply.request_id, reply.output, reply.tokens, reply.groups) == (77, b"", 0, 8)


def test_most_tokens(site: Site, rng: np.random.Generator) -> None:
    """As many as the limits say must fit the default buffers and messages, attention or not."""
    most = site.client.call("ServerInfo").limits.request_tokens_max
    projection = Projection(rng, NAME, most, "FP32")
    check_answer(site, projection)


# --- among others ---------------------------------------------------------------------------------


def einsum_case(site: Site, rng: np.random.Generator, name: str, tokens: int) -> tuple[Any, Any]:
    """A request of the other kind, and how to check its answer."""
    weight = WEIGHTS[name]
    activations = oracle.random_activations(rng, weight, tokens, "UE8M0")

    def check(reply: Any) -> None:
        oracle.check(reply.output, "BF16", *site.expected(activations, weight))

    return site.request(name, activations), check


def mixed_case(site: Site, rng: np.random.Generator, tokens_max: int) -> tuple[str, Any, Any]:
    name, tokens = str(rng.choice(PROJECTED)), int(rng.integers(1, tokens_max + 1))
    if rng.random() < 0.5:
        return "request", *einsum_case(site, rng, name, tokens)
    projection = Projection(rng, name, tokens, str(rng.choice(oracle.OUTPUT_TYPES)))
    return "output_project", projection.request(site.client), projection.check


def test_stream_of_both_kinds(site: Site, rng: np.random.Generator) -> None:
    cases = [mixed_case(site, rng, 9) for _ in range(count(60))]
    wrap = site.client.schema.message("EinsumStreamRequest")
    for i, (_, request, _) in enumerate(cases):
        request.request_id = i
    replies = list(
        site.client.callable("einsum.v1.Einsum", "EinsumStream")(
            (wrap(**{kind: request}) for kind, request, _ in cases), timeout=seconds(60)
        )
    )
    assert {reply.response.request_id for reply in replies} == set(range(len(cases)))
    for reply in replies:
        assert not reply.HasField("error"), reply.error
        cases[reply.response.request_id][2](reply.response)


def flood(site: Site, seed: str, callers: int, calls: int, tokens_max: int) -> None:
    failures: list[str] = []

    def caller(index: int) -> None:
        rng = rng_for(f"{seed} {index}")
        with Client(site.daemon.address, site.client.schema) as client:
            for _ in range(calls):
                kind, request, check = mixed_case(site, rng, tokens_max)
                method = "Einsum" if kind == "request" else "OutputProject"
                reply = client.callable("einsum.v1.Einsum", method)(request, timeout=seconds(60))
                try:
                    check(reply)
                except AssertionError as wrong:
                    failures.append(f"{method}: {wrong}")

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(caller, range(callers)))
    assert not failures, failures[:3]


def test_flood_of_both_kinds(site: Site) -> None:
    """Batches that hold both, of all weights."""
    before = site.client.counters()
    flood(site, "flood", 8, count(20), 12)
    after = site.client.counters()
    assert after.answered - before.answered == 8 * count(20)
    assert after.failed == before.failed


def test_waiting_for_room(tmp_path: Path) -> None:
    """Two buffers that hold one large request each: most wait, and are decoded when room is."""
    with start(
        tmp_path, batch_tokens_max=32, request_tokens_max=32, lanes=1, batches=2
    ) as site:
        flood(site, "waiting", 8, count(6), 32)


# --- ropes ----------------------------------------------------------------------------------------


def test_ropes_are_shown(site: Site) -> None:
    weights = {weight.name: weight for weight in site.client.call("ListWeights").weights}
    assert not weights[WITHOUT_ROPE].HasField("rope")
    plain, yarn, cache = (weights[name].rope for name in PROJECTED[:3])
    assert (plain.theta, plain.factor, plain.positions_max) == (10000, 1, 1 << 20)
    assert (yarn.theta, yarn.factor, yarn.original_positions_max) == (160000, 16, 65536)
    assert (yarn.beta_fast, yarn.beta_slow) == (32, 1)
    assert (cache.cache, cache.cache_tensor) == ("rope.safetensors", "rope.table")
    assert (cache.theta, cache.positions_max) == (0, CACHE_POSITIONS)


def test_rope_of_a_load(site: Site, rng: np.random.Generator) -> None:
    """It takes precedence over the configured ones; a bad one loads nothing."""
    model = str(site.root / "model")
    options = {"tensors": [f"{NAME}.weight"], "name_prefix": "own/", "output_dim": 256}
    rope = {"theta": 777, "positions_max": 50}
    try:
        loaded = site.client.load(model, rope=rope, **options)[-1].weights
        assert [(w.name, w.rope.theta, w.rope.positions_max) for w in loaded] == [
            (f"own/{NAME}", 777, 50)
        ]
        positions = np.array([0, 25, 49])
        projection = Projection(rng, NAME, 3, positions=positions)
        request = projection.request(site.client, weight=f"own/{NAME}")
        reply = output_project(site.client, request)
        activations = activations_of(projection.attention, positions, Rope(777), 8, 128)
        oracle.check(reply.output, "BF16", *site.expected(activations, WEIGHTS[NAME]))
        request.positions = np.array([0, 25, 50]).tobytes()
        fails(site, request, StatusCode.INVALID_ARGUMENT, "positions", "[2] is 50")
    finally:
        site.client.call("UnloadWeights", names=["own/*"])
    for bad, text in (
        ({}, "theta"),
        ({"theta": 0.5}, "theta"),
        ({"theta": 10000, "factor": 16}, "original_positions_max"),
        ({"theta": 10000, "cache": "rope.safetensors"}, "theta"),
        ({"theta": float("nan")}, "theta"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            site.client.load(model, rope=bad, **options)
        assert caught.value.code() == StatusCode.INVALID_ARGUMENT
        assert text in caught.value.details()
    for bad, code in (
        ({"cache": "/etc/passwd"}, StatusCode.PERMISSION_DENIED),
        ({"cache": "none.safetensors"}, StatusCode.NOT_FOUND),
        ({"cache": "rope.safetensors"}, StatusCode.FAILED_PRECONDITION),  # not that tensor
    ):
        with pytest.raises(grpc.RpcError) as caught:
            site.client.load(model, rope=bad, **options)
        assert caught.value.code() == code
        assert str(site.root) not in caught.value.details()


@pytest.mark.parametrize(
    "rope, text",
    [
        ({"weights": "*", "theta": 10000, "factor": 16}, "ropes[0].original_positions_max"),
        ({"weights": "*", "cache": "none.safetensors"}, "ropes[0].cache"),
        ({"weights": "*", "theta": 10000, "cache": "x"}, "ropes[0].theta"),
    ],
)
def test_bad_rope_in_the_configuration(tmp_path: Path, rope: dict, text: str) -> None:
    """The daemon says which and does not start."""
    daemon = Daemon(tmp_path, wait=False, weights_roots=[str(tmp_path)], ropes=[rope])
    assert daemon.wait_exit() != 0
    assert text in daemon.log


def test_cache_that_shrinks(tmp_path: Path, rng: np.random.Generator) -> None:
    """Whoever needs what is gone is told, by himself and in a stream; the others are served."""
    with start(tmp_path) as site:
        cached, other = PROJECTED[2], PROJECTED[0]
        check_answer(site, Projection(rng, cached))
        file = site.root / "rope.safetensors"
        with file.open("r+b") as opened:
            opened.truncate(100)
        projection = Projection(rng, cached)
        for _ in range(3):
            fails(site, projection.request(site.client), StatusCode.DATA_LOSS, None, "shrunk")
            check_answer(site, Projection(rng, other))
        wrap = site.client.schema.message("EinsumStreamRequest")
        good = Projection(rng, other)
        requests = [projection.request(site.client, request_id=1),
                    good.request(site.client, request_id=2)]  # fmt: skip
        replies = site.client.callable("einsum.v1.Einsum", "EinsumStream")(
            (wrap(output_project=request) for request in requests), timeout=seconds(60)
        )
        by_id = {reply.response.request_id: reply for reply in replies}
        assert by_id[1].error.code == StatusCode.DATA_LOSS.value[0]
        good.check(by_id[2].response)


def test_cache_that_shrinks_under_those_who_wait(tmp_path: Path, rng: np.random.Generator) -> None:
    """Two requests fill a buffer and two buffers are all: some find out only when they get room,
    and must give it back."""
    with start(
        tmp_path, batch_tokens_max=32, request_tokens_max=32, lanes=1, batches=2
    ) as site:
        with (site.root / "rope.safetensors").open("r+b") as opened:
            opened.truncate(100)
        call = site.client.callable("einsum.v1.Einsum", "OutputProject")
        for _ in range(count(6)):
            cases = [Projection(rng, PROJECTED[2 * (i % 2)], 16) for i in range(8)]
            futures = [call.future(p.request(site.client), timeout=seconds(60)) for p in cases]
            for projection, future in zip(cases, futures):
                if projection.name == NAME:
                    projection.check(future.result())
                else:
                    assert future.exception().code() == StatusCode.DATA_LOSS


# --- what is refused ------------------------------------------------------------------------------


def fails(
    site: Site, request: Any, code: StatusCode, field: str | None, *texts: str
) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        output_project(site.client, request)
    error = caught.value
    assert error.code() == code, f"{error.code()}: {error.details()}"
    for text in texts:
        assert text in error.details(), f"{text!r} is not in {error.details()!r}"
    assert field_violations(error) == ([field] if field else [])
    return error


def with_position(position: int) -> dict[str, Any]:
    return {"positions": np.array([0, 1, position], np.int64).tobytes()}


INVALID = StatusCode.INVALID_ARGUMENT
BAD = {
    "no weight": ({"weight": ""}, INVALID, "weight", "not given"),
    "unknown weight": ({"weight": "layers.9.wo_a"}, StatusCode.NOT_FOUND, "weight", "layers.9"),
    "no rope": ({"weight": WITHOUT_ROPE}, StatusCode.FAILED_PRECONDITION, "weight", '"ropes"'),
    "no whole heads": (
        {"weight": BROKEN_HEADS}, StatusCode.FAILED_PRECONDITION, "weight", "R = 640",
    ),
    "no output type": ({"output_type": 0}, INVALID, "output_type", "OUTPUT_TYPE_BF16"),
    "other output type": (
        {"output_type": 3}, StatusCode.UNIMPLEMENTED, "output_type", "3 is not supported",
    ),
    "too many tokens": ({"tokens": 100_000}, INVALID, "tokens", "100000"),
    "tokens that wrap round": ({"tokens": 2**32 - 1}, INVALID, "tokens"),
    "fewer tokens": ({"tokens": 2}, INVALID, "attention", "expected 32768 bytes", "49152"),
    "no attention": ({"attention": b""}, INVALID, "attention", "3 * 16 heads * 512 * 2", "got 0"),
    "attention cut": ({"attention": bytes(49151)}, INVALID, "attention", "got 49151"),
    "attention in FP32": ({"attention": bytes(2 * 49152)}, INVALID, "attention", "got 98304"),
    "no positions": ({"positions": b""}, INVALID, "positions", "expected 24 bytes", "got 0"),
    "positions in int32": ({"positions": bytes(12)}, INVALID, "positions", "got 12"),
    "negative position": (with_position(-1), INVALID, "positions", "[2] is -1"),
    "position past the end": (with_position(1 << 20), INVALID, "positions", "[2] is 1048576"),
    "position past all": (with_position(2**63 - 1), INVALID, "positions", "9223372036854775807"),
    "position before all": (with_position(-(2**63)), INVALID, "positions", "-9223372036854775808"),
    "position of 32 bits and more": (with_position(2**32), INVALID, "positions", "4294967296"),
    "groups past the end": ({"group_end": 9}, INVALID, "group_end", "[0, 9)"),
    "groups without their heads": ({"group_end": 2}, INVALID, "attention", "3 * 4 heads"),
    "unknown kernel": ({"kernel": "none"}, StatusCode.UNIMPLEMENTED, "kernel", "none"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_and_then_served(site: Site, rng: np.random.Generator, case: str) -> None:
    changes, code, field, *texts = BAD[case]
    good = Projection(rng)
    invalid = site.client.counters().invalid
    fails(site, good.request(site.client, **changes), code, field, *texts)
    assert site.client.counters().invalid == invalid + 1
    good.check(output_project(site.client, good.request(site.client)))


def test_position_past_the_cache(site: Site, rng: np.random.Generator) -> None:
    projection = Projection(rng, PROJECTED[2], positions=np.array([0, CACHE_POSITIONS, 1]))
    fails(site, projection.request(site.client), INVALID, "positions", f"[1] is {CACHE_POSITIONS}",
          f"the {CACHE_POSITIONS} of weight")  # fmt: skip
    check_answer(site, Projection(rng, PROJECTED[2]))


def test_refused_in_a_stream(site: Site, rng: np.random.Generator) -> None:
    """The stream goes on."""
    good = Projection(rng)
    requests = [good.request(site.client, request_id=1),
                good.request(site.client, request_id=2, **with_position(-5)),
                good.request(site.client, request_id=3, weight=WITHOUT_ROPE),
                good.request(site.client, request_id=4)]  # fmt: skip
    wrap = site.client.schema.message("EinsumStreamRequest")
    replies = site.client.callable("einsum.v1.Einsum", "EinsumStream")(
        (wrap(output_project=request) for request in requests), timeout=seconds(60)
    )
    by_id = {reply.response.request_id: reply for reply in replies}
    assert set(by_id) == {1, 2, 3, 4}
    good.check(by_id[1].response)
    good.check(by_id[4].response)
    assert (by_id[2].error.code, by_id[2].error.field) == (INVALID.value[0], "positions")
    assert by_id[3].error.code == StatusCode.FAILED_PRECONDITION.value[0]


def test_bytes_that_are_no_request(site: Site, rng: np.random.Generator) -> None:
    path = "/einsum.v1.Einsum/OutputProject"
    for payload, field in (
        (b"\x42\xff\xff\xff\xff\x0f", "attention"),
        (b"\x48\x01", "positions"),
        (b"\x12\x02\xff\xfe", "weight"),
        (b"\x0b", None),
        (b"", "output_type"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            site.client.raw(path, payload)
        assert caught.value.code() == INVALID
        assert field_violations(caught.value) == ([field] if field else [])
    check_answer(site, Projection(rng))


def test_cancelled_while_waiting(tmp_path: Path, rng: np.random.Generator) -> None:
    """Two requests fill a buffer and two buffers are all, so that of eight some wait. Half of them
    are given up; the others are answered rightly."""
    with start(
        tmp_path, batch_tokens_max=32, request_tokens_max=32, lanes=1, batches=2
    ) as site:
        call = site.client.callable("einsum.v1.Einsum", "OutputProject")
        for _ in range(count(6)):
            cases = [Projection(rng, NAME, 16) for _ in range(8)]
            futures = [call.future(p.request(site.client), timeout=seconds(60)) for p in cases]
            for future in futures[1::2]:
                future.cancel()
            for projection, future in zip(cases[::2], futures[::2]):
                projection.check(future.result())


# --- einsumctl ------------------------------------------------------------------------------------


def einsumctl(site: Site, *arguments: Any, expect: int = 0) -> subprocess.CompletedProcess:
    done = run(EINSUMCTL, "--endpoint", site.daemon.address, *arguments)
    assert done.returncode == expect, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_ctl_run(site: Site, rng: np.random.Generator, tmp_path: Path, form: str) -> None:
    projection = Projection(rng, tokens=5)
    if form == "npy":
        attention, positions = tmp_path / "attention.npy", tmp_path / "positions.npy"
        np.save(attention, projection.attention)
        np.save(positions, projection.positions)
    else:
        attention = positions = tmp_path / "step.safetensors"
        tensors = {"attention": projection.attention.view(ml_dtypes.bfloat16),
                   "positions": projection.positions}  # fmt: skip
        save_file(tensors, attention)
    output = tmp_path / "out.npy"
    files = ("--attention", attention, "--positions", positions)
    done = einsumctl(site, "--json", "run", "--weight", NAME, *files, "--output", output)
    told = json.loads(done.stdout)
    assert (told["operation"], told["recipe"]) == ("output_project", None)
    assert told["shape"] == [5, 8, 256]
    projection.wgmma = site.client.sums_by_wgmma()
    oracle.check(np.load(output).tobytes(), "BF16", *projection.expected())
    digest = einsumctl(site, "--json", "run", "--weight", NAME, *files, "--digest")
    assert json.loads(digest.stdout)["digest"]["elements"] == 5 * 8 * 256
    assert "attention bf16 > fp32" in einsumctl(
        site, "run", "--weight", NAME, *files, "--output-type", "fp32"
    ).stdout  # fmt: skip


def test_ctl_run_refuses(site: Site, rng: np.random.Generator, tmp_path: Path) -> None:
    projection = Projection(rng)
    good, wrong, positions = (tmp_path / f"{name}.npy" for name in ("good", "wrong", "positions"))
    np.save(good, projection.attention)
    np.save(wrong, projection.attention.view(np.float16))
    np.save(positions, projection.positions)
    run_it = ("run", "--weight", NAME)
    for arguments, code, text in (
        (("--attention", good), 2, "--positions"),
        (("--positions", positions), 2, "--attention"),
        (("--attention", wrong, "--positions", positions), 2, "f2"),
        (("--attention", good, "--positions", good), 2, "int64"),
        (("--attention", good, "--positions", positions, "--recipe", "1,1,128"), 2, "--recipe"),
        (("--attention", good, "--positions", positions, "--random", "3"), 2, "--random"),
    ):
        assert text in einsumctl(site, *run_it, *arguments, expect=code).stderr
    files = ("--attention", good, "--positions", positions)
    refused = einsumctl(site, "run", "--weight", WITHOUT_ROPE, *files, expect=4)
    assert "FAILED_PRECONDITION" in refused.stderr


def test_ctl_check(site: Site) -> None:
    """By the ropes that the server names; with a wrong one it finds every weight wrong."""
    check = ("--json", "check", "--checkpoint", site.root / "model", "--attention", "--tokens",
             "1,7", "--repeat", "1")  # fmt: skip
    told = json.loads(einsumctl(site, *check).stdout)
    names = {result["weight"] for result in told["results"]}
    cached, whole = PROJECTED[2], set(PROJECTED)
    assert (told["passed"], told["missed"]) == (True, 0)
    assert names == whole - {cached} - {BROKEN_HEADS}
    wrong = json.loads(einsumctl(site, *check, "--rope-theta", "10001", expect=1).stdout)
    assert wrong["missed"] == wrong["cases"] > 0


def test_ctl_check_of_a_cache(tmp_path: Path, rng: np.random.Generator) -> None:
    name = TENSOR_NAME.format(0)
    (tmp_path / "root").mkdir()
    file = tmp_path / "root/cache.safetensors"
    save_file({"cos_sin_cache": make_cache().table}, file)
    config = {"ropes": [{"weights": "*", "cache": "cache.safetensors"}]}
    with serving(tmp_path, {name: WEIGHTS[name]}, 256, **config) as site:
        check = ("check", "--checkpoint", site.root / "model", "--attention", "--tokens", "5")
        assert "passed: 1 of 1" in einsumctl(site, *check, "--rope-cache", file).stdout
        assert "--rope-cache" in einsumctl(site, *check, expect=1).stderr
        einsumctl(site, *check, "--rope-theta", "10000", expect=1)


def test_ctl_load_and_bench(site: Site) -> None:
    load = ("weights", "load", "model", "--tensors", f"{NAME}.weight", "--name-prefix", "ctl/",
            "--output-dim", "256", "--rope-theta", "5000", "--rope-factor", "2")  # fmt: skip
    assert "--rope-original" in einsumctl(site, *load, expect=2).stderr
    try:
        shown = einsumctl(site, *load, "--rope-original", "1000")
        assert "rope theta 5000 yarn" in shown.stdout
        shown = einsumctl(site, "--json", "weights", "get", f"ctl/{NAME}")
        assert json.loads(shown.stdout)["rope"] == {
            "theta": 5000, "factor": 2, "original_positions_max": 1000, "beta_fast": 32,
            "beta_slow": 1, "positions_max": 1 << 20,
        }  # fmt: skip
        bench = ("--json", "bench", "--attention", "--duration", "0.3", "--warmup", "0",
                 "--tokens", "1,4")  # fmt: skip
        for more in ((), ("--stream",), ("--weight", f"ctl/{NAME}")):
            told = json.loads(einsumctl(site, *bench, *more).stdout)
            assert told["calls"] > 0 and told["errors"] == {}
        none = einsumctl(site, *bench, "--weight", WITHOUT_ROPE, expect=1)
        assert "none of these weights takes attention" in none.stderr
    finally:
        site.client.call("UnloadWeights", names=["ctl/*"])
