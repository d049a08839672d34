"""A webhook that alerts are sent to, if it is asked for: an address that is checked, one short request, no redirect."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from billhook.core.errors import MissingExtra, UsageError, option
from billhook.core.results.json_form import JsonObject

TIMEOUT_S = 5.0
METADATA = ("100.100.100.200", "fd00:ec2::254")  # of clouds, beside the link-local one
EXAMPLE = option("webhook", "https://example.org/hook")


@dataclass(frozen=True, slots=True)
class Webhook:
    """A checked address. Its path may be a secret, so that only `host` is ever shown."""

    parts: SplitResult

    @property
    def host(self) -> str:
        return str(self.parts.hostname)

    def __repr__(self) -> str:
        return f"Webhook({self.host})"

    @staticmethod
    def parse(url: str) -> Webhook:
        """Return the webhook of an address. Raises UsageError for what must not be called, MissingExtra without httpx.

        Allowed: http and https without user and password, of a host whose addresses are neither link-local nor a
        cloud's metadata; this machine only where the address says so literally.
        """
        try:
            parts = urlsplit(url.strip())
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            whole = False
        if not whole:
            raise UsageError(f"The webhook is no http or https address. Write for example {EXAMPLE}.")
        if parts.username or parts.password:
            raise UsageError(f"The webhook holds a user or a password. Leave them out: {EXAMPLE}.")
        if importlib.util.find_spec("httpx") is None:
            raise MissingExtra("A webhook", "abtest")
        hook = Webhook(parts)
        hook.addresses()
        return hook

    def addresses(self) -> list[str]:
        """Return the addresses of the host, looked up now. Raises UsageError where one must not be called."""
        literal = self.host == "localhost" or _is_loopback(self.host)
        try:
            found = socket.getaddrinfo(self.host, self._port(), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise UsageError(f"The host {self.host} of the webhook is not found ({error}). Correct it.") from error
        addresses = list(dict.fromkeys(str(each[4][0]).partition("%")[0] for each in found))
        for address in addresses:
            if (why := _refused(address, literal)) is not None:
                raise UsageError(f"The host {self.host} of the webhook is {why}, which is not called. Give another.")
        return addresses

    def _port(self) -> int:
        return self.parts.port or {"http": 80, "https": 443}[self.parts.scheme]

    def send(self, payload: JsonObject) -> str:
        """Send one JSON object; returns nothing, or what went wrong. The host is looked up, checked and then called."""
        import httpx

        about: dict[str, Any] = {"headers": {"host": self.parts.netloc}, "extensions": {"sni_hostname": self.host}}
        failure = "its host is not called"
        try:
            with httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
                for address in self.addresses():
                    bare = f"[{address}]" if ":" in address else address
                    place = urlunsplit((self.parts.scheme, f"{bare}:{self._port()}", *self.parts[2:]))
                    try:
                        with client.stream("POST", place, json=payload, **about) as response:
                            code = response.status_code  # what it says is not read: it may never end
                    except httpx.ConnectError as error:
                        failure = type(error).__name__
                        continue
                    return "" if 200 <= code < 300 else f"it answered {code}"
        except UsageError:
            pass
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            failure = type(error).__name__  # whose text may hold the address
        return failure


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refused(address: str, literal: bool) -> str | None:
    """Return why an address must not be called, or None. `literal`: the user wrote this machine's own."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return None if literal else "this machine under another name"
    if ip.is_link_local or str(ip) in METADATA:
        return "a link-local or metadata address"
    return "no address of a host" if ip.is_multicast or ip.is_unspecified or ip.is_reserved else None
