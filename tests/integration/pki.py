"""Certificates, made as they are needed, by a library that the daemon does not use."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass
class Pair:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


def name_of(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


class Authority:
    def __init__(self, name: str):
        self.name = name_of(name)
        self.key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(self.name, self.key.public_key(), expired=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        self.certificate = builder.sign(self.key, hashes.SHA256()).public_bytes(
            serialization.Encoding.PEM
        )

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, expired: bool
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 30 * DAY)
            .not_valid_after(now - DAY if expired else now + 30 * DAY)
        )

    def issue(
        self, common_name: str, *other_names: x509.GeneralName, expired: bool = False
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(name_of(common_name), key.public_key(), expired)
        if other_names:
            builder = builder.add_extension(x509.SubjectAlternativeName(other_names), False)
        certificate = builder.sign(self.key, hashes.SHA256())
        return Pair(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def server(self) -> Pair:
        return self.issue("einsumd", x509.DNSName("localhost"))

    def credentials(self, client: Pair | None = None) -> grpc.ChannelCredentials:
        """Of a client that trusts this authority."""
        if client is None:
            return grpc.ssl_channel_credentials(self.certificate)
        return grpc.ssl_channel_credentials(self.certificate, client.key, client.certificate)


def replace(path: Path, content: bytes | str) -> None:
    """At once, as whoever rotates should."""
    new = path.with_suffix(".new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(new, path)


@dataclass
class Files:
    """What the daemon reads."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.certificate = self.folder / "tls.crt"
        self.key = self.folder / "tls.key"
        self.client_ca = self.folder / "ca.crt"
        self.tokens = self.folder / "tokens.json"

    def write_pair(self, pair: Pair) -> None:
        replace(self.key, pair.key)
        replace(self.certificate, pair.certificate)

    def config(self, client_ca: bool = False, tokens: bool = False) -> dict[str, str]:
        config = {"tls_certificate": str(self.certificate), "tls_key": str(self.key)}
        if client_ca:
            config["tls_client_ca"] = str(self.client_ca)
        if tokens:
            config["tokens_file"] = str(self.tokens)
        return config
