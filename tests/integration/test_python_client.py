"""The Python package with numpy: numbers in every layout, what is copied and what is not, errors,
threads, shared memory."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import socket
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path
from typing import Any, Iterator

import ml_dtypes
import numpy as np
import pytest

import oracle
import python_package
from checkpoints import TENSOR_NAME, write_checkpoint
from conftest import Site, serving, small_weights
from copies import Copies
from daemon import ENGINE, REPOSITORY, environment, run, seconds
from python_package import ACTIVATIONS, COPIED_ACTIVATIONS, COPIED_SCALES, SCALES, arrays
from test_output_project import PROJECTED, WITHOUT_ROPE, Projection
from test_output_project import start as start_output_project

EQUATION = "bhr,hdr->bhd"
BF16 = ml_dtypes.bfloat16
NAME = TENSOR_NAME.format(0)


def weights() -> dict[str, oracle.Weight]:
    """The small ones, and one of V4.1's blocks."""
    fine = oracle.random_weight(
        np.random.default_rng(1), groups=4, output_dim=256, reduced_dim=512, block_d=32, block_r=32
    )
    return small_weights() | {TENSOR_NAME.format(2): fine}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("python")
    with serving(
        folder, weights(), 256,
        listen=["127.0.0.1:0", f"unix:{folder}/einsumd.sock"],
        shared_memory_listen=f"unix:{folder}/shared.sock",
    ) as site:  # fmt: skip
        yield site


@pytest.fixture
def client(einsumd: Any, small: Site) -> Iterator[Any]:
    with einsumd.Client(small.daemon.listening[1]) as client:
        yield client


def call(client: Any, site: Site, name: str, activations: oracle.Activations, a: Any, s: Any,
         kind: str = "BF16", **options: Any) -> None:  # fmt: skip
    """One call, and its answer held against the oracle."""
    weight = site.weights[name]
    out = np.empty((activations.tokens, weight.groups, weight.output_dim),
                   BF16 if kind == "BF16" else np.float32)  # fmt: skip
    python_package.einsumd().fp8_einsum(
        EQUATION, (a, s), (client.weight(name), None), out, **options
    )
    oracle.check(out.tobytes(), kind, *site.expected(activations, weight))


# ---- the wheel -----------------------------------------------------------------------------------


def test_wheel_installs_in_a_fresh_environment(einsumd: Any, small: Site, tmp_path: Path) -> None:
    """pip resolves what the wheel asks for; numpy and cffi come from the test's own packages."""
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    ours = Path(np.__file__).parents[1]
    (packages / "tests.pth").write_text(f"{ours}\n")
    python = tmp_path / "venv/bin/python"
    installed = run(python, "-m", "pip", "install", "--no-index", python_package.wheel())
    assert installed.returncode == 0, installed.stdout + installed.stderr
    script = (
        f"import einsumd; print(einsumd.__file__); print(einsumd.Client({small.daemon.address!r}))"
    )
    ran = run(python, "-c", script, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert str(packages) in ran.stdout and small.daemon.address in ran.stdout


def test_wheel_is_typed_and_holds_its_library(einsumd: Any) -> None:
    folder = Path(einsumd.__file__).parent
    assert (folder / "py.typed").exists()
    assert list(folder.glob("libeinsum_client.so.*")) and list(folder.glob("_native.abi3.so"))


# ---- numbers and layouts -------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
@pytest.mark.parametrize("scale_type", SCALES)
def test_every_layout_of_the_wire_is_taken_as_it_is(
    einsumd: Any, client: Any, small: Site, rng: np.random.Generator, scale_type: str, tokens: int
) -> None:
    copies = einsumd.copies()
    with einsumd.Client(small.daemon.address, allow_copies=False, shared_memory=None) as strict:
        for name, weight in small.weights.items():
            recipe = (1, 32, 32) if weight.block_r == 32 else (1, 128, 128)
            activations = oracle.random_activations(rng, weight, tokens, scale_type)
            expected = small.expected(activations, weight)
            for layout in ACTIVATIONS:
                for scale_layout in SCALES[scale_type]:
                    a, s = arrays(activations, layout, scale_layout)
                    for each in (client, strict):
                        out = np.empty((tokens, weight.groups, weight.output_dim), BF16)
                        each.einsum(name, a, s, out, recipe=recipe)
                        oracle.check(out.tobytes(), "BF16", *expected)
            call(client, small, name, activations, a, s, "FP32", recipe=(1, 1, recipe[2]))
    assert einsumd.copies() == copies


@pytest.mark.parametrize("scale_type", SCALES)
def test_what_the_wire_has_not_is_copied_and_counted_or_refused(
    einsumd: Any, client: Any, small: Site, rng: np.random.Generator, scale_type: str
) -> None:
    weight = small.weights[NAME]
    for layout in COPIED_ACTIVATIONS:
        for scale_layout in COPIED_SCALES[scale_type]:
            activations = oracle.random_activations(rng, weight, 5, scale_type)
            a, s = arrays(activations, layout, scale_layout)
            copies = einsumd.copies()
            call(client, small, NAME, activations, a, s)
            assert einsumd.copies() == copies + 2, (layout, scale_layout)
            with pytest.raises(einsumd.CopyRefused, match="a E4M3 .*by strides"):
                call(client, small, NAME, activations, a, s, allow_copies=False)
            with pytest.raises(einsumd.CopyRefused, match="a_scale .*by strides"):
                a = np.ascontiguousarray(a)
                call(client, small, NAME, activations, a, s, allow_copies=False)
            assert einsumd.copies() == copies + 2


def test_padding_that_is_not_there_is_not_read(
    einsumd: Any, client: Any, small: Site, rng: np.random.Generator
) -> None:
    """Token fastest with the last row's padding cut off: the strides fit, the memory ends early."""
    weight = small.weights[NAME]
    activations = oracle.random_activations(rng, weight, 5, "FP32")
    groups, blocks = weight.groups, weight.blocks
    flat = np.full(groups * blocks * 8 - 3, np.nan, np.float32)
    for g in range(groups):
        for k in range(blocks):
            begin = (g * blocks + k) * 8
            flat[begin : begin + 5] = activations.scales[:, g, k]
    cut = np.lib.stride_tricks.as_strided(
        flat, (5, groups, blocks), (4, blocks * 32, 32), writeable=False
    )
    copies = einsumd.copies()
    call(client, small, NAME, activations, activations.values, cut)
    assert einsumd.copies() == copies + 1


def test_bits_are_taken_for_what_is_expected(
    einsumd: Any, client: Any, small: Site, rng: np.random.Generator
) -> None:
    activations = oracle.random_activations(rng, small.weights[NAME], 3, "UE8M0")
    call(client, small, NAME, activations, activations.values, activations.scales)


def test_output_of_any_strides_is_filled(
    einsumd: Any, client: Any, small: Site, rng: np.random.Generator
) -> None:
    weight = small.weights[NAME]
    activations = oracle.random_activations(rng, weight, 3, "UE8M0")
    wide = np.zeros((3, weight.groups, weight.output_dim + 8), BF16)
    flat = np.zeros((3, weight.groups * weight.output_dim), BF16)
    for out, copied in ((wide[:, :, 4:-4], 1), (flat, 0)):
        copies = einsumd.copies()
        client.einsum(NAME, *arrays(activations, "TGR", "TGK"), out)
        oracle.check(out.tobytes(), "BF16", *small.expected(activations, weight))
        assert einsumd.copies() == copies + copied
    assert not wide[:, :, :4].any() and not wide[:, :, -4:].any()


def test_a_slice_of_groups(
    einsumd: Any, client: Any, small: Site, rng: np.random.Generator
) -> None:
    weight = small.weights[NAME]
    handle = client.weight(NAME)
    copies = einsumd.copies()
    for begin, end in ((0, 2), (2, 4), (3, 4), (0, 4)):
        part = weight.slice(begin, end)
        activations = oracle.random_activations(rng, part, 3, "UE8M0")
        for which in (handle[begin:end], f"{NAME}[{begin}:{end}]", handle[begin:end].key):
            out = np.empty((3, end - begin, weight.output_dim), BF16)
            client.einsum(which, *arrays(activations, "GTR", "packed GKT"), out)
            oracle.check(out.tobytes(), "BF16", *small.expected(activations, part))
    assert handle[1:][1:] == handle[2:4] and handle[2:4].groups == 2
    assert einsumd.copies() == copies


def test_from_attentions_output_on(einsumd: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """Also by two clients' worth of groups, and with attention of strange strides."""
    listen = ["127.0.0.1:0", f"unix:{tmp_path}/einsumd.sock"]
    with start_output_project(tmp_path, listen=listen) as site, contextlib.ExitStack() as stack:
        endpoints = site.daemon.listening
        clients = [stack.enter_context(einsumd.Client(endpoints[1])),
                   stack.enter_context(einsumd.Client(endpoints, shard="groups"))]  # fmt: skip
        for name in PROJECTED:
            case = Projection(rng, name, tokens=3)
            attention = case.attention.view(BF16)
            shape = (3, case.weight.groups, 256)
            strided = np.zeros((6, *attention.shape[1:]), BF16)
            strided[::2] = attention
            for client in clients:
                for each in (attention, attention.reshape(3, -1), strided[::2]):
                    out = np.empty(shape, BF16)
                    client.output_project(name, each, case.positions, out)
                    oracle.check(out.tobytes(), "BF16", *case.expected())
            part = Projection(rng, name, tokens=2, groups=(0, 1))
            out = np.empty((2, 1, 256), np.float32)
            clients[0].output_project(
                f"{name}[0:1]", part.attention.view(BF16), part.positions, out
            )
            oracle.check(out.tobytes(), "FP32", *part.expected())
        with pytest.raises(einsumd.InvalidArgument, match="positions: expected"):
            client.output_project(name, attention, case.positions[:2], np.empty(shape, BF16))
        with pytest.raises(einsumd.FailedPrecondition, match="rope"):
            client.output_project(
                WITHOUT_ROPE, np.zeros((1, 4, 512), BF16), np.zeros(1, np.int64),
                np.empty((1, 4, 256), BF16),
            )  # fmt: skip


def test_no_tokens_are_no_error(einsumd: Any, client: Any, small: Site) -> None:
    out = np.empty((0, 4, 256), BF16)
    client.einsum(NAME, np.empty((0, 4, 512), np.uint8), np.empty((0, 4, 4), np.float32), out)


# ---- errors --------------------------------------------------------------------------------------


def good(rng: np.random.Generator, tokens: int = 3) -> dict[str, np.ndarray]:
    return {
        "activations": rng.integers(0, 100, (tokens, 4, 512), np.uint8),
        "scales": np.ones((tokens, 4, 4), np.float32),
        "out": np.empty((tokens, 4, 256), BF16),
    }


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"activations": np.zeros((3, 4, 511), np.uint8)}, "a", r"\[3, 4, 512\].*\[3, 4, 511\]"),
        ({"activations": np.zeros((3, 4, 512), np.float32)}, "a", "E4M3.*FP32"),
        ({"activations": np.zeros((3, 4, 512), np.complex64)}, "a", "complex64"),
        ({"activations": [1, 2]}, "a", "numpy array or a torch tensor, got list"),
        ({"scales": np.zeros((3, 4, 5), np.float32)}, "a_scale", r"\[3, 4, 4\].*\[3, 4, 5\]"),
        ({"scales": np.zeros((3, 4, 4), ">f4")}, "a_scale", ">f4"),
        ({"scales": np.zeros((3, 4, 4), np.int64)}, "a_scale", "LONGS"),
        ({"out": np.zeros((3, 4, 255), BF16)}, "out", r"\[3, 4, 256\].*\[3, 4, 255\]"),
        ({"out": np.zeros((3, 4, 256), np.int32)}, "out", "BF16 or FP32"),
        ({"out": np.frombuffer(bytes(6144), BF16).reshape(3, 4, 256)}, "out", "read-only"),
        ({"priority": "urgent"}, "priority", "low, normal, high"),
        ({"timeout": 0}, "timeout", "above 0"),
        ({"recipe": (1, 32, 32)}, "a_scale", r"\[3, 4, 16\]"),
    ],
)  # fmt: skip
def test_bad_arguments_name_the_field(
    einsumd: Any, client: Any, rng: np.random.Generator, change: dict, field: str, text: str
) -> None:
    with pytest.raises(einsumd.InvalidArgument, match=text) as caught:
        client.einsum(NAME, **(good(rng) | change))
    assert caught.value.field == field and isinstance(caught.value, ValueError)


def test_unsupported_is_not_implemented(
    einsumd: Any, client: Any, rng: np.random.Generator
) -> None:
    for change in ({"recipe": (1, 64, 64)}, {"equation": "bhd,hdr->bhr"}, {"kernel": "warp9"}):
        with pytest.raises(einsumd.Unimplemented, match=next(iter(change))):
            client.einsum(NAME, **(good(rng) | change))
    tensors = good(rng)
    a = (tensors["activations"], tensors["scales"])
    with pytest.raises(NotImplementedError, match="c: expected None"):
        einsumd.fp8_einsum(EQUATION, a, (client.weight(NAME), None), tensors["out"], tensors["out"])


def test_the_servers_own_text_and_code_arrive(
    einsumd: Any, client: Any, rng: np.random.Generator
) -> None:
    with pytest.raises(einsumd.NotFound) as caught:
        client.einsum("layers.77.attn.wo_a", **good(rng))
    error = caught.value
    assert error.code == "NOT_FOUND" and error.from_server and isinstance(error, LookupError)
    assert error.endpoint == client.endpoints[0] and error.endpoint in str(error)
    assert "layers.77.attn.wo_a" in error.text


def test_every_code_has_a_class(einsumd: Any) -> None:
    """As the header counts them."""
    header = (REPOSITORY / "client/einsum_client.h").read_text()
    block = header[header.index("enum einsum_client_status {") :].split("}", 1)[0]
    codes = set(re.findall(r"EINSUM_CLIENT_([A-Z_]+) =", block)) - {"OK"}
    classes = {c.code for _, c in inspect.getmembers(einsumd, inspect.isclass)
               if issubclass(c, einsumd.Error)}  # fmt: skip
    assert classes == codes


def test_nobody_there(einsumd: Any, tmp_path: Path) -> None:
    with einsumd.Client(f"unix:{tmp_path}/none.sock", attempts=1, timeout=2) as client:
        with pytest.raises(einsumd.Unavailable) as caught:
            client.weights()
    assert isinstance(caught.value, ConnectionError)


@contextlib.contextmanager
def silent_server(path: Path) -> Iterator[str]:
    """Accepts connections, and never says a word."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield f"unix:{path}"


def test_timeout_and_released_lock(einsumd: Any, tmp_path: Path) -> None:
    """While a call waits, other threads of Python run."""
    with silent_server(tmp_path / "s.sock") as endpoint:
        client = einsumd.Client(endpoint, timeout=1.5, shared_memory=None)
        ticks, stop = 0, threading.Event()

        def tick() -> None:
            nonlocal ticks
            while not stop.wait(0.01):
                ticks += 1

        thread = threading.Thread(target=tick)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(einsumd.DeadlineExceeded) as caught:
            client.weights()
        elapsed = time.monotonic() - begin
        stop.set()
        thread.join()
        client.close()
    assert isinstance(caught.value, TimeoutError)
    assert 1.0 < elapsed < seconds(10) and ticks > 20


def test_closed_client_refuses(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    client = einsumd.Client(small.daemon.address)
    handle = client.weight(NAME)
    client.close()
    client.close()
    with pytest.raises(einsumd.FailedPrecondition, match="closed"):
        client.einsum(handle, **good(rng))
    assert "closed" in repr(client)


def test_close_while_others_call(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    """Calls under way end as ever; later ones are refused; nothing crashes."""
    for _ in range(5):
        client = einsumd.Client(small.daemon.listening[1])
        outcomes: list[Any] = []

        def work(client: Any = client, outcomes: list[Any] = outcomes) -> None:
            tensors = good(rng)
            try:
                while True:
                    client.einsum(NAME, **tensors)
            except einsumd.Error as error:
                outcomes.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        client.close()
        for thread in threads:
            thread.join()
        assert [error.code for error in outcomes] == ["FAILED_PRECONDITION"] * 4


def test_forked_child_is_told(einsumd: Any, small: Site) -> None:
    client = einsumd.Client(small.daemon.address)
    client.weights()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for attempt in (client.weights, lambda: einsumd.Client(small.daemon.address)):
            try:
                attempt()
            except einsumd.FailedPrecondition as error:
                said.append(str(error))
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    said = os.read(reader, 4096).decode().splitlines()
    assert len(said) == 2 and "before the process forked" in said[0] and "forked from" in said[1]
    client.weights()
    client.close()


# ---- threads and shared memory -------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", [0, 1])
@pytest.mark.parametrize("shared", [None, "auto"])
def test_one_client_of_many_threads(
    einsumd: Any, small: Site, rng: np.random.Generator, endpoint: int, shared: str | None
) -> None:
    failures: list[BaseException] = []
    cases = []
    for name, weight in list(small.weights.items())[:2]:
        for tokens in (1, 2, 5):
            activations = oracle.random_activations(rng, weight, tokens, "UE8M0")
            cases.append((name, activations, small.expected(activations, weight)))

    def work(client: Any, first: int) -> None:
        try:
            for i in range(40):
                name, activations, expected = cases[(first + i) % len(cases)]
                out = client.empty((activations.tokens, 4, 256), BF16)
                client.einsum(name, *arrays(activations, "GTR", "packed GKT"), out)
                oracle.check(out.tobytes(), "BF16", *expected)
        except BaseException as failure:
            failures.append(failure)

    with einsumd.Client(small.daemon.listening[endpoint], shared_memory=shared) as client:
        threads = [threading.Thread(target=work, args=(client, i)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def test_transport_is_the_best_that_is_offered(einsumd: Any, small: Site) -> None:
    wanted = {"auto": "ring", "shm": "shm", "unix": "unix"}
    for transport, expected in wanted.items():
        with einsumd.Client(small.daemon.listening[1], transport=transport) as client:
            assert client.transport == expected and expected in repr(client)


def test_memory_outlives_its_client(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    client = einsumd.Client(small.daemon.address)
    activations = oracle.random_activations(rng, small.weights[NAME], 2, "UE8M0")
    out = client.empty((2, 4, 256), BF16)
    client.einsum(NAME, *arrays(activations, "TGR", "TGK"), out)
    client.close()
    del client
    oracle.check(out.tobytes(), "BF16", *small.expected(activations, small.weights[NAME]))
    out[...] = 1


def test_memory_is_given_back(einsumd: Any, small: Site) -> None:
    with einsumd.Client(small.daemon.address, shared_memory_bytes=8 << 20) as client:
        for _ in range(20):
            held = client.empty((4, 1 << 20), np.uint8)
            held[...] = 1
            with pytest.raises(einsumd.ResourceExhausted, match="shared_memory_bytes"):
                client.empty(6 << 20)
            del held
        assert client.empty(0).size == 0


COUNT = """
import sys, struct
sys.path.insert(0, sys.argv[1])
import numpy as np, einsumd
client = einsumd.Client(sys.argv[2])
make = client.empty if sys.argv[3] == "empty" else np.empty
a, s = make((64, 4, 512), np.uint8), make((4, 4, 64), np.float32)
out = make((64, 4, 256), np.float32)
a[...], s[...], out[...] = 8, 1, 0
s = s.transpose(2, 0, 1)
def counted():
    with open(sys.argv[4], "rb") as file:
        return struct.unpack("<QQ", file.read())[1]
client.einsum(sys.argv[5], a, s, out)
begin = counted()
for _ in range(20):
    client.einsum(sys.argv[5], a, s, out)
print(counted() - begin, client.transport, out.any())
"""


def test_tensors_in_shared_memory_are_not_copied(einsumd: Any, small: Site, tmp_path: Path) -> None:
    """Counted by a shim under the process, at memcpy itself. Of ordinary tensors each is copied."""
    copies = Copies(tmp_path)
    moved = {}
    for how in ("empty", "ordinary"):
        ran = subprocess.run(
            [sys.executable, "-c", COUNT, python_package.SITE, small.daemon.listening[1], how,
             copies.file, NAME],
            env=environment(copies.environment), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        count, transport, any_output = ran.stdout.split()
        assert (transport, any_output) == ("ring", "True")
        moved[how] = int(count) / 20
    tensors = 64 * 4 * 512 + 64 * 4 * 4 * 4 + 64 * 4 * 256 * 4
    assert moved["ordinary"] >= tensors
    # What remains is the library's own bookkeeping.
    assert moved["empty"] < tensors / 20, moved


# ---- control -------------------------------------------------------------------------------------


def test_control_calls(einsumd: Any, small: Site, client: Any) -> None:
    assert [handle.name for handle in client.weights()] == sorted(small.weights)
    weight = client.weight(NAME).weight
    assert (weight.groups, weight.output_dim, weight.reduced_dim) == (4, 256, 512)
    assert weight.recipes == ((1, 128, 128), (1, 1, 128))
    info = client.info()
    assert info.engine == ENGINE and info.limits["request_tokens_max"] == 8192
    assert info.shared_memory["socket"].endswith("shared.sock")
    assert client.health() is einsumd.Health.SERVING
    with pytest.raises(einsumd.NotFound):
        client.health("nobody.Service")
    results = client.self_test(NAME)
    assert [(r.weight, r.passed) for r in results] == [(NAME, True)]


def test_load_with_progress_and_unload(einsumd: Any, small: Site, client: Any) -> None:
    seen: list[Any] = []

    def give_up(progress: Any) -> bool:
        seen.append(progress)
        return False

    def stumble(_: Any) -> None:
        raise KeyError("mine")

    path = str(small.root / "model")
    options = {"output_dim": 256, "name_prefix": "again."}
    with pytest.raises(einsumd.Cancelled):
        client.load(path, on_progress=give_up, **options)
    assert seen and seen[0].weights_total == 3

    def forget() -> None:
        with contextlib.suppress(einsumd.NotFound):
            client.unload("again.*")

    forget()  # whoever gives up may be too late
    with pytest.raises(KeyError, match="mine"):
        client.load(path, on_progress=stumble, **options)
    forget()
    names = [f"again.{name}" for name in small.weights]
    loaded = client.load(path, ["*.wo_a.weight"], on_progress=seen.append, **options)
    assert sorted(handle.name for handle in loaded) == sorted(names)
    assert seen[-1].weights_done == 3
    assert sorted(client.unload("again.*")) == sorted(names)
    with pytest.raises(einsumd.NotFound):
        client.weight(names[0])
    with pytest.raises(einsumd.PermissionDenied) as caught:
        client.load("/etc")
    assert isinstance(caught.value, PermissionError)


def test_a_weight_that_came_back_in_another_shape(
    einsumd: Any, small: Site, client: Any, rng: np.random.Generator
) -> None:
    """The handle asks anew after the daemon has refused."""
    weight = oracle.random_weight(rng, groups=2, output_dim=128, reduced_dim=256)
    path = str(write_checkpoint(small.root / "other", {"x.attn.wo_a": weight}))
    first = str(write_checkpoint(small.root / "first", {"x.attn.wo_a": small.weights[NAME]}))
    client.load(first, output_dim=256)
    tensors = good(rng)
    client.einsum("x.attn.wo_a", **tensors)
    with einsumd.Client(small.daemon.address) as other:
        other.load(path, output_dim=128, replace=True)
    with pytest.raises(einsumd.InvalidArgument):
        client.einsum("x.attn.wo_a", **tensors)
    activations = oracle.random_activations(rng, weight, 3, "UE8M0")
    out = np.empty((3, 2, 128), BF16)
    client.einsum("x.attn.wo_a", *arrays(activations, "TGR", "TGK"), out)
    oracle.check(out.tobytes(), "BF16", *small.expected(activations, weight))
    client.unload("x.*")


def test_default_client(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    tensors = good(rng)
    a = (tensors["activations"], tensors["scales"])
    einsumd.set_default_client(None)
    with pytest.raises(einsumd.FailedPrecondition, match="einsumd.connect"):
        einsumd.fp8_einsum(EQUATION, a, (NAME, None), tensors["out"])
    with einsumd.connect(small.daemon.address) as client:
        einsumd.fp8_einsum(EQUATION, a, (NAME, NAME), tensors["out"])
        assert einsumd.default_client() is client
        with pytest.raises(einsumd.InvalidArgument, match="client that is gone"):
            einsumd.fp8_einsum(EQUATION, a, f"{NAME}@999999", tensors["out"])
    einsumd.set_default_client(None)
