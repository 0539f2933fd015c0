"""TLS of the local runtime, from a certificate and its key in files."""

from __future__ import annotations

import ssl
from typing import Any

from service.errors import SettingsError
from service.launch.start_settings import ServerSettings


def has_tls(server: ServerSettings) -> bool:
    """Whether the server speaks HTTPS."""
    return server.tls_certificate is not None or server.tls_key is not None


def tls_options(server: ServerSettings) -> dict[str, Any]:
    """Return what uvicorn gets for HTTPS; nothing for plain HTTP.

    Raises:
        SettingsError: one of the two files is not named, cannot be read, or the key is of another certificate.
    """
    if not has_tls(server):
        return {}
    if server.tls_certificate is None or server.tls_key is None:
        raise SettingsError("server.tls_certificate and server.tls_key belong together: set both.")
    files = (server.tls_certificate, server.tls_key)
    try:
        # An encrypted key would ask the terminal for its password.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files, password=_no_password)
    except ssl.SSLError as error:
        raise SettingsError(
            "server.tls_certificate and server.tls_key are no certificate with its key "
            f"({error.reason or 'unreadable PEM'}): give PEM files, the key without a password."
        ) from None
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise SettingsError(f"server.tls_certificate or server.tls_key cannot be read ({reason}).") from None
    return {"ssl_certfile": files[0], "ssl_keyfile": files[1]}


def refuse_tls(server: ServerSettings) -> None:
    """Refuse certificates where HAProxy serves HTTP, which Ray configures without TLS.

    Raises:
        SettingsError: one is set.
    """
    if has_tls(server):
        raise SettingsError(
            "server.tls_certificate is for --runtime local: with Ray TLS ends in a proxy in front of the service; "
            "docs/security.md shows one."
        )


def _no_password() -> str:
    return ""
