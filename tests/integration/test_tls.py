"""HTTPS of the local runtime: a client that trusts the certificate is answered, and no other."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from reward_client import RewardClient
from reward_client.errors import ServiceUnreachable
from serving import COMMAND, serving

from service.engines.oracle import oracle_reward_of_text
from service.errors import SettingsError
from service.launch.start_settings import ServerSettings
from service.launch.tls import refuse_tls, tls_options


def certificate(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def test_https_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client scores over HTTPS where it trusts the certificate; plain HTTP gets nothing."""
    chain, key = certificate(tmp_path)
    options = ("--engine", "oracle", "--server.tls_certificate", str(chain), "--server.tls_key", str(key))
    with serving(tmp_path, *options, runtime="local") as server:
        url = server.url.replace("http://", "https://")
        assert "Ready in" in server.messages.read_text()
        assert url in server.messages.read_text()
        with RewardClient(url, wait_for_start_s=1, deadline_s=20) as stranger, pytest.raises(ServiceUnreachable):
            stranger.score(["a "], ["b"])
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
        with RewardClient(url, deadline_s=20) as client:
            assert client.score(["a "], ["b"]) == [oracle_reward_of_text("a ", "b")]
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/livez", timeout=5)


def test_files_that_do_not_fit_end_the_start(tmp_path: Path) -> None:
    """A missing file, a key of another certificate and one without the other are refused in one sentence."""
    chain, key = certificate(tmp_path)
    _, other_key = certificate(tmp_path, "other")
    refused = {
        "belong together": (chain, None),
        "cannot be read (no such file": (chain, tmp_path / "missing"),
        "no certificate with its key (KEY_VALUES_MISMATCH)": (chain, other_key),
        "no certificate with its key (unreadable PEM)": (key, key),
    }
    for sentence, (one, two) in refused.items():
        server = ServerSettings(tls_certificate=str(one), tls_key=None if two is None else str(two))
        with pytest.raises(SettingsError) as raised:
            tls_options(server)
        assert sentence in str(raised.value)
    assert tls_options(ServerSettings()) == {}


def test_with_ray_certificates_are_refused(tmp_path: Path) -> None:
    """HAProxy is configured by Ray, without TLS, so the start says where TLS ends instead of serving plain HTTP."""
    with pytest.raises(SettingsError, match="for --runtime local"):
        refuse_tls(ServerSettings(tls_certificate="a.pem", tls_key="a.key"))
    ended = subprocess.run(
        [*COMMAND, "--engine", "oracle", "--server.tls_certificate", "a.pem", "--server.tls_key", "a.key"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "TLS ends in a proxy in front of the service" in ended.stderr
    assert sys.executable == COMMAND[0]
