"""The cluster's own authority: made once, private, and nothing else is accepted."""

import asyncio
import ssl
import subprocess
import sys

import pytest
from cryptography import x509

from tether.errors import ConfigError
from tether.security.tls import ROLES, ensure_tls


def test_every_role_gets_a_certificate_of_one_authority(tmp_path):
    files = [ensure_tls(tmp_path, role) for role in ROLES]
    authority = x509.load_pem_x509_certificate(files[0].ca.read_bytes())
    for each in files:
        x509.load_pem_x509_certificate(each.certificate.read_bytes()).verify_directly_issued_by(authority)
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


def test_a_second_start_keeps_what_is_there(tmp_path):
    first = ensure_tls(tmp_path, "worker").certificate.read_bytes()
    assert ensure_tls(tmp_path, "worker").certificate.read_bytes() == first


def test_an_authority_without_its_key_is_an_error_that_says_what_to_do(tmp_path):
    ensure_tls(tmp_path, "worker")
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(ConfigError, match="restore it, or delete"):
        ensure_tls(tmp_path, "gateway")


def test_what_a_killed_start_left_half_written_is_in_nobodys_way(tmp_path):
    (tmp_path / "ca-key.pem.partial").mkdir()
    ensure_tls(tmp_path, "worker")
    found = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert found == ["ca-key.pem", "ca.pem", "lock", "worker-key.pem", "worker.pem"]


async def connect(server_files, client_files):
    """One TLS connection in which both sides must show a certificate; the bytes that came through."""
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=server_files.ca)
    serving.load_cert_chain(server_files.certificate, server_files.key)
    serving.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=client_files.ca)
    calling.load_cert_chain(client_files.certificate, client_files.key)

    async def greet(_reader, writer):
        writer.write(b"hello")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0, ssl=serving) as server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=calling, server_hostname="localhost")
        try:
            return await reader.read()
        finally:
            writer.close()


async def test_members_of_one_cluster_understand_each_other(tmp_path):
    assert await connect(ensure_tls(tmp_path, "orchestrator"), ensure_tls(tmp_path, "worker")) == b"hello"


async def test_a_certificate_of_another_cluster_is_refused(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    with pytest.raises(ssl.SSLError):
        await connect(ensure_tls(ours, "orchestrator"), ensure_tls(theirs, "worker"))


def test_services_that_start_at_the_same_moment_make_one_authority(tmp_path):
    script = "import sys; from pathlib import Path; from tether.security.tls import ensure_tls; ensure_tls(Path(sys.argv[1]), sys.argv[2])"
    started = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), role]) for role in ROLES]
    assert [process.wait(30) for process in started] == [0] * len(ROLES)
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    for role in ROLES:
        x509.load_pem_x509_certificate((tmp_path / f"{role}.pem").read_bytes()).verify_directly_issued_by(authority)
