"""NIXL with its UCX backend between two GPUs: writes with a notification, which the receiver polls for."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from .gpu_driver import Driver
from .sizes import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics


class _End:
    """An agent with two buffers in GPU memory; what is sent goes to the same offset of the other's `into`."""

    def __init__(self, role: int, control: Control, driver: Driver, nbytes: int) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self._driver = driver
        self._other = f"agent{1 - role}"
        self._agent = nixl_agent(
            f"agent{role}", nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        )
        self.data, self.into = driver.allocate(nbytes), driver.allocate(nbytes)
        for memory in (self.data, self.into):
            self._agent.register_memory([(memory.address, nbytes, driver.device, "")], "VRAM")
        metadata, self._remote, self._device = control.swap(
            (self._agent.get_agent_metadata(), self.into.address, driver.device)
        )
        self._agent.add_remote_agent(metadata)
        self._arrived = 0

    def prepare(self, offset: int, nbytes: int) -> Any:
        """A message that can be sent again and again."""
        mine = [(self.data.address + offset, nbytes, self._driver.device)]
        theirs = [(self._remote + offset, nbytes, self._device)]
        return self._agent.initialize_xfer(
            "WRITE",
            self._agent.get_xfer_descs(mine, "VRAM"),
            self._agent.get_xfer_descs(theirs, "VRAM"),
            self._other,
            b"m",
        )

    def start(self, transfer: Any) -> None:
        """Begin to send."""
        self._agent.transfer(transfer)

    def finish(self, transfer: Any) -> None:
        """Poll until it is sent."""
        while (state := self._agent.check_xfer_state(transfer)) != "DONE":
            if state == "ERR":
                raise RuntimeError("nixl: transfer failed")

    def send(self, transfer: Any) -> None:
        """Both."""
        self.start(transfer)
        self.finish(transfer)

    def recv(self, count: int = 1) -> None:
        """Poll until so many messages have come."""
        while self._arrived < count:
            self._arrived += len(self._agent.get_new_notifs().get(self._other, []))
        self._arrived -= count


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure bandwidth one way and both ways, and half round trips, both ends polling."""
    large, repeats = int(arguments["large"]), int(arguments["repeats"])
    end = _End(role, control, Driver(role), large)
    whole, again, small = end.prepare(0, large), end.prepare(0, large), end.prepare(0, 64 * KIB)
    pieces = [end.prepare(at * 16 * MIB, 16 * MIB) for at in range(8)]
    found: Metrics = {}

    def one_way(transfers: list[Any], count: int) -> float:
        for number in range(count + 1):
            if number == 1:
                control.swap("ready")
                start = time.perf_counter()
            if role == 0:
                for transfer in transfers:
                    end.start(transfer)
                for transfer in transfers:
                    end.finish(transfer)
            else:
                end.recv(len(transfers))
        return time.perf_counter() - start

    found["gbytes_s/1GiB"] = large * repeats / one_way([whole, again], repeats // 2) / 1e9
    found["gbytes_s_serial/1GiB"] = large * repeats / one_way([whole], repeats) / 1e9
    found["gbytes_s/16MiB"] = 8 * 16 * MIB * 25 / one_way(pieces, 25) / 1e9
    control.swap("both ways")
    start = time.perf_counter()
    for _ in range(repeats):
        end.send(whole)
        end.recv()
    found["gbytes_s_both/1GiB"] = large * repeats / (time.perf_counter() - start) / 1e9
    halves = []
    for _ in range(600):
        start = time.perf_counter()
        if role == 0:
            end.send(small)
            end.recv()
        else:
            end.recv()
            end.send(small)
        halves.append((time.perf_counter() - start) / 2)
    found["half_us/64KiB"] = statistics.median(halves[100:]) * 1e6
    control.swap("done")
    return found if role == 0 else {}
