"""TLS on the tcp link, from the settings to the error that says which file is wrong."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
from harness import world

import aiocomm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        shutil.which("openssl") is None, reason="no openssl command: it makes the certificates"
    ),
]


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority `ca` and a `peer` signed by it; and `other`, signed by nobody else."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other"):
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"),
        )
    _openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=peer"),
        *("-keyout", f"{folder}/peer.key", "-out", f"{folder}/peer.csr"),
    )
    _openssl(
        *(
            "x509",
            "-req",
            "-in",
            f"{folder}/peer.csr",
            "-CA",
            f"{folder}/ca.pem",
            "-CAkey",
            f"{folder}/ca.key",
        ),
        *("-CAcreateserial", "-days", "2", "-out", f"{folder}/peer.pem"),
    )
    return folder


def _use(monkeypatch: pytest.MonkeyPatch, cert: Path, key: Path, authority: Path) -> None:
    monkeypatch.setenv("AIOCOMM_TLS_CERT", str(cert))
    monkeypatch.setenv("AIOCOMM_TLS_KEY", str(key))
    monkeypatch.setenv("AIOCOMM_TLS_CA", str(authority))


async def test_messages_of_all_sizes_pass(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, certificates / "peer.pem", certificates / "peer.key", certificates / "ca.pem")
    async with world(2, links=("tcp",), warmup=True) as (a, b):
        for nbytes in (0, 1, 1000, 100_000, 5 << 20):
            sent = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
            posted = b.recv_array(src=0)
            await a.send(sent, 1)
            np.testing.assert_array_equal(await posted, sent)


async def test_a_missing_file_is_named(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = certificates / "missing.pem"
    _use(monkeypatch, missing, certificates / "peer.key", certificates / "ca.pem")
    async with world(2, links=("tcp",)) as (a, _):
        with pytest.raises(aiocomm.PeerLostError, match=r"tls_cert: no certificate .*missing"):
            await a.send(b"secret", 1, synchronous=True)


async def test_a_stranger_is_refused(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its certificate is signed by itself; both ends of this pair are such strangers to each other."""
    _use(monkeypatch, certificates / "other.pem", certificates / "other.key", certificates / "ca.pem")
    async with world(2, links=("tcp",)) as (a, b):
        posted = b.recv_array(src=0)
        with pytest.raises(aiocomm.PeerLostError, match="certificate"):
            await a.send(b"secret", 1, synchronous=True)
        with pytest.raises(aiocomm.PeerLostError):
            await posted
