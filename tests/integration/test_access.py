"""Who gets in: every method with each credential that is missing, wrong, expired or too weak; what
an address needs to be listened on; credentials that change under load."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from cryptography import x509
from google.protobuf import descriptor_pb2
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2

import oracle
from client import EINSUM, HEALTH, INFERENCE, TIMEOUT_S, Client, ReflectionStub
from conftest import Site, serving, small_weights
from daemon import Daemon, count, seconds, wait_until
from pki import Authority, Files, Pair, replace
from scrape import scrape

NEEDS = {
    "grpc.health.v1.Health": {"Check": "", "List": "", "Watch": ""},
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": "read"},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": "read"},
    EINSUM: {
        "Einsum": "infer", "OutputProject": "infer", "EinsumStream": "infer", "SelfTest": "infer",
        "ListWeights": "read", "GetWeight": "read", "ServerInfo": "read",
        "LoadWeights": "admin", "UnloadWeights": "admin",
    },
    INFERENCE: {
        "ServerLive": "", "ServerReady": "", "ModelInfer": "infer",
        "ServerMetadata": "read", "ModelReady": "read", "ModelMetadata": "read",
        "ModelConfig": "read", "ModelStatistics": "read", "RepositoryIndex": "read",
        "RepositoryModelLoad": "admin", "RepositoryModelUnload": "admin",
    },
}  # fmt: skip
SCOPES = ["infer", "read", "admin"]
METHODS = [
    (f"/{service}/{method}", need) for service in NEEDS for method, need in NEEDS[service].items()
]
REFUSED = {StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED}


def entry(name: str, token: str, *scopes: str, **more: str) -> dict:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return {"name": name, "sha256": digest, "scopes": list(scopes), **more}


def ask(
    channel: grpc.Channel, path: str, token: str | None = None, scheme: str = "Bearer "
) -> tuple[StatusCode, str]:
    """An empty message to a method of any kind: on the wire they are all alike."""
    metadata = [("authorization", scheme + token)] if token is not None else []
    call = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=TIMEOUT_S)
    try:
        next(call, None)
        if call.is_active():  # a stream that has answered
            return StatusCode.OK, ""
    except grpc.RpcError:
        pass
    finally:
        call.cancel()
    return call.code(), call.details() or ""


def bearer(token: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {token}")]}


# ---- tokens --------------------------------------------------------------------------------------

TOKENS = {
    name: secrets.token_urlsafe(32)
    for name in ("infer", "read", "admin", "all", "none", "expired", "removed")
}


def tokens_text(**more: dict) -> str:
    tokens = [entry(name, TOKENS[name], name) for name in SCOPES]
    tokens.append(entry("all", TOKENS["all"], *SCOPES))
    tokens.append(entry("none", TOKENS["none"]))
    tokens.append(entry("expired", TOKENS["expired"], *SCOPES, expires="2026-01-01T00:00:00Z"))
    return json.dumps({"tokens": tokens + list(more.values())})


class Guarded:
    """A daemon with TLS and tokens, a unix socket beside it, and a port for probes."""

    def __init__(self, folder: Path, site: Site, authority: Authority, files: Files):
        self.folder, self.site, self.authority, self.files = folder, site, authority, files
        tcp = next(a for a in site.daemon.listening if not a.startswith("unix:"))
        self.tcp = tcp.replace("127.0.0.1", "localhost")

    def channel(self, client: Pair | None = None) -> grpc.Channel:
        # Of its own: a shared one would go by another test's credentials.
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.secure_channel(self.tcp, self.authority.credentials(client), options)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority, files = Authority("servers"), Files(folder / "tls")
    files.write_pair(authority.server())
    files.tokens.write_text(tokens_text())
    with serving(
        folder, small_weights(), 256,
        listen=[f"unix:{folder}/s.sock", "127.0.0.1:0"], health_listen=["127.0.0.1:0"],
        http_listen="127.0.0.1:0", access_look_ms=50, tcp_scopes=["auto"],
        **files.config(tokens=True),
    ) as site:  # fmt: skip
        yield Guarded(folder, site, authority, files)


def served_methods(channel: grpc.Channel) -> dict[str, set[str]]:
    """What the daemon says that it serves."""
    stub = ReflectionStub(channel, "v1")

    def answer(**question: Any) -> Any:
        request = reflection_pb2.ServerReflectionRequest(**question)
        return next(stub.ServerReflectionInfo(iter([request])))

    found: dict[str, set[str]] = {}
    for service in answer(list_services="").list_services_response.service:
        for raw in answer(
            file_containing_symbol=service.name
        ).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            for each in file.service:
                if f"{file.package}.{each.name}" == service.name:
                    found[service.name] = {method.name for method in each.method}
    return found


def implemented(channel: grpc.Channel, service: str, method: str) -> bool:
    return ask(channel, f"/{service}/{method}") != (StatusCode.UNIMPLEMENTED, "unknown method")


def test_every_method_has_its_scope_here(guarded: Guarded) -> None:
    """A method that is new must say in NEEDS what it needs."""
    channel = guarded.site.client.channel
    for service, methods in served_methods(channel).items():
        there = {method for method in methods if implemented(channel, service, method)}
        assert there == set(NEEDS.get(service, {})), service


CREDENTIALS = [
    # who, token, scheme, scopes; None: UNAUTHENTICATED whatever is asked for
    ("no token", None, "Bearer ", None),
    ("a wrong token", "x" * 43, "Bearer ", None),
    ("nearly", TOKENS["all"][:-1], "Bearer ", None),
    ("a removed token", TOKENS["removed"], "Bearer ", None),
    ("an expired token", TOKENS["expired"], "Bearer ", None),
    ("another scheme", TOKENS["all"], "Basic ", None),
    ("no scheme", TOKENS["all"], "", None),
    ("an empty token", "", "Bearer ", None),
    ("a long token", "y" * 4000, "Bearer ", None),
    ("no scope", TOKENS["none"], "Bearer ", set()),
    *((scope, TOKENS[scope], "Bearer ", {scope}) for scope in SCOPES),
    ("all", TOKENS["all"], "bearer ", set(SCOPES)),
]


@pytest.mark.parametrize(
    "token, scheme, scopes", [row[1:] for row in CREDENTIALS], ids=[row[0] for row in CREDENTIALS]
)
def test_every_method_with_every_credential(
    guarded: Guarded, token: str | None, scheme: str, scopes: set[str] | None
) -> None:
    with guarded.channel() as channel:
        for path, need in METHODS:
            code, details = ask(channel, path, token, scheme)
            if need == "" or (scopes and need in scopes):
                assert code not in REFUSED, (path, code, details)
            elif scopes is None:
                assert code == StatusCode.UNAUTHENTICATED, (path, code, details)
            else:
                assert code == StatusCode.PERMISSION_DENIED, (path, code, details)
                assert f'the scope "{need}"' in details


def test_an_unknown_method_is_unimplemented(guarded: Guarded) -> None:
    with guarded.channel() as channel:
        assert ask(channel, "/einsum.v1.Einsum/NoSuch")[0] == StatusCode.UNIMPLEMENTED


def test_two_tokens_are_none(guarded: Guarded) -> None:
    with guarded.channel() as channel:
        call = channel.unary_unary(f"/{EINSUM}/ServerInfo")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=TIMEOUT_S, metadata=bearer(TOKENS["all"])["metadata"] * 2)
        assert caught.value.code() == StatusCode.UNAUTHENTICATED


def test_a_unix_socket_needs_no_token(guarded: Guarded) -> None:
    for path, _ in METHODS:
        code, details = ask(guarded.site.client.channel, path)
        assert code not in REFUSED, (path, code, details)


def test_the_health_port(guarded: Guarded, rng: np.random.Generator) -> None:
    """Plain text, beside TLS, and health alone, whoever asks."""
    ready = guarded.site.daemon.wait_event("ready")
    with grpc.insecure_channel(ready["health_listen"]) as channel:
        for path, _ in METHODS:
            code, details = ask(channel, path, TOKENS["all"])
            if path.startswith(f"/{HEALTH}/"):
                assert code not in REFUSED
            elif "/Server" in path and path.endswith(("Live", "Ready")):
                assert code == StatusCode.OK
            else:
                assert code == StatusCode.PERMISSION_DENIED, (path, code, details)
                assert "health_listen" in details


def test_refusals_are_counted_and_logged_without_secrets(guarded: Guarded) -> None:
    daemon = guarded.site.daemon
    before = scrape(daemon)
    with guarded.channel() as channel:
        for token in (None, "wrong", TOKENS["expired"], TOKENS["read"]):
            ask(channel, f"/{EINSUM}/LoadWeights", token)
    after = scrape(daemon)
    for reason in ("no_token", "unknown_token", "expired_token", "scope"):
        name = "einsumd_access_refused_total"
        assert after.total(name, reason=reason) == before.total(name, reason=reason) + 1
    refused = [event for event in daemon.events if event["msg"] == "call refused"]
    assert "expired" in {event["token"] for event in refused}  # by name
    for secret in TOKENS.values():
        digest = hashlib.sha256(secret.encode()).hexdigest()
        assert secret not in daemon.log and digest not in daemon.log


def test_a_bad_file_changes_nothing(guarded: Guarded) -> None:
    daemon = guarded.site.daemon
    replace(guarded.files.tokens, '{"tokens": [{"name": "a"}]}')
    replace(guarded.files.certificate, "no certificate")
    daemon.wait_event("tokens not read, those in force stay")
    daemon.wait_event("certificate not read, the one in force stays")
    with guarded.channel() as channel:
        assert ask(channel, f"/{EINSUM}/ServerInfo", TOKENS["all"])[0] == StatusCode.OK
    # A pair that does not match is no better.
    replace(guarded.files.certificate, guarded.authority.server().certificate)
    wait_until(lambda: daemon.log.count("certificate not read") >= 2)
    with guarded.channel() as channel:
        assert ask(channel, f"/{EINSUM}/ServerInfo", TOKENS["all"])[0] == StatusCode.OK
    read = daemon.log.count('"certificate read"')
    guarded.files.write_pair(guarded.authority.server())
    replace(guarded.files.tokens, tokens_text())
    wait_until(lambda: daemon.log.count('"certificate read"') > read)


def test_kubernetes_swaps_a_link(guarded: Guarded) -> None:
    """A mounted Secret: the file is a link through `..data`, and that is what changes."""
    folder = guarded.folder / "mounted"
    for version in ("1", "2"):
        (folder / version).mkdir(parents=True)
    (folder / "..data").symlink_to("1")
    (folder / "tokens.json").symlink_to("..data/tokens.json")
    (folder / "1/tokens.json").write_text(tokens_text())
    new = secrets.token_urlsafe(32)
    (folder / "2/tokens.json").write_text(json.dumps({"tokens": [entry("new", new, "read")]}))
    with Daemon(
        folder / "daemon", tokens_file=str(folder / "tokens.json"), access_look_ms=50,
        tcp_scopes=["auto"],
    ) as daemon:  # fmt: skip
        with grpc.insecure_channel(daemon.address) as channel:
            path = f"/{EINSUM}/ServerInfo"
            assert ask(channel, path, new)[0] == StatusCode.UNAUTHENTICATED
            assert ask(channel, path, TOKENS["read"])[0] == StatusCode.OK
            (folder / "..new").symlink_to("2")
            (folder / "..new").rename(folder / "..data")
            wait_until(lambda: ask(channel, path, new)[0] == StatusCode.OK)
            assert ask(channel, path, TOKENS["read"])[0] == StatusCode.UNAUTHENTICATED


# ---- certificates --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """Callers need a certificate, which gives nothing by itself."""
    folder = tmp_path_factory.mktemp("mutual")
    authority, files = Authority("everybody"), Files(folder / "tls")
    files.write_pair(authority.server())
    files.client_ca.write_bytes(authority.certificate)
    certificates = [{"name": f"{scope}.example", "scopes": [scope]} for scope in SCOPES]
    certificates.append({"name": "spiffe://example/all", "scopes": SCOPES})
    tokens = [entry("admin", TOKENS["admin"], "admin")]
    files.tokens.write_text(json.dumps({"tokens": tokens, "certificates": certificates}))
    with serving(
        folder, small_weights(), 256,
        listen=[f"unix:{folder}/s.sock", "127.0.0.1:0"], tls_handshake_ms=500,
        http_listen="127.0.0.1:0", access_look_ms=50, tls_client_scopes=[], tcp_scopes=["auto"],
        **files.config(client_ca=True, tokens=True),
    ) as site:  # fmt: skip
        yield Guarded(folder, site, authority, files)


CERTIFICATES: list[tuple[str, list[x509.GeneralName], set[str]]] = [
    ("nobody.example", [], set()),
    *((f"{scope}.example", [], {scope}) for scope in SCOPES),
    ("nobody", [x509.DNSName("read.example")], {"read"}),
    ("read.example", [x509.DNSName("admin.example")], {"read", "admin"}),
    ("nobody", [x509.UniformResourceIdentifier("spiffe://example/all")], set(SCOPES)),
    ("Read.example", [x509.DNSName("read.example.org")], set()),
]


@pytest.mark.parametrize("common_name, others, scopes", CERTIFICATES)
def test_every_method_with_every_certificate(
    mutual: Guarded, common_name: str, others: list[x509.GeneralName], scopes: set[str]
) -> None:
    pair = mutual.authority.issue(common_name, *others)
    with mutual.channel(pair) as channel:
        for path, need in METHODS:
            code, details = ask(channel, path)
            refused = need != "" and need not in scopes
            assert (code == StatusCode.PERMISSION_DENIED) == refused, (path, code, details)
        # A token adds its own.
        code, _ = ask(channel, f"/{EINSUM}/LoadWeights", TOKENS["admin"])
        assert code not in REFUSED


def test_the_projection_is_right_by_tls(mutual: Guarded, rng: np.random.Generator) -> None:
    credentials = mutual.authority.credentials(mutual.authority.issue("infer.example"))
    schema = mutual.site.client.schema
    with Client(mutual.tcp, schema, credentials=credentials) as client:
        for _ in range(count(20)):
            tokens = int(rng.choice([1, 3, 64, 500]))
            request, (expected, allowed) = mutual.site.good_case(rng, tokens)
            reply = client.einsum(request)
            oracle.check(reply.output, "BF16", expected, allowed)
        replies = list(client.stream([request] * 8))
        assert len(replies) == 8


def test_a_certificates_name_may_be_taken_back(mutual: Guarded) -> None:
    """On a connection that is open."""
    text = mutual.files.tokens.read_text()
    with mutual.channel(mutual.authority.issue("infer.example")) as channel:
        path = f"/{EINSUM}/Einsum"
        assert ask(channel, path)[0] == StatusCode.INVALID_ARGUMENT
        replace(mutual.files.tokens, json.dumps({"certificates": []}))
        wait_until(lambda: ask(channel, path)[0] == StatusCode.PERMISSION_DENIED)
        replace(mutual.files.tokens, text)
        wait_until(lambda: ask(channel, path)[0] == StatusCode.INVALID_ARGUMENT)


# ---- what an address needs -----------------------------------------------------------------------


def start_error(folder: Path, **config: Any) -> str:
    daemon = Daemon(folder, wait=False, **config)
    assert daemon.wait_exit() == 1
    return daemon.wait_event("cannot start")["reason"]


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_other_machines_need_a_reason(tmp_path: Path, address: str) -> None:
    reason = start_error(tmp_path / "refused", listen=["127.0.0.1:0", address])
    for word in (address, "tls_certificate", "tokens_file", "insecure_listen"):
        assert word in reason
    with Daemon(tmp_path / "insecure", listen=[address], insecure_listen=True) as daemon:
        listens = daemon.wait_event("listens")
        assert (listens["transport"], listens["credential"]) == ("plain text", "none")
        daemon.wait_event("whoever reaches this address may call, without a credential")


def test_tokens_in_plain_text_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text(tokens_text())
    with Daemon(
        tmp_path, listen=["0.0.0.0:0"], tokens_file=str(tmp_path / "tokens.json"),
        tcp_scopes=["auto"],
    ) as daemon:  # fmt: skip
        assert daemon.wait_event("listens")["scopes_without"] == "none"
        daemon.wait_event("tokens cross the network in plain text: set tls_certificate and tls_key")


def test_the_defaults(tmp_path: Path) -> None:
    """Loading is for the unix socket alone."""
    with Daemon(
        tmp_path, listen=[f"unix:{tmp_path}/s.sock", "127.0.0.1:0"], tcp_scopes=["auto"],
        weights_roots=[str(tmp_path)],
    ) as daemon:  # fmt: skip
        for address, allowed in ((daemon.listening[0], True), (daemon.listening[1], False)):
            with grpc.insecure_channel(address) as channel:
                for path, need in METHODS:
                    code, details = ask(channel, path)
                    refused = need == "admin" and not allowed
                    assert (code == StatusCode.PERMISSION_DENIED) == refused, (path, details)
                    if refused:
                        assert 'needs the scope "admin"; this caller has: infer,read' in details


@pytest.mark.parametrize("missing", ["certificate", "key", "client_ca"])
def test_files_must_be_good_at_start(tmp_path: Path, missing: str) -> None:
    authority, files = Authority("servers"), Files(tmp_path / "tls")
    files.write_pair(authority.server())
    files.client_ca.write_bytes(authority.certificate)
    getattr(files, missing).unlink()
    reason = start_error(tmp_path, **files.config(client_ca=True))
    assert reason.startswith(f"tls_{missing}: ") and str(getattr(files, missing)) in reason


# ---- change under load ---------------------------------------------------------------------------

ROTATIONS = 100


class Load:
    """Callers that never stop: some keep their connection, some make one for each call."""

    def __init__(self, place: Guarded, request: bytes):
        self.place, self.request = place, request
        self.current: tuple[str, Pair] | None = None
        self.stop = threading.Event()
        self.calls, self.failures = 0, []
        self.threads = [
            threading.Thread(target=self.run, args=(keep,)) for keep in (True, True, False, False)
        ]

    def call(self, channel: grpc.Channel, token: str) -> None:
        try:
            channel.unary_unary(f"/{EINSUM}/Einsum")(
                self.request, timeout=TIMEOUT_S, **bearer(token)
            )
            self.calls += 1
        except grpc.RpcError as error:
            self.failures.append(error)

    def run(self, keep: bool) -> None:
        kept = self.place.channel(self.current[1]) if keep else None
        while not self.stop.is_set():
            token, pair = self.current
            if kept:
                self.call(kept, token)
                continue
            with self.place.channel(pair) as channel:
                self.call(channel, token)

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def test_rotation_under_load(mutual: Guarded, rng: np.random.Generator) -> None:
    """Server's pair, clients' authority and tokens, all new each time, the last ones still good."""
    daemon, files = mutual.site.daemon, mutual.files
    before = {path: path.read_bytes() for path in (files.client_ca, files.tokens)}
    credentials: list[tuple[Authority, Pair, str]] = []
    load = Load(mutual, mutual.site.good_request(rng).SerializeToString())

    def rotate(number: int) -> None:
        authority = Authority(f"clients {number}")
        token = secrets.token_urlsafe(32)
        credentials.append((authority, authority.issue("caller"), token))
        recent = credentials[-3:]
        read = daemon.log.count('"certificate read"'), daemon.log.count('"tokens read"')
        replace(files.client_ca, b"".join(each.certificate for each, _, _ in recent))
        tokens = [entry(each, each, "infer") for _, _, each in recent]
        for each in tokens:
            each["name"] = each["sha256"][:8]
        replace(files.tokens, json.dumps({"tokens": tokens}))
        files.write_pair(mutual.authority.server())
        wait_until(lambda: daemon.log.count('"certificate read"') > read[0]
                   and daemon.log.count('"tokens read"') > read[1])  # fmt: skip
        load.current = token, credentials[-1][1]

    rotate(0)
    with load:
        for number in range(1, count(ROTATIONS) + 1):
            rotate(number)
        wait_until(lambda: load.calls > 0)
    assert not load.failures, load.failures[:3]
    assert load.calls > count(ROTATIONS)

    _, pair, token = credentials[-1]
    path = f"/{EINSUM}/Einsum"
    with mutual.channel(pair) as channel:
        assert ask(channel, path, token)[0] == StatusCode.INVALID_ARGUMENT
        for _, _, old in credentials[:-3]:
            code, details = ask(channel, path, old)
            assert (code, details) == (StatusCode.UNAUTHENTICATED, "the token is not known")
    for _, old, _ in credentials[:-3:20]:
        with mutual.channel(old) as channel:
            assert ask(channel, path, token)[0] == StatusCode.UNAVAILABLE
    for where, content in before.items():
        replace(where, content)
    wait_until(lambda: works(mutual))


def works(place: Guarded) -> bool:
    with place.channel(place.authority.issue("infer.example")) as channel:
        return ask(channel, f"/{EINSUM}/Einsum")[0] == StatusCode.INVALID_ARGUMENT


def test_drain_by_tls(tmp_path: Path, rng: np.random.Generator) -> None:
    """Calls by TLS end as well as others when the daemon stops."""
    authority, files = Authority("servers"), Files(tmp_path / "tls")
    files.write_pair(authority.server())
    for _ in range(count(5)):
        with serving(
            tmp_path, small_weights(), 256, listen=[f"unix:{tmp_path}/s.sock", "127.0.0.1:0"],
            lame_duck_ms=400, **files.config(),
        ) as site:  # fmt: skip
            place = Guarded(tmp_path, site, authority, files)
            request = site.good_request(rng).SerializeToString()
            with place.channel() as channel:
                call = channel.unary_unary(f"/{EINSUM}/Einsum")
                site.daemon.terminate()
                ends = time.monotonic() + 0.3
                while time.monotonic() < ends:
                    try:
                        call(request, timeout=seconds(10))
                    except grpc.RpcError as error:  # closed between calls, and nobody listens
                        assert error.code() == StatusCode.UNAVAILABLE, error
                        break
