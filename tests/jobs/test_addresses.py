"""URLs that scans may be fetched from and webhooks sent to: the same verdict in the API and in a worker.

What webhooks are not sent to is tried in tests/faults/test_webhooks.py (case 39).
"""

import pytest
from pydantic import ValidationError

from jobs.addresses import (
    CREDENTIALS,
    MALFORMED,
    NO_FETCH_HOSTS,
    NOT_PUBLIC,
    REFUSED,
    fetch_url_error,
    is_fetchable,
    parse_hosts,
    webhook_url_error,
)
from jobs.settings import Settings

HOSTS = parse_hosts("Scans.example, 10.0.0.5:8042,[::1]:9000,")


@pytest.mark.parametrize(
    "url",
    [
        "http://scans.example/a/7.dcm?study=1#x",
        "HTTPS://SCANS.example/7.dcm",
        "https://scans.example:443/7.dcm",
        "http://10.0.0.5:8042/instances/7/file",
        "http://[::1]:9000/7.dcm",
    ],
)
def test_allowed_host_is_accepted(url: str) -> None:
    assert fetch_url_error(url, HOSTS) is None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://other.example/7.dcm", REFUSED),
        ("http://scans.example.other.example/7.dcm", REFUSED),
        ("http://sub.scans.example/7.dcm", REFUSED),
        ("http://scans.example:8080/7.dcm", REFUSED),
        ("https://scans.example:80/7.dcm", REFUSED),
        ("http://10.0.0.5/7.dcm", REFUSED),
        ("http://scans.example%2eother.example/", REFUSED),
        ("http://me:secret@scans.example/7.dcm", CREDENTIALS),
        ("http://scans.example@other.example/7.dcm", CREDENTIALS),
        ("http://scans.example\\@other.example/", MALFORMED),
        ("http://scans.ex\tample/", MALFORMED),
        (" http://scans.example/", MALFORMED),
        ("http://scans.example/a b", MALFORMED),
        ("http://scans.example/é", MALFORMED),
        ("http://scans.example:port/", MALFORMED),
        ("http://scans.example:0/", MALFORMED),
        ("http://[::1/", MALFORMED),
        ("http:///7.dcm", MALFORMED),
        ("ftp://scans.example/7.dcm", MALFORMED),
        ("file:///etc/passwd", MALFORMED),
    ],
)
def test_other_urls_are_refused_without_quoting_them(url: str, why: str) -> None:
    assert fetch_url_error(url, HOSTS) == why


@pytest.mark.parametrize(
    "hosts", ["http://scans.example", "scans.example/path", "me@scans.example", "a:b", "a b", ":80"]
)
def test_malformed_host_list_is_refused_by_the_settings(hosts: str) -> None:
    with pytest.raises(ValidationError, match=r"scans\.example|no host name|[Pp]ort"):
        Settings(fetch_hosts=hosts)


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "fd00:ec2::254", "168.63.129.16", "::"],
)
def test_an_allowed_name_leads_to_no_address_of_the_machines_cloud(address: str) -> None:
    assert not is_fetchable(address)
    assert is_fetchable("10.0.0.5")
    assert is_fetchable("127.0.0.1")


def test_by_default_no_host_is_allowed() -> None:
    assert Settings.model_fields["fetch_hosts"].default == ""
    assert fetch_url_error("http://scans.example/", parse_hosts("")) == NO_FETCH_HOSTS


@pytest.mark.parametrize(
    "url",
    [
        "https://ris.example/hook?token=7",
        "http://8.8.8.8:8080/",
        "https://[2606:4700::1111]/",
        "http://scans.example/",
        "http://10.0.0.5:8042/hook",
        "https://[::1]:9000/hook",
    ],
)
def test_webhooks_go_to_public_and_to_allowed_hosts(url: str) -> None:
    assert webhook_url_error(url, HOSTS) is None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://10.0.0.5/hook", NOT_PUBLIC),
        ("https://[::1]/hook", NOT_PUBLIC),
        ("https://me:secret@scans.example/hook", CREDENTIALS),
        ("ftp://scans.example/hook", MALFORMED),
    ],
)
def test_non_public_or_malformed_webhook_urls_are_refused(url: str, why: str) -> None:
    assert webhook_url_error(url, HOSTS) == why


@pytest.mark.parametrize("waits", ["soon", "5,-1", "5,0", "nan", "inf"])
def test_malformed_webhook_waits_are_refused_by_the_settings(waits: str) -> None:
    with pytest.raises(ValidationError):
        Settings(webhook_retry_seconds=waits)
    assert Settings(webhook_retry_seconds="5, 300").webhook_retries == (5, 300)
