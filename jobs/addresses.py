"""Checks of URLs that files are fetched from and webhooks are sent to, against server-side request forgery (SSRF).

RenalQ runs inside a network that clients cannot reach themselves. So scans and datasets are fetched only from the hosts
in `RENALQ_FETCH_HOSTS`, and webhooks are sent only to the hosts in `RENALQ_WEBHOOK_HOSTS` and to the public internet.
URLs are checked when they are received, and again before use.
"""

import re
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

Host = tuple[str, int | None]
"""A host name and a port; None: the default port of http or https."""

URL_CHARACTERS = re.compile(r"https?://[!-\[\]-~]+", re.IGNORECASE)
"""ASCII without spaces, control characters and backslashes: all parsers agree on the host of such a URL."""
DEFAULT_PORTS = {"http": 80, "https": 443}
MALFORMED = "Must be an http:// or https:// address, with all but ASCII percent-encoded."
CREDENTIALS = "Must not hold a user name or a password."
SEND = "send the file itself (POST /scans, POST /datasets)."
REFUSED = f"Nothing is fetched from this host. Add it to RENALQ_FETCH_HOSTS, or {SEND}"
NO_FETCH_HOSTS = f"Nothing is fetched from addresses here: RENALQ_FETCH_HOSTS names no host. Set it, or {SEND}"
NOT_PUBLIC = "Webhooks are not sent to this host: it is not a public one. Add it to RENALQ_WEBHOOK_HOSTS."
GLOBAL_UNICAST = IPv6Network("2000::/3")
"""Addresses outside include IPv4 addresses in IPv6 notation (mapped, NAT64)."""
EXTRA_NON_PUBLIC_NETWORKS = tuple(map(IPv4Network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24")))
"""Served by the host of a virtual machine or by a relay; some versions of Python count them as public."""
CLOUD_NETWORKS: tuple[IPv4Network | IPv6Network, ...] = (
    *EXTRA_NON_PUBLIC_NETWORKS, IPv4Network("100.100.100.200/32"), IPv6Network("fd00:ec2::/32"),
)  # fmt: skip
"""Where clouds answer a machine that asks for its credentials, beside link-local addresses."""


def parse_hosts(text: str) -> frozenset[Host]:
    """Parse a list such as `pacs.example, 10.0.0.5:8042`.

    Raises:
        ValueError: an entry is not a host name with an optional port.
    """
    return frozenset(_host(entry.strip()) for entry in text.split(",") if entry.strip())


def fetch_url_error(url: str, hosts: frozenset[Host]) -> str | None:
    """Why nothing can be fetched from this URL, or None. The text does not quote the URL: it may contain a name."""
    if not hosts:
        return NO_FETCH_HOSTS
    return malformed_url_error(url) or (None if is_allowed(url, hosts) else REFUSED)


def webhook_url_error(url: str, hosts: frozenset[Host]) -> str | None:
    """Why webhooks cannot be sent to this URL, or None. Host names are resolved only when sending."""
    return malformed_url_error(url) or (None if is_allowed(url, hosts) or not _is_inside(url) else NOT_PUBLIC)


def malformed_url_error(url: str) -> str | None:
    """Why this is not a well-formed http(s) URL, or None."""
    if not URL_CHARACTERS.fullmatch(url):
        return MALFORMED
    try:
        parts = urlsplit(url)
        valid = parts.hostname and parts.port != 0
    except ValueError:
        return MALFORMED
    if not valid:
        return MALFORMED
    return CREDENTIALS if "@" in parts.netloc else None


def is_allowed(url: str, hosts: frozenset[Host]) -> bool:
    """Whether the host of this well-formed URL is in `hosts`."""
    parts = urlsplit(url)
    name, port, default = parts.hostname or "", parts.port, DEFAULT_PORTS[parts.scheme]
    return (name, port or default) in hosts or ((name, None) in hosts and port in (None, default))


def is_public(address: str) -> bool:
    """Whether this IP address is on the public internet: not this machine, its network or its cloud."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and (ip not in GLOBAL_UNICAST or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in EXTRA_NON_PUBLIC_NETWORKS)


def is_fetchable(address: str) -> bool:
    """Whether an allowed host's name may lead to this IP address: not to this link, to many, or to a cloud's own."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return not (ip.is_link_local or ip.is_multicast or ip.is_unspecified or any(ip in one for one in CLOUD_NETWORKS))


def _is_inside(url: str) -> bool:
    """Whether the host is obviously not public: a non-public IP address, or localhost."""
    name = (urlsplit(url).hostname or "").rstrip(".")
    try:
        return not is_public(name)
    except ValueError:
        pass
    try:
        return not is_public(socket.inet_ntoa(socket.inet_aton(name)))  # 127.1 and 0x7f000001, as connect() reads them
    except OSError:
        return name == "localhost" or name.endswith(".localhost")


def _host(entry: str) -> Host:
    parts = urlsplit(f"//{entry}")
    if parts.netloc != entry or "@" in entry or not parts.hostname or not URL_CHARACTERS.fullmatch(f"http://{entry}"):
        raise ValueError(f"{entry!r} is no host name: write pacs.example or pacs.example:8042")
    return parts.hostname, parts.port
