"""TLS on the tcp link, from the settings to the error that says which file is wrong."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
from harness import held, until, world

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


@pytest.mark.parametrize(
    ("cert", "key", "authority", "told"),
    [
        ("missing.pem", "peer.key", "ca.pem", r"AIOCOMM_TLS_CERT: no certificate .*/missing\.pem"),
        ("peer.key", "peer.key", "ca.pem", r"AIOCOMM_TLS_CERT: no certificate .*/peer\.key"),
        ("peer.pem", "missing.key", "ca.pem", r"AIOCOMM_TLS_KEY: no usable .*/missing\.key"),
        ("peer.pem", "", "ca.pem", r"AIOCOMM_TLS_KEY: no usable .*/peer\.pem"),
        ("peer.pem", "other.key", "ca.pem", r"AIOCOMM_TLS_KEY: .*/other\.key"),
        ("peer.pem", "peer.key", "missing.pem", r"AIOCOMM_TLS_CA: no authorities .*/missing\.pem"),
    ],
)
async def test_files_that_cannot_be_used_are_named_at_once(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, cert: str, key: str, authority: str, told: str
) -> None:
    """A pair that cannot be made later would look like a peer that is lost."""
    _use(monkeypatch, certificates / cert, certificates / key, certificates / authority)
    if not key:
        monkeypatch.delenv("AIOCOMM_TLS_KEY")
    before = held()
    for links in (None, ("tcp",)):
        with pytest.raises(aiocomm.UsageError, match=told):
            await aiocomm.connect(size=1, links=links)
    await until(lambda: all(now <= before[what] for what, now in held().items()))
    async with world(2, links=("shm",), warmup=True):  # which needs none of them
        pass


async def test_a_stranger_is_refused(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its certificate is signed by itself; both ends of this pair are such strangers to each other."""
    _use(monkeypatch, certificates / "other.pem", certificates / "other.key", certificates / "ca.pem")
    async with world(2, links=("tcp",)) as (a, b):
        posted = b.recv_array(src=0)
        with pytest.raises(aiocomm.PeerLostError, match=r"certificate|unknown ca"):
            await a.send(b"secret", 1, synchronous=True)
        with pytest.raises(aiocomm.PeerLostError):
            await posted
