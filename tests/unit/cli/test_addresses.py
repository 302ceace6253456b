"""Where `up` may listen, and what each refusal says."""

from __future__ import annotations

import socket

import pytest

from homefire.cli.addresses import check_exposure, check_url, is_loopback, listen, url_of
from homefire.cli.supervisor import restart_delay_s
from homefire.cli.up import parse_aliases
from homefire.wire.errors import InvalidArgument, PortInUse


def test_a_port_in_use_is_named_with_the_option_that_helps():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse) as caught:
            listen("127.0.0.1", port)
    assert str(port) in caught.value.message
    assert "--port" in caught.value.hint


def test_port_0_takes_a_free_port():
    with listen("127.0.0.1", 0) as first, listen("127.0.0.1", 0) as second:
        assert 0 < first.getsockname()[1] != second.getsockname()[1] > 0


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", -1), ("127.0.0.1", 65536), ("203.0.113.7", 0)]
)
def test_an_address_that_cannot_be_is_an_error_of_the_option(host, port):
    with pytest.raises(InvalidArgument):
        listen(host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.5.5.5"])
def test_loopback_needs_no_options(host):
    assert is_loopback(host)
    check_exposure(host, secure=False, insecure_http=False, advertise_url=None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "trainer.example"])
def test_off_loopback_wants_tls_or_a_word_and_an_url(host):
    with pytest.raises(InvalidArgument, match="--insecure-http"):
        check_exposure(host, secure=False, insecure_http=False, advertise_url="https://a")
    with pytest.raises(InvalidArgument, match="--advertise-url"):
        check_exposure(host, secure=True, insecure_http=False, advertise_url=None)
    check_exposure(host, secure=True, insecure_http=False, advertise_url="https://a")
    check_exposure(host, secure=False, insecure_http=True, advertise_url="http://a")


@pytest.mark.parametrize("url", ["trainer.example", "ftp://trainer.example", "https://"])
def test_an_advertised_url_must_be_one(url):
    with pytest.raises(InvalidArgument, match="advertise-url"):
        check_url(url)


def test_ipv6_hosts_are_bracketed_in_urls():
    assert url_of("http", "::1", 8700) == "http://[::1]:8700"
    assert url_of("https", "127.0.0.1", 1) == "https://127.0.0.1:1"


def test_aliases_split_at_the_first_equals_sign():
    assert parse_aliases(["a/b=tiny", "c=/models/x=y"]) == {"a/b": "tiny", "c": "/models/x=y"}


@pytest.mark.parametrize("text", ["tiny", "=tiny", "a="])
def test_an_alias_of_another_form_is_refused_with_an_example(text):
    with pytest.raises(InvalidArgument, match="RESOURCE=MODEL"):
        parse_aliases([text])


def test_a_service_that_keeps_dying_is_started_ever_more_slowly():
    delays = [restart_delay_s(failures) for failures in range(1, 12)]
    assert delays == sorted(delays)
    assert (delays[0], delays[-1]) == (0.1, 10.0)
