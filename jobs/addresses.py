"""Addresses that scans may be fetched from, and that webhooks may be sent to: asked when they come, and again at use.

Our processes stand inside the network, and would else reach for others what these cannot reach themselves. So scans
are fetched from hosts alone that `RENALQ_FETCH_HOSTS` names. Webhooks are sent to those that `RENALQ_WEBHOOK_HOSTS`
names, and to the public internet.
"""

import re
import socket
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

Host = tuple[str, int | None]
"""A name and a port; without a port, the usual one of http or https."""

PLAIN = re.compile(r"https?://[!-\[\]-~]+", re.IGNORECASE)
"""ASCII without blanks, control characters and backslashes: two parsers of such an address agree on its host."""
USUAL_PORTS = {"http": 80, "https": 443}
MALFORMED = "Must be an http:// or https:// address, with all but ASCII percent-encoded."
CREDENTIALS = "Must not hold a user name or a password."
REFUSED = "Scans are not fetched from this host. Add it to RENALQ_FETCH_HOSTS, or store the scan with POST /scans."
NOT_PUBLIC = "Webhooks are not sent to this host: it is not a public one. Add it to RENALQ_WEBHOOK_HOSTS."
GLOBAL_UNICAST = IPv6Network("2000::/3")
"""Outside of it are IPv4 addresses in IPv6 dress (mapped, NAT64), too."""
NEARER_THAN_THEY_LOOK = tuple(map(IPv4Network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24")))
"""Answered by the host that a virtual machine runs on, or by a relay; not each Python knows them for no public ones."""


def parse_hosts(text: str) -> frozenset[Host]:
    """The hosts in a list such as `pacs.example, 10.0.0.5:8042`.

    Raises:
        ValueError: an entry is no host name with or without a port.
    """
    return frozenset(_host(entry.strip()) for entry in text.split(",") if entry.strip())


def complaint(url: str, hosts: frozenset[Host]) -> str | None:
    """Why nothing may be fetched from this address, or None. The words repeat nothing of it: it may name a patient."""
    return ill_formed(url) or (None if is_named(url, hosts) else REFUSED)


def webhook_complaint(url: str, hosts: frozenset[Host]) -> str | None:
    """Why nothing may be sent to this address, or None. A name is not looked up: where it leads is seen at sending."""
    return ill_formed(url) or (None if is_named(url, hosts) or not _is_inside(url) else NOT_PUBLIC)


def ill_formed(url: str) -> str | None:
    """Why this is no address that two parsers read alike, or None."""
    if not PLAIN.fullmatch(url):
        return MALFORMED
    try:
        parts = urlsplit(url)
        named = parts.hostname and parts.port != 0
    except ValueError:
        return MALFORMED
    if not named:
        return MALFORMED
    return CREDENTIALS if "@" in parts.netloc else None


def is_named(url: str, hosts: frozenset[Host]) -> bool:
    """Whether the hosts name that of this well-formed address."""
    parts = urlsplit(url)
    name, port, usual = parts.hostname or "", parts.port, USUAL_PORTS[parts.scheme]
    return (name, port or usual) in hosts or ((name, None) in hosts and port in (None, usual))


def is_public(address: str) -> bool:
    """Whether this numeric address leads to the public internet: not to this machine, its network or its cloud."""
    found = ip_address(address)
    if isinstance(found, IPv6Address) and (found not in GLOBAL_UNICAST or found.sixtofour or found.teredo):
        return False
    return found.is_global and not found.is_multicast and not any(found in near for near in NEARER_THAN_THEY_LOOK)


def _is_inside(url: str) -> bool:
    """Whether the host is plainly no public one: a number that is none, or this machine by its name."""
    name = (urlsplit(url).hostname or "").rstrip(".")
    try:
        return not is_public(name)
    except ValueError:
        pass
    try:
        return not is_public(socket.inet_ntoa(socket.inet_aton(name)))  # 127.1, 0x7f000001: so a connection reads it
    except OSError:
        return name == "localhost" or name.endswith(".localhost")


def _host(entry: str) -> Host:
    parts = urlsplit(f"//{entry}")
    if parts.netloc != entry or "@" in entry or not parts.hostname or not PLAIN.fullmatch(f"http://{entry}"):
        raise ValueError(f"{entry!r} is no host name: write pacs.example or pacs.example:8042")
    return parts.hostname, parts.port
