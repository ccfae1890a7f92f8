"""The file of an address, which the worlds that use it one after another write and remove."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from aiocomm._control import client
from aiocomm._control.address import TcpAddress

if TYPE_CHECKING:
    from pathlib import Path


def test_the_file_that_the_next_world_writes_as_the_last_one_removes_its_own_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "address")
    last, following = TcpAddress("127.0.0.1", 1), TcpAddress("127.0.0.1", 2)
    client.write_address_file(path, [last], None)
    read = client.read_address_file

    def read_late(name: str) -> object:
        found = read(name)
        if name == path:
            client.write_address_file(path, [following], None)
        return found

    monkeypatch.setattr(client, "read_address_file", read_late)
    client.remove_address_file(path, last)
    assert read(path) == ((following,), None)
    assert [file.name for file in tmp_path.iterdir()] == ["address"]


def test_a_world_removes_its_own_file(tmp_path: Path) -> None:
    path = str(tmp_path / "address")
    client.write_address_file(path, [TcpAddress("127.0.0.1", 1)], None)
    client.remove_address_file(path, TcpAddress("127.0.0.1", 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_left_at_once_and_costs_no_descriptor(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "address")
    (os.mkdir if kind == "folder" else os.mkfifo)(path, 0o700)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConnectionError, match="address is not a file"):
        client.read_address_file(path)
    assert os.listdir("/proc/self/fd") == before
