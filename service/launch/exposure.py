"""Whether a service may listen on an address: without API keys only this machine is served, unless it is so said."""

from __future__ import annotations

import ipaddress

from service.api_keys import ApiKeys, read_answer_key, read_api_keys
from service.errors import SettingsError
from service.settings import SecuritySettings


def keys_for(security: SecuritySettings, host: str | None = None) -> ApiKeys | None:
    """Return the API keys of a service; None where it needs none.

    Args:
        security: the settings.
        host: the address on which it listens; None: not known, as where Ray's own commands start it.

    Raises:
        SettingsError: the file of keys, or of the secret of answers, is invalid, or there is none where one is needed.
    """
    read_answer_key(security.answer_key)  # a bad one ends the start, and not the first request
    if security.api_keys is not None:
        if security.authentication == "none":
            raise SettingsError("security.authentication is none, but security.api_keys names a file: leave one out.")
        return read_api_keys(security.api_keys)
    if security.authentication == "required":
        raise SettingsError("security.authentication is required, but security.api_keys names no file of keys.")
    if security.authentication == "auto" and host is not None and not is_loopback(host):
        raise SettingsError(
            f"server.host is {host}, where other machines reach the service, but there are no API keys: make one with "
            "reward-key and name its file with --api-keys, or let everybody in with --authentication none."
        )
    return None


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address; a name other than localhost is taken for reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
