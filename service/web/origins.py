"""Whether a request comes of somebody else's page, where no key tells who is asking.

A browser sends what any page tells it to wherever its owner can reach, a service on loopback too. So without keys a
page of another origin changes nothing, unless CORS_ORIGINS names it; and what arrives on loopback under a public name
is answered nothing at all: a page whose name was made to point there (DNS rebinding) would be of that origin. (See
https://owasp.org/www-community/attacks/csrf and https://www.w3.org/TR/fetch-metadata/.) A client that is no browser
sends none of this. Knows nothing of keys.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache

SAFE = {"GET", "HEAD", "OPTIONS"}
ANY = "*"
OWN = {"same-origin", "none"}  # none: the user typed the address
PRIVATE = (".localhost", ".local", ".internal", ".test", ".home.arpa")  # nobody can have registered a name under these
LONGEST = 64  # no address is as long, and of what strangers send only so much is kept
PORTS = {"http": ":80", "https": ":443"}


def of(listed: str) -> frozenset[str]:
    """The origins of a setting such as "https://app.example, https://other.example"."""
    return frozenset(filter(None, (origin.strip().rstrip("/").lower() for origin in listed.split(","))))


def refusal(method: str, headers: Mapping[bytes, bytes], at: str, allowed: frozenset[str]) -> str:
    """Why a request without a key is not answered; empty where it is. `at`: the address at which it arrived."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if (
        ANY not in allowed
        and _is_loopback(at)
        and _is_public(host, {_name(origin.partition("://")[2]) for origin in allowed})
    ):
        return (
            f"Without keys this service answers on loopback as localhost or by an address, and not as {host[:100]!r}. "
            "Name the origin in CORS_ORIGINS, or make keys."
        )
    origin = headers.get(b"origin", b"").decode("latin-1").lower()
    if method in SAFE or not origin or {ANY, origin} & allowed:
        return ""
    site = headers.get(b"sec-fetch-site", b"").decode("latin-1")
    if site in OWN or (not site and _same(origin, host)):
        return ""
    return f"Without keys a page of {origin[:100]!r} changes nothing here. Name it in CORS_ORIGINS, or make keys."


def _same(origin: str, host: str) -> bool:
    scheme, _, address = origin.partition("://")
    port = PORTS.get(scheme, ":")
    host, address = host.removesuffix(port), address.removesuffix(port)
    # A proxy may pass the name on without its port; a browser that asks for another than the usual one sends it.
    return bool(host) and (host == address or host == address.rpartition(":")[0])


@lru_cache(16)
def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """Without its port; of an address in brackets only the bracket."""
    return host.partition(":")[0].rstrip(".")


def _is_public(host: str, known: set[str]) -> bool:
    """Whether a host has a name that anybody may have registered: one with a dot, that is no address."""
    name = _name(host)
    return "." in name and not name.endswith(PRIVATE) and name not in known and not _is_address(name[:LONGEST])


@lru_cache(256)
def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
