"""Addresses that scans may be fetched from: one rule, asked at submit and again by the worker that fetches.

Nothing is allowed that `RENALQ_FETCH_HOSTS` does not name: a worker stands inside the network, and would else fetch
from places that the client itself cannot reach.
"""

import re
from urllib.parse import urlsplit

Host = tuple[str, int | None]
"""A name and a port; without a port, the usual one of http or https."""

PLAIN = re.compile(r"https?://[!-\[\]-~]+", re.IGNORECASE)
"""ASCII without blanks, control characters and backslashes: two parsers of such an address agree on its host."""
USUAL_PORTS = {"http": 80, "https": 443}
MALFORMED = "Must be an http:// or https:// address, with all but ASCII percent-encoded."
CREDENTIALS = "Must not hold a user name or a password."
REFUSED = "Scans are not fetched from this host. Add it to RENALQ_FETCH_HOSTS, or store the scan with POST /scans."


def parse_hosts(text: str) -> frozenset[Host]:
    """The hosts in a list such as `pacs.example, 10.0.0.5:8042`.

    Raises:
        ValueError: an entry is no host name with or without a port.
    """
    return frozenset(_host(entry.strip()) for entry in text.split(",") if entry.strip())


def complaint(url: str, hosts: frozenset[Host]) -> str | None:
    """Why nothing may be fetched from this address, or None. The words repeat nothing of it: it may name a patient."""
    if not PLAIN.fullmatch(url):
        return MALFORMED
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        return MALFORMED
    if not name:
        return MALFORMED
    if "@" in parts.netloc:
        return CREDENTIALS
    usual = USUAL_PORTS[parts.scheme]
    allowed = (name, port or usual) in hosts or ((name, None) in hosts and port in (None, usual))
    return None if allowed else REFUSED


def _host(entry: str) -> Host:
    parts = urlsplit(f"//{entry}")
    if parts.netloc != entry or "@" in entry or not parts.hostname or not PLAIN.fullmatch(f"http://{entry}"):
        raise ValueError(f"{entry!r} is no host name: write pacs.example or pacs.example:8042")
    return parts.hostname, parts.port
