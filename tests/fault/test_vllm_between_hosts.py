"""Workers of vLLM engines on two hosts hand KV blocks over, also when one of these is lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fault.hosts import Hosts, hosts

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

ADDRESS = "tcp://gpu2:7000"
ENGINE = """
import asyncio, logging, sys
tests, address, name, *options = sys.argv[1:]
sys.path.insert(0, tests)
import numpy as np
from kv_engines import Engine, fetch, hand_over, whole
from aiocomm.vllm.steps import Origin

async def decode(engine):
    prefill = Origin("prefill", 2, "p")
    engine.begin(claim=[prefill], fetch=fetch("d", prefill, [3, 1, 10], [0, 7, 5]))
    assert await engine.has_received("d")
    np.testing.assert_array_equal(engine.blocks([0, 7, 5]), whole(1)[:, [6, 7, 2, 3, 20, 21]])
    links = engine.workers[0]._exchange._words._comm.statistics().links
    print("received by", *(name for name in links if links[name].bytes_received), flush=True)
    engine.begin(fetch=fetch("e", Origin("prefill", 2, "never"), [3], [0]))  # it waits there
    print("asked", flush=True)
    assert not await engine.has_received("e")
    print("lost", flush=True)

logging.basicConfig()
engine = Engine(address, name, 1 if name == "prefill" else 2, ranks=2 if name == "prefill" else 1)
engine.join()
print("joined", flush=True)
if name == "prefill":
    engine.begin(keep={"p": (3, 1, 10)})
    asyncio.run(engine.has_sent("p"))
    print("sent", flush=True)
    sys.stdin.read()
else:
    asyncio.run(decode(engine))
engine.close()
"""


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Hosts]:
    with hosts(3, tmp_path) as made:
        yield made


def expect(process: subprocess.Popen[str], *lines: str) -> None:
    assert process.stdout is not None
    assert [process.stdout.readline().split("/")[0].strip() for _ in lines] == list(lines)


@pytest.mark.parametrize("lost", ["killed", "cut off"])
def test_blocks_go_over_between_hosts(three: Hosts, lost: str) -> None:
    """The rendezvous is on a third host."""
    processes = [three.start(2, "-m", "aiocomm", "rendezvous", "--listen", "tcp://0.0.0.0:7000")]
    try:
        expect(processes[0], "listening at tcp:")
        for host, name in enumerate(("prefill", "decode")):
            arguments = ("-c", ENGINE, str(Path(__file__).parents[1]), ADDRESS, name)
            env = {"AIOCOMM_HEARTBEAT_S": "2"} if lost == "cut off" else {}
            processes.append(three.start(host, *arguments, **env))
            expect(processes[-1], "joined")
        _, prefill, decode = processes
        expect(decode, "received by tcp", "asked")
        expect(prefill, "sent")
        if lost == "killed":
            prefill.kill()
        else:
            three.ip(0, "link", "set", "eth0", "down")
        expect(decode, "lost")
        assert decode.wait(60) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
