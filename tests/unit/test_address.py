"""Addresses as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiocomm._control.address import EnvAddress, FileAddress, TcpAddress, UnixAddress, parse
from aiocomm.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://10.0.0.1:7000", TcpAddress("10.0.0.1", 7000)),
        ("tcp://node-3.cluster:0", TcpAddress("node-3.cluster", 0)),
        ("tcp://[::1]:7000", TcpAddress("::1", 7000)),
        ("tcp://[fe80::1%eth0]:7000", TcpAddress("fe80::1%eth0", 7000)),
        ("tcp://*:65535", TcpAddress("", 65535)),
        ("unix:///run/world", UnixAddress("/run/world")),
        ("unix://relative", UnixAddress("relative")),
        ("unix:///not/utf-8/\udcff", UnixAddress("/not/utf-8/\udcff")),
        ("unix://@abstract", UnixAddress("@abstract")),
        ("file:///shared/address", FileAddress("/shared/address")),
        ("env://", EnvAddress()),
    ],
)
def test_parses_and_writes_back(text: str, address: object) -> None:
    assert parse(text) == address
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no address"),
        ("10.0.0.1:7000", "no address"),
        ("http://host:1", "unknown kind"),
        ("tcp://host", "lacks a port"),
        ("tcp://:7000", "lacks a host"),
        ("tcp://host:", "not a port"),
        ("tcp://host:65536", "not a port"),
        ("tcp://host:-1", "not a port"),
        ("tcp://host:\uff17", "not a port"),
        ("tcp://::1:7000", "brackets"),
        ("tcp://[::1]", "lacks a port"),
        ("tcp://[host]:1", "not an IPv6"),
        ("tcp://user@host:1", "not a host"),
        ("tcp://a b:1", "not a host"),
        ("tcp://a..b:1", "not a host"),
        ("tcp://" + "a" * 64 + ".example:1", "not a host"),
        ("tcp://h\udc80:1", "not a host"),
        ("unix://", "lacks a path"),
        ("unix://@", "lacks a path"),
        ("unix://@" + "x" * 107, "longer"),
        ("unix:///a\0b", "zero byte"),
        ("file://relative", "absolute"),
        ("env://X", "nothing may follow"),
    ],
)
def test_refuses(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse(text)


@given(st.text(max_size=40), st.sampled_from(["", "tcp://", "unix://", "file://", "env://", "tcp://["]))
def test_any_text_is_an_address_or_a_usage_error(rest: str, scheme: str) -> None:
    try:
        address = parse(scheme + rest)
    except UsageError:
        return
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    ("told", "host"),
    [
        ("fe80::1", "fe80::1%eth0"),
        ("fe80::1%ib0", "fe80::1%eth0"),  # the name that another host has for it
        ("fd00::1", "fd00::1"),
        ("169.254.0.1", "169.254.0.1"),
        ("gpu1", "gpu1"),
    ],
)
def test_an_address_of_a_link_is_on_an_interface(told: str, host: str) -> None:
    assert TcpAddress(told, 1).on("eth0") == TcpAddress(host, 1)
    assert TcpAddress(told, 1).on("") == TcpAddress(told, 1)


def test_the_abstract_name_starts_with_a_zero_byte() -> None:
    assert UnixAddress("@name").sockaddr == "\0name"
    assert UnixAddress("/path").sockaddr == "/path"
    assert not UnixAddress("/path").is_abstract


def test_kinds_of_hosts() -> None:
    assert TcpAddress("", 1).is_wildcard
    assert TcpAddress("::", 1).is_wildcard
    assert not TcpAddress("::1", 1).is_wildcard
    assert TcpAddress("fe80::1%eth0", 1).is_literal
    assert not TcpAddress("node", 1).is_literal
