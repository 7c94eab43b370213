"""The cluster's own certificate authority, made at first start: mutual TLS between orchestrator, workers, manager and gateway.

Whoever holds any certificate of the cluster can run code in every member of it (Dask's control plane unpickles): the files are 0600 and
leave the machine only on purpose.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tether.errors import ConfigError
from tether.security.files import locked, written_aside

__all__ = ["ROLES", "Role", "TlsFiles", "ensure_tls"]

Role = Literal["orchestrator", "worker", "manager", "gateway"]
ROLES: tuple[Role, ...] = ("orchestrator", "worker", "manager", "gateway")
_DAYS = 3650
"""Ten years: these certificates name one data folder's processes, and renewing them needs a restart of all."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of one role's certificate and key and of the authority that all trust."""

    ca: Path
    certificate: Path
    key: Path

    def security(self) -> dict[str, object]:
        """Arguments of `distributed.Security`, the same files for whatever part the process plays in Dask."""
        paired = {
            f"tls_{part}_{kind}": str(path)
            for part in ("scheduler", "worker", "client")
            for kind, path in (("cert", self.certificate), ("key", self.key))
        }
        return {"tls_ca_file": str(self.ca), "require_encryption": True, **paired}


def tls_files(folder: Path, role: Role) -> TlsFiles:
    """Where the files of a role lie; they may not exist yet."""
    return TlsFiles(folder / "ca.pem", folder / f"{role}.pem", folder / f"{role}-key.pem")


def ensure_tls(folder: Path, role: Role) -> TlsFiles:
    """The files of a role, made together with the authority when they are missing; by one process at a time.

    Raises: ConfigError: the authority is there and its key is not.
    """
    files = tls_files(folder, role)
    if not files.certificate.exists():
        with locked(folder / "lock"):
            _make(files, folder / "ca-key.pem", role)
    return files


def _make(files: TlsFiles, authority_key: Path, role: Role) -> None:
    if not files.ca.exists():
        _make_authority(files.ca, authority_key)
    if not authority_key.exists():
        raise ConfigError(f"{authority_key} is missing; restore it, or delete {files.ca.parent} while no lab runs to make a new authority")
    if not files.certificate.exists():
        _make_certificate(files, authority_key, role)


def _make_authority(path: Path, key_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Tether cluster authority")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_private(key_path, _pem(key))
    _write_private(path, certificate.public_bytes(serialization.Encoding.PEM))


def _make_certificate(files: TlsFiles, authority_key_path: Path, role: Role) -> None:
    authority = x509.load_pem_x509_certificate(files.ca.read_bytes())
    authority_key = serialization.load_pem_private_key(authority_key_path.read_bytes(), None)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{authority_key_path} is not the key of a Tether authority; restore it from a backup")
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        _builder(_name(f"tether {role}"), authority.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write_private(files.key, _pem(key))
    _write_private(files.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    early = now - dt.timedelta(days=1)  # hosts whose clocks are set back, or differ, believe it too
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(early)
        .not_valid_after(now + dt.timedelta(days=_DAYS))
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write_private(path: Path, data: bytes) -> None:
    """All of it or nothing, readable by this user only."""
    with written_aside(path, data) as partial:
        partial.rename(path)
