"""Bad input to the public calls: each is refused with a clear error, at once, and nothing is lost by it.

What makes a call bad by the peer's doing (truncation, stale handles) is in tests/links.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import struct
import threading
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
import trio
import uvloop
from harness import all_call, world

import aiocomm
from aiocomm.errors import ClosedError, LinkError, StaleHandleError, UsageError, UsageTypeError
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Pair

pytestmark = pytest.mark.anyio  # of its coroutines

READ_ONLY = np.zeros(8, np.uint8)
READ_ONLY.flags.writeable = False
STRIDED = np.zeros((8, 8), np.uint8)[:, ::2]


class OnADevice:
    """What CuPy and torch arrays look like from outside, without a driver to reach them by."""

    __cuda_array_interface__ = {  # noqa: RUF012 -- an instance's in those libraries
        "shape": (1,),
        "typestr": "<f4",
        "data": (1, False),
        "version": 3,
    }


CONNECTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an address that is a number": ({"address": 123}, UsageTypeError, "address= takes a string, not int"),
    "a rank in words": ({"rank": "0", "size": 1}, UsageTypeError, "rank='0' is not an integer"),
    "a size in words": ({"rank": 0, "size": "1"}, UsageTypeError, "size='1' is not an integer"),
    "a world without end": (
        {"rank": 0, "size": 2**64},
        UsageError,
        "is too large: it may have 1048576 members",
    ),
    "a token that is a number": ({"token": 123}, UsageTypeError, "token= takes a string, not int"),
    "a name that is a number": ({"name": 5}, UsageTypeError, "name= takes a string, not int"),
    "a token that is no text": ({"token": "\udc80"}, UsageError, "the token is not text .AIOCOMM_TOKEN"),
    "a name that is no text": ({"name": "\udc80"}, UsageError, "the name is not text .AIOCOMM_NAME"),
    "a name without end": ({"name": "x" * 257}, UsageError, "a name of 257 characters .* may have 256"),
    "a host that nobody has": ({"address": "tcp://a..b:1", "token": "x"}, UsageError, "'a..b' .* not a host"),
    "a deadline that is past": ({"deadline": -1}, UsageError, "deadline=-1: seconds that joining may take"),
    "no time": ({"deadline": 0}, UsageError, "deadline=0: .* more than 0"),
    "a deadline in words": ({"deadline": "soon"}, UsageError, "deadline='soon'"),
    "an unknown link": ({"links": "pigeon"}, UsageError, "unknown link 'pigeon': this build has"),
    "a link that is a number": ({"links": 5}, UsageTypeError, "links=5: names of links"),
    "links that are numbers": ({"links": [5]}, UsageTypeError, r"links=\[5\]: names of links"),
    "no links": ({"links": ()}, UsageError, "links names none: leave it out"),
}


@pytest.mark.parametrize(
    ("options", "error", "match"), [pytest.param(*case, id=name) for name, case in CONNECTS.items()]
)
async def test_connect_refuses(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        await aiocomm.connect(**options)
    if set(options) <= {"links", "deadline"}:
        with pytest.raises(error, match=match):
            async with aiocomm.spawn(print, 1, **options):
                pass


async def test_a_link_that_this_build_left_out_is_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "available_links", lambda: ["self", "shm", "tcp"])
    told = r"no link 'rdma', only shm, tcp: .*infiniband/verbs\.h.*libibverbs-dev.* build again"
    with pytest.raises(UsageError, match=told):
        await aiocomm.connect(links=("shm", "rdma"))
    monkeypatch.setenv("AIOCOMM_LINKS", "rdma,tcp")
    with pytest.raises(UsageError, match=told):
        await aiocomm.connect(size=1)


async def test_a_link_may_be_named_alone() -> None:
    async with world(2, links="shm", warmup=True) as (a, _):
        assert set(a.links) == {"shm", "self"}


async def test_a_deadline_may_be_as_far_off_as_one_likes(pair: Pair) -> None:
    far = 10**400

    async def call(comm: aiocomm.Communicator) -> None:
        for _ in range(3):
            await comm.barrier(deadline=far)
        x = np.ones(4, np.float32)
        for _ in range(3):
            await comm.all_reduce(x, deadline=far)
        await (await comm.shrink(deadline=far)).barrier()

    await all_call([*pair], call)
    async with aiocomm.connect(size=1, deadline=far) as comm:
        sent = comm.send(b"x", 0, deadline=far)
        await comm.recv(bytearray(1), 0, deadline=far)
        await sent


async def _goes_on(pair: Pair) -> None:
    """The pair works after the refusal, and no message of a refused call is under way."""
    a, b = pair
    out = bytearray(5)
    posted = b.recv(out, aiocomm.ANY_SOURCE, tag=aiocomm.ANY_TAG)
    await a.send(b"hello", 1, tag=9)
    status = await posted
    assert (status.tag, bytes(out)) == (9, b"hello")


SENDS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a rank that is none": (
        lambda c: c.send(b"x", 2),
        UsageError,
        "no rank 2 in this world: ranks are 0 to 1",
    ),
    "a negative rank": (lambda c: c.send(b"x", -1), UsageError, "no rank -1"),
    "any rank": (
        lambda c: c.send(b"x", aiocomm.ANY_SOURCE),
        UsageError,
        "ANY_SOURCE is for receiving only: pass the receiver's",
    ),
    "any tag": (
        lambda c: c.send(b"x", 1, tag=aiocomm.ANY_TAG),
        UsageError,
        "ANY_TAG is for receiving only: pass one tag",
    ),
    "a rank that is no number": (
        lambda c: c.send(b"x", "1"),
        UsageTypeError,
        "rank='1' is not an integer",
    ),
    "a broken rank": (lambda c: c.send(b"x", 1.0), UsageTypeError, "dst=1.0 is not an integer"),
    "no rank": (lambda c: c.send(b"x", None), UsageTypeError, "rank=None is not an integer"),
    "a rank beyond 64 bits": (lambda c: c.send(b"x", 10**30), UsageError, "no rank 10{30} in this world"),
    "a negative tag": (lambda c: c.send(b"x", 1, tag=-1), UsageError, "tag -1 is outside 0 to MAX_TAG"),
    "a huge tag": (lambda c: c.send(b"x", 1, tag=aiocomm.MAX_TAG + 1), UsageError, "outside 0 to MAX_TAG"),
    "a tag beyond 64 bits": (lambda c: c.send(b"x", 1, tag=10**30), UsageError, "outside 0 to MAX_TAG"),
    "a tag in words": (lambda c: c.send(b"x", 1, tag="a"), UsageTypeError, "tag='a' is not an integer"),
    "a broken tag": (lambda c: c.send(b"x", 1, tag=1.5), UsageTypeError, "tag=1.5 is not an integer"),
    "a channel's name": (lambda c: c.send(b"x", 1, channel="q"), UsageTypeError, r"comm\.channel\(name\)"),
    "a list": (
        lambda c: c.send([1, 2], 1),
        UsageTypeError,
        "list is not an array: pass bytes, a NumPy array",
    ),
    "nothing": (lambda c: c.send(None, 1), UsageTypeError, "NoneType is not an array"),
    "Python objects": (lambda c: c.send(np.array([{}]), 1), UsageTypeError, r"pickle\.dumps"),
    "a strided array": (lambda c: c.send(STRIDED, 1), UsageError, "ascontiguousarray"),
    "a transposed array": (lambda c: c.send(np.zeros((2, 3)).T, 1), UsageError, "not contiguous in C order"),
    "a deadline that is past": (lambda c: c.send(b"x", 1, deadline=-1), UsageError, "0 or more"),
    "a deadline that is no number": (
        lambda c: c.send(b"x", 1, deadline=float("nan")),
        UsageError,
        "deadline",
    ),
    "a deadline in words": (lambda c: c.send(b"x", 1, deadline="soon"), UsageError, "deadline='soon'"),
}

RECEIVES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a rank that is none": (lambda c: c.recv(bytearray(1), 7), UsageError, "or ANY_SOURCE"),
    "a wildcard's neighbour": (lambda c: c.recv(bytearray(1), -2), UsageError, "no rank -2"),
    "a tag below the wildcard": (lambda c: c.recv(bytearray(1), 0, tag=-2), UsageError, "ANY_TAG"),
    "bytes": (lambda c: c.recv(b"12345678", 0), UsageError, "read-only: receive into a writable array"),
    "a read-only array": (lambda c: c.recv(READ_ONLY, 0), UsageError, "read-only"),
    "a strided array": (lambda c: c.recv(STRIDED, 0), UsageError, "contiguous buffer to receive into"),
    "Python objects": (lambda c: c.recv(np.array([{}]), 0), UsageTypeError, "Python objects"),
    "a rank that is no number": (
        lambda c: c.recv(bytearray(1), "0"),
        UsageTypeError,
        "rank='0' is not an integer",
    ),
    "a tag in words": (
        lambda c: c.recv(bytearray(1), 0, tag="a"),
        UsageTypeError,
        "tag='a' is not an integer",
    ),
    "a channel's name": (
        lambda c: c.recv(bytearray(1), 0, channel="q"),
        UsageTypeError,
        "channel='q' is no channel",
    ),
    "no buffer": (lambda c: c.recv(None, 0), UsageTypeError, "recv_array allocates one"),
    "recv_array with a tag in words": (
        lambda c: c.recv_array(0, tag="a"),
        UsageTypeError,
        "tag='a' is not an integer",
    ),
    "recv_array with a channel's name": (
        lambda c: c.recv_array(0, channel="q"),
        UsageTypeError,
        "channel='q' is no channel",
    ),
    "recv_array of a rank that is none": (lambda c: c.recv_array(src=5), UsageError, "no rank 5"),
    "recv_array on a GPU that is named": (
        lambda c: c.recv_array(src=0, device="cuda:0"),
        UsageTypeError,
        "device='cuda:0' is not the index of a GPU: pass an integer",
    ),
    "recv_array on a GPU beyond 64 bits": (
        lambda c: c.recv_array(src=0, device=1 << 70),
        UsageError,
        "not the index of a GPU",
    ),
    "recv_array with a bad tag": (lambda c: c.recv_array(src=0, tag=-5), UsageError, "tag -5"),
}

OTHERS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a channel without a name": (lambda c: c.channel(""), UsageError, "needs a name"),
    "a channel that is named by a number": (lambda c: c.channel(5), UsageError, "needs a name, not 5"),
    "a channel of no weight": (lambda c: c.channel("w", weight=0.0), UsageError, "weight 0.0 is outside"),
    "a channel of infinite weight": (lambda c: c.channel("w", weight=float("inf")), UsageError, "weight inf"),
    "a weight in words": (lambda c: c.channel("w", weight="much"), UsageError, "weight 'much' is outside"),
    "a priority that is none": (
        lambda c: c.channel("p", priority=17),
        UsageError,
        "priority=17 is none of Priority's LOW, NORMAL, HIGH, URGENT",
    ),
    "a read-only region to be written": (
        lambda c: c.register(READ_ONLY, writable=True),
        UsageError,
        "writable=False",
    ),
    "a strided region": (lambda c: c.register(STRIDED), UsageError, "not contiguous"),
    "a handle that is none": (lambda c: c.remote(b"handle"), UsageError, r"region\.handle"),
    "no handle": (lambda c: c.remote(None), UsageTypeError, "NoneType is no handle"),
    "a handle in words": (lambda c: c.remote("handle"), UsageTypeError, "str is no handle"),
    "a handle of pages in words": (lambda c: c.remote_pages("handle"), UsageTypeError, "str is no handle"),
    "half a byte of a region": (
        lambda c: c.remote(c.register(bytearray(8)).handle)[0:0.5],
        UsageTypeError,
        "stop=0.5 is not an integer",
    ),
    "a byte of a region in words": (
        lambda c: c.remote(c.register(bytearray(8)).handle)["a":],
        UsageTypeError,
        "start='a' is not an integer",
    ),
    "an array of ranks": (lambda c: c.send(b"x", np.array([1])), UsageTypeError, "is not an integer"),
    "a put to no region": (lambda c: c.put(b"x", b"handle"), UsageTypeError, "RemoteRegion"),
    "a get from no region": (lambda c: c.get(None, bytearray(1)), UsageTypeError, "RemoteRegion"),
    "a put on a channel's name": (
        lambda c: c.put(b"x", c.remote(c.register(bytearray(1)).handle), channel="q"),
        UsageTypeError,
        "channel='q' is no channel",
    ),
    "half a dimension": (lambda c: aiocomm.empty(1.5), UsageTypeError, "shape=1.5: pass an integer"),
    "half a dimension more": (lambda c: aiocomm.empty((2, 1.5)), UsageTypeError, "pass an integer, or"),
    "no shape": (lambda c: aiocomm.empty(None), UsageTypeError, "shape=None: pass an integer"),
    "a shape in words": (lambda c: aiocomm.empty("4"), UsageTypeError, "shape='4': pass an integer"),
    "a negative dimension": (lambda c: aiocomm.empty((2, -1)), UsageError, "negative dimension"),
    "bytes that cannot be counted": (lambda c: aiocomm.empty(2**62), LinkError, "no process has as many"),
    "nearly 2^64 bytes": (lambda c: aiocomm.empty(2**64 - 1, "u1"), LinkError, "no process has as many"),
    "an unknown link": (lambda c: c.links["carrier pigeon"], KeyError, "carrier pigeon"),
}

CASES = [
    pytest.param(call, error, match, id=f"{kind}: {name}")
    for kind, cases in (("send", SENDS), ("recv", RECEIVES), ("other", OTHERS))
    for name, (call, error, match) in cases.items()
]


@pytest.mark.parametrize(("call", "error", "match"), CASES)
async def test_it_is_refused(
    call: Callable[[Any], Any], error: type[Exception], match: str, pair: Pair
) -> None:
    a, _ = pair
    with pytest.raises(error, match=match):
        call(a)
    await _goes_on(pair)


@pytest.mark.parametrize("named", [{}, {"stream": 1}])
async def test_an_array_on_a_device_without_a_driver_is_refused(pair: Pair, named: dict[str, int]) -> None:
    drives = pair[0]._engine.has_mover()  # real or simulated, the driver does not know it
    wrong = "is not device memory" if drives else "OnADevice lies on a device that cannot be used here"
    for call in (pair[0].send, pair[0].recv):
        with pytest.raises(aiocomm.UsageError, match=wrong):
            await call(OnADevice(), 1, **named)
    await _goes_on(pair)


async def test_two_receives_into_one_buffer_are_refused(pair: Pair) -> None:
    a, b = pair
    buffer = np.zeros(64, np.uint8)
    first = b.recv(buffer, 0, tag=1)
    for overlapping in (buffer, buffer[10:20], buffer[63:]):
        with pytest.raises(UsageError, match="another receive or get that has not ended"):
            b.recv(overlapping, 0, tag=2)
    region = a.register(bytes(8))
    remote = b.remote(region.handle)
    with pytest.raises(UsageError, match="another receive or get"):
        b.get(remote, buffer)
    first.cancel()
    again = b.recv(buffer, 0, tag=2)  # it has ended: the buffer is free
    await a.send(b"x" * 64, 1, tag=2)
    await again
    assert buffer.tobytes() == b"x" * 64
    await region.aclose()


async def test_zero_bytes_are_a_message(pair: Pair) -> None:
    a, b = pair
    await a.send(b"", 1, tag=3)
    status = await b.recv(bytearray(0), 0, tag=3)
    assert status.nbytes == 0
    await a.send(np.zeros((0, 5), np.float32), 1, tag=3)
    array = await b.recv_array(src=0, tag=3)
    assert (array.shape, array.dtype) == ((0, 5), np.float32)


async def test_another_dtype_is_the_receivers_business(pair: Pair) -> None:
    """As in MPI's byte view: what is received are bytes; `recv_array` keeps dtype and shape."""
    a, b = pair
    sent = np.arange(6, dtype=np.float32).reshape(2, 3)
    out = np.zeros(3, np.float64)
    posted = b.recv(out, 0)
    await a.send(sent, 1)
    assert (await posted).nbytes == 24
    assert out.tobytes() == sent.tobytes()


async def test_limits_of_one_sided_calls(pair: Pair) -> None:
    a, b = pair
    memory = bytearray(16)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        with pytest.raises(UsageError, match="17 bytes do not fit into a remote region of 16"):
            a.put(bytes(17), remote)
        with pytest.raises(UsageError, match="narrow it"):
            a.get(remote, bytearray(15))
        with pytest.raises(UsageError, match="4,096"):
            a.put(bytes(1), remote, notify=bytes(4097))
        with pytest.raises(UsageTypeError, match="notify takes bytes, not str"):
            a.put(bytes(1), remote, notify="request 17")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="outside the remote region"):
            remote[4:17]
        with pytest.raises(UsageError, match="slice of bytes"):
            remote[::2]
        async with b.register(READ_ONLY) as fixed:
            with pytest.raises(UsageError, match="read-only"):
                await a.put(bytes(1), a.remote(fixed.handle))
        assert memory == bytes(16)
        await a.put(b"still here", remote[:10])
    assert bytes(memory[:10]) == b"still here"
    with pytest.raises(StaleHandleError):
        await a.put(b"late", remote)


async def test_a_channel_is_one_thing(pair: Pair) -> None:
    a, b = pair
    channel = a.channel("c", weight=2.0)
    assert a.channel("c", weight=2.0) is channel
    with pytest.raises(UsageError, match="c"):
        a.channel("c", weight=3.0)
    with pytest.raises(UsageError, match="another communicator"):
        b.send(b"x", 0, channel=channel)
    with pytest.raises(UsageError, match="another communicator"):
        b.recv(bytearray(1), 0, channel=channel)
    await _goes_on(pair)


async def test_after_close_everything_is_closed() -> None:
    async with world(2, warmup=True) as (a, b):
        channel = b.channel("c")
        region = b.register(bytearray(8))
        remote = b.remote(region.handle)
        await b.aclose()
        calls: list[Callable[[], Any]] = [
            lambda: b.send(b"x", 0),
            lambda: b.recv(bytearray(1), 0),
            lambda: b.recv_array(src=0),
            lambda: b.send_nowait(b"x", 0),
            lambda: b.channel("d"),
            lambda: channel.send(b"x", 0),
            lambda: b.register(bytearray(1)),
            lambda: b.put(b"x", remote),
            lambda: b.get(remote, bytearray(8)),
        ]
        for call in calls:
            with pytest.raises(ClosedError):
                call()
        with pytest.raises(ClosedError):
            await b.barrier()
        with pytest.raises(aiocomm.PeerLostError):
            await a.send(b"x" * (1 << 20), 1)
        await b.aclose()  # idempotent


async def test_another_thread_is_refused(pair: Pair) -> None:
    a, _ = pair
    caught: list[BaseException] = []

    def call() -> None:
        for attempt in (lambda: a.send(b"x", 1), lambda: a.recv(bytearray(1), 1), lambda: a.channel("t")):
            try:
                attempt()
            except UsageError as error:
                caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(caught) == 3
    assert all("from_thread" in str(error) for error in caught)
    await _goes_on(pair)


async def test_what_waits_refuses_the_same(pair: Pair) -> None:
    a, _ = pair
    async with a.register(bytearray(1)) as region:
        with pytest.raises(UsageTypeError, match="rank='1' is not an integer"):
            await a.exchange(region, "1")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="no rank 2"):
            await a.exchange(region, 2)
    with pytest.raises(UsageTypeError, match="rank='1' is not an integer"):
        await a.group([0, "1"])  # type: ignore[list-item]
    async with a.register(bytearray(1)) as region:
        with pytest.raises(UsageTypeError, match=r"rank=array\(\[1\]\) is not an integer"):
            await a.exchange(region, np.array([1]))  # type: ignore[arg-type]
    for ranks in (3, None, np.array(0)):
        with pytest.raises(UsageTypeError, match="a list of the members' ranks"):
            await a.group(ranks)  # type: ignore[arg-type]
    for ranks in ([[0, 1]], np.array([[0], [1]])):
        with pytest.raises(UsageTypeError, match="is not an integer"):
            await a.group(ranks)  # type: ignore[arg-type]
    with pytest.raises(UsageTypeError, match=r"ndarray in place of Pages: aiocomm\.Pages"):
        await a.lease_pages(np.zeros((4, 4)))  # type: ignore[arg-type]
    pages = aiocomm.Pages(np.zeros((4, 4)))
    async with await a.lease_pages(pages) as lease:
        with pytest.raises(UsageTypeError, match="layers: a list of views"):
            await a.put_layers(pages, [0], [a.remote_pages(lease.handle)], [0])  # type: ignore[arg-type]
        with pytest.raises(UsageTypeError, match=r"rank=array\(\[1\]\) is not an integer"):
            lease.layers([np.array([1])])  # type: ignore[list-item]
    with pytest.raises(UsageTypeError, match="channel='q' is no channel"):
        await a.barrier(channel="q")  # type: ignore[arg-type]
    await _goes_on(pair)


async def test_exchanges_after_one_that_was_refused_are_of_the_same_regions(pair: Pair) -> None:
    """What is refused takes no number, by which the two sides find each other."""
    a, b = pair
    got: dict[tuple[str, int], aiocomm.RemoteRegion] = {}
    async with a.register(bytearray(1)) as closed:
        pass
    async with a.register(bytearray(1)) as mine, b.register(bytearray(3)) as theirs:
        for refused, error, match in (
            (np.ones(3), UsageTypeError, "ndarray is not a Region"),
            (b.remote(mine.handle), UsageTypeError, "RemoteRegion is not a Region"),
            (theirs, UsageError, "another communicator"),
            (closed, ClosedError, "the region was closed"),
        ):
            with pytest.raises(error, match=match):
                await a.exchange(refused, 1)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="deadline"):
            await a.exchange(mine, 1, deadline=-1)
        for name in ("first", "second"):

            async def swap(comm: aiocomm.Communicator, region: aiocomm.Region, name: str = name) -> None:
                got[name, comm.rank] = await comm.exchange(region, 1 - comm.rank)

            async with a.register(bytearray(2)) as other, anyio.create_task_group() as tasks:
                tasks.start_soon(swap, a, mine if name == "first" else other)
                tasks.start_soon(swap, b, theirs)
    assert {key: remote.nbytes for key, remote in got.items()} == {
        ("first", 0): 3,
        ("first", 1): 1,
        ("second", 0): 3,
        ("second", 1): 2,
    }


async def test_groups_after_calls_that_were_refused_meet(pair: Pair) -> None:
    """Also what is made of them by `split` and `shrink`."""
    a, b = pair
    with pytest.raises(UsageError, match="deadline=-1"):
        await a.group([0, 1], deadline=-1)
    groups: dict[int, aiocomm.Group] = {}

    async def make(comm: aiocomm.Communicator) -> None:
        groups[comm.rank] = await comm.group([0, 1])

    await all_call([*pair], make)
    splits: list[dict[str, Any]] = [{"color": -1}, {"color": "left"}, {"color": 0, "key": 1 << 70}]
    for arguments in [*splits, {"color": 0, "deadline": -1}]:

        async def split(comm: aiocomm.Communicator, arguments: dict[str, Any] = arguments) -> None:
            with pytest.raises(UsageError):  # the others are told
                await groups[comm.rank].split(**arguments if comm is a else {"color": 0})

        await all_call([a, b], split)
    with pytest.raises(UsageError, match="deadline=nan"):
        await groups[0].shrink(deadline=float("nan"))

    async def go_on(comm: aiocomm.Communicator) -> None:
        half = await groups[comm.rank].split(0)
        assert half is not None
        await half.barrier()
        await (await half.shrink()).barrier()
        await (await groups[comm.rank].shrink()).barrier()

    await all_call([*pair], go_on)


async def test_numbers_of_a_group_are_the_same_whatever_they_came_in(pair: Pair) -> None:
    """Also truth values, which are numbers to Python: they name the same group, and the same root."""

    async def make(comm: aiocomm.Communicator) -> None:
        group = await comm.group([0, 1] if comm.rank else [False, np.int8(1)])
        assert [type(rank) for rank in group.ranks] == [int, int]
        x = np.full(2, comm.rank)
        await group.broadcast(x, 1 if comm.rank else True)
        await group.all_gatherv(np.zeros(2, int), x[:1], [1, 1] if comm.rank else [True, np.True_ + 0])
        assert x[0] == 1

    await all_call([*pair], make)


async def test_numbers_may_be_numpys(pair: Pair) -> None:
    """What comes out of an array: counts, indices, ranks."""
    a, b = pair
    one, two = np.int64(1), np.uint8(2)
    how: Any = {"weight": np.float32(2), "priority": np.int8(2)}
    urgent = [comm.channel("urgent", **how) for comm in pair]
    ours, theirs = (aiocomm.Pages([np.full((2, 6, 4), value)] * one, np.int16(1)) for value in (1, 0))
    lease = await b.lease_pages(theirs, [one, two])
    remote = a.remote_pages(lease.handle)
    views = ours.slice(one - 1, one, two), remote.planes([one - 1]).slice(np.int8(-3), one, two)
    await a.put_pages(views[0], [one], views[1], [two], channel=urgent[0], sm_budget=two)
    assert theirs.arrays[0][:, :, 0].tolist() == [[0] * 6, [0, 0, 1, 0, 0, 0]]
    layers = ours.layers(arrays=one), remote.layers(arrays=one)
    await a.put_layers(layers[0], [one], layers[1], [one], deadline=np.float32(60))
    assert [layer async for layer in lease.layers(one - 1, deadline=np.int64(60))] == [0]

    async def call(comm: aiocomm.Communicator) -> None:
        x = np.full(2, comm.rank, np.float32)
        await comm.all_reduce(x, sm_budget=two)
        came = await comm.dispatch(x[:, None], np.zeros((2, 1), np.uint64), experts=two, sm_budget=two)
        assert (await comm.combine(came.inputs, came, sm_budget=two)).tolist() == [[1], [1]]

    await all_call([*pair], call)


@pytest.mark.parametrize("truth", [True, np.True_])
async def test_truth_values_are_not_taken_for_how_many_or_which(pair: Pair, truth: Any) -> None:
    """A mask of planes, or that there is a budget: as numbers they would be 1."""
    a, _ = pair
    kv = aiocomm.Pages([np.zeros((4, 2, 3)), np.zeros((4, 2, 3))])
    remote = a.remote_pages((await a.lease_pages(kv)).handle)
    for wrong in (
        lambda: kv.planes([truth, False]),
        lambda: kv.slice(truth, 0, 1),
        lambda: kv.slice(1, 0, truth),
        lambda: kv.layers(truth),
        lambda: kv.layers(arrays=truth),
        lambda: aiocomm.Pages(np.zeros((4, 2)), page_axis=truth),
        lambda: aiocomm.spawn(print, n=truth),  # type: ignore[arg-type, return-value]
    ):
        with pytest.raises(TypeError, match="True"):
            wrong()
    x = np.zeros((2, 1), np.float32)
    for call in (
        lambda: a.put_pages(kv, [0], remote, [1], sm_budget=truth),
        lambda: a.get_pages(remote, [1], kv, [0], sm_budget=truth),
        lambda: a.put_layers([kv], [0], [remote], [1], sm_budget=truth),
    ):
        with pytest.raises(TypeError, match=r"sm_budget=.*True"):
            await call()

    async def refused(comm: aiocomm.Communicator) -> None:
        with pytest.raises(UsageError, match=r"experts=.*True"):
            await comm.dispatch(x, np.zeros((2, 1), int), experts=truth)
        with pytest.raises(UsageError, match=r"sm_budget=.*True"):
            await comm.all_reduce(x, sm_budget=truth)

    await all_call([*pair], refused)


async def test_handles_may_come_in_any_memory(pair: Pair) -> None:
    """`recv_array` gives an array, and `recv` takes a buffer."""
    a, b = pair
    pages = aiocomm.Pages(np.zeros((4, 4)))
    async with a.register(bytearray(8), writable=np.True_) as region, await a.lease_pages(pages) as lease:  # type: ignore[arg-type]
        for kind in (bytes, bytearray, memoryview, lambda handle: np.frombuffer(handle, np.uint8)):
            assert b.remote(kind(region.handle)).writable  # type: ignore[arg-type]
            assert b.remote_pages(kind(lease.handle)).rank == 0  # type: ignore[arg-type]


def _with_layout(handle: bytes, text: bytes) -> bytes:
    head = struct.Struct("<4sHQIII?")
    magic, version, number, _, *rest = head.unpack_from(handle)
    return head.pack(magic, version, number, len(text), *rest) + text


async def test_handles_of_pages_that_nobody_has_are_none(pair: Pair) -> None:
    a, b = pair
    kv = aiocomm.Pages([np.zeros((4, 2)), np.zeros((4, 2))])
    ours, theirs = [(await comm.lease_pages(kv, [1, 3])).handle for comm in pair]
    assert len(ours) == len(theirs)
    size = struct.Struct("<4sHQIII?").unpack_from(ours)[5]
    for wrong in (
        ours.replace(struct.pack("<qq", 1, 3), struct.pack("<qq", 1, -1)),
        ours.replace(struct.pack("<qq", 1, 3), struct.pack("<qq", 1, 4)),
        ours[:-size] + theirs[-size:],  # the second array of another rank
        ours[:-size],
        ours + theirs[-size:],
    ):
        assert wrong != ours
        with pytest.raises(UsageError, match="no handle of pages"):
            b.remote_pages(wrong)
    assert b.remote_pages(ours).rank == a.rank


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"count": Infinity}'], ids=["deep", "infinite"])
async def test_layouts_that_are_none_are_no_handles(pair: Pair, text: bytes) -> None:
    a, b = pair
    async with await a.lease_pages(aiocomm.Pages(np.zeros((4, 4)))) as lease:
        with pytest.raises(UsageError, match="these bytes are no handle of pages"):
            b.remote_pages(_with_layout(lease.handle, text))


async def test_pages_that_hold_no_token_are_not_matched_by_tokens(pair: Pair) -> None:
    a, b = pair
    with pytest.raises(UsageError, match="token_axis=-2 has length 0"):
        aiocomm.Pages(np.zeros((4, 0, 8)), token_axis=-2)
    async with await a.lease_pages(aiocomm.Pages(np.zeros((4, 2, 8)), token_axis=1)) as lease:
        none = lease.handle.replace(b'"shape": [2, 8]', b'"shape": [0, 8]')
        assert none != lease.handle
        with pytest.raises(UsageError, match="these bytes are no handle of pages"):
            b.remote_pages(none)
    empty = aiocomm.Pages(np.zeros((4, 0, 8)))  # matched whole, there is nothing to move
    async with await a.lease_pages(empty) as lease:
        await b.put_pages(empty, [0, 1], b.remote_pages(lease.handle), [2, 3])


async def test_a_lease_that_is_refused_ends_no_other() -> None:
    async with world(1) as (comm,):
        pages = aiocomm.pages.Pages(np.zeros((4, 8), np.uint8))
        lease = await comm.lease_pages(pages)
        with pytest.raises(UsageError, match="pages are 0 to 3"):
            await comm.lease_pages(pages, [1, 4])
        assert lease.handle
        await comm.aclose()
        with pytest.raises(ClosedError):
            await comm.lease_pages(pages, [1])


@pytest.mark.parametrize("opened", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_another_loop_is_refused(opened: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Also in the same thread, where its own loop does not run meanwhile, and where none does."""
    with contextlib.closing(opened()) as loop:
        making = world(2, warmup=True)
        a, b = loop.run_until_complete(making.__aenter__())

        async def begin() -> tuple[aiocomm.Region, aiocomm.RemoteRegion, aiocomm.Transfer[aiocomm.Status]]:
            region = a.register(bytearray(1))
            return region, b.remote(region.handle), b.recv(bytearray(5), 0, tag=9)

        region, remote, posted = loop.run_until_complete(begin())
        calls: list[Callable[[], Any]] = [
            lambda: a.send(b"x", 1),
            lambda: a.send_nowait(b"x", 1),
            lambda: a.recv(bytearray(1), 1),
            lambda: a.recv_array(1),
            lambda: a.register(bytearray(1)),
            lambda: a.channel("q"),
            lambda: b.put(b"x", remote),
        ]

        async def elsewhere() -> None:
            for call in calls:
                with pytest.raises(UsageError, match=r"another event loop or thread: use comm\.from_thread"):
                    call()
            for waiting in (a.aclose, a.barrier, lambda: a.exchange(region, 1), lambda: a.group([0, 1])):
                with pytest.raises(UsageError, match="another event loop"):
                    await waiting()
            with pytest.raises((UsageError, RuntimeError, ValueError), match="loop"):
                await asyncio.wait_for(posted, 1)

        asyncio.run(elsewhere())
        for call in calls:
            with pytest.raises(UsageError, match=r"no event loop is running .*: call from a coroutine"):
                call()
        assert not a.closed
        assert not posted.done()

        async def go_on() -> None:
            await a.send(b"hello", 1, tag=9)
            assert (await posted).nbytes == 5
            await making.__aexit__(None, None, None)

        loop.run_until_complete(go_on())
        assert a.closed


async def test_dtypes_are_carried_or_come_as_bytes(pair: Pair) -> None:
    """`recv_array` gives what was sent, or what `.view(dtype)` makes that."""
    a, b = pair
    carried = [np.array(["ab", "c"]), np.array([b"abc", b"d"]), np.array([["x"]], ">U3"), np.zeros(2, "V5")]
    for sent in carried:
        await a.send(sent, 1)
        got = await b.recv_array(0)
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        np.testing.assert_array_equal(got, sent)
    as_bytes = [
        np.array([(1, 2.5), (3, 4.5)], [("a", "i4"), ("b", "f8")]),
        np.array(["2026-01-02", "NaT"], "M8[ns]"),
        np.arange(3).astype("m8[s]"),
        np.arange(6).astype("m8[s]").reshape(3, 2),
        np.arange(6).astype("m8[s]").reshape(2, 3).T[:1, :1],  # contiguous, with strides that no other has
        np.zeros((2, 3), [("a", "i4"), ("b", "f8")]),
        np.empty((3, 0, 2), "M8[s]"),
    ]
    for sent in as_bytes:
        await a.send(sent, 1)
        got = await b.recv_array(0)
        assert (got.dtype, got.shape) == (np.uint8, (*sent.shape[:-1], sent.shape[-1] * sent.itemsize))
        np.testing.assert_array_equal(got.view(sent.dtype), sent)
        posted = b.recv(out := np.empty_like(sent), 0)
        await a.send(sent, 1)
        await posted
        np.testing.assert_array_equal(out, sent)


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="this NumPy has no texts of any length")
async def test_texts_of_any_length_are_refused(pair: Pair) -> None:
    with pytest.raises(UsageTypeError, match=r"pickle\.dumps"):
        pair[0].send(np.array(["a"], np.dtypes.StringDType()), 1)
    await _goes_on(pair)


async def test_what_stays_in_its_process_says_what_to_send(pair: Pair) -> None:
    a, b = pair
    for mine, told in (
        (a.links["shm"], "Send its name"),
        (b.recv(bytearray(1), 0), "send what that returns"),
    ):
        for copying in (pickle.dumps, copy.copy):
            with pytest.raises(TypeError, match=f"stays in its process: .*{told}"):
                copying(mine)


def test_shapes_may_be_of_numpys_integers() -> None:
    assert aiocomm.empty(np.int64(3)).shape == (3,)
    assert aiocomm.empty([np.int32(2), 3]).shape == (2, 3)
    assert aiocomm.empty(()).shape == ()


async def test_bfloat16_comes_as_rows_of_bytes(pair: Pair) -> None:
    a, b = pair
    sent = np.arange(6).reshape(2, 1, 3).astype(pytest.importorskip("ml_dtypes").bfloat16)
    await a.send(sent, 1)
    got = await b.recv_array(0)
    assert (got.dtype, got.shape) == (np.uint8, (2, 1, 6))
    np.testing.assert_array_equal(got.view(sent.dtype), sent)


@pytest.mark.parametrize(("variable", "text"), [("AIOCOMM_EAGER_MAX", "much"), ("AIOCOMM_CMA", "perhaps")])
async def test_a_bad_setting_is_named(variable: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=variable):
        await aiocomm.connect("unix://@aiocomm-never", rank=0, size=1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"address": "http://here", "rank": 0, "size": 2}, "http"),
        ({"address": "unix://@a", "rank": 2, "size": 2}, "rank"),
        ({"address": "unix://@a", "rank": -1, "size": 2}, "rank"),
        ({"address": "unix://@a", "rank": 0, "size": 0}, "size"),
        ({"address": "unix://@a", "rank": 0, "size": 2, "links": ("pigeon",)}, "pigeon"),
    ],
)
async def test_a_bad_world_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        await aiocomm.connect(**arguments)


@pytest.mark.timeout(600)
def test_more_than_four_gibibytes_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on the way is counted in 32 bits. To touch the memory takes long: once for all ways."""
    nbytes = (1 << 32) + (1 << 20)
    sent = np.zeros(nbytes, np.uint8)  # not touched, so not there
    marks = {0: 1, (1 << 31) - 1: 2, 1 << 31: 3, (1 << 32) - 1: 4, 1 << 32: 5, nbytes - 1: 6}
    unmarked = [at for mark in marks for at in (mark ^ 1 << 31, mark ^ 1 << 32) if at < nbytes]
    unmarked = [at for at in unmarked if at not in marks]
    for at, value in marks.items():
        sent[at] = value
    out = np.empty(nbytes, np.uint8)

    async def main(link: str, path: str) -> None:
        async with world(2, warmup=True, links=(link,)) as (a, b):
            posted = b.recv(out, 0)
            await a.send(sent, 1)
            assert (await posted).nbytes == nbytes
            paths = b.links[link].statistics().bytes_by_path
            assert {name: count for name, count in paths.items() if count} == {path: nbytes}

    for link, cma, path in [("shm", "auto", "cma"), ("shm", "off", "stream"), ("tcp", "auto", "stream")]:
        monkeypatch.setenv("AIOCOMM_CMA", cma)
        out[list(marks)] = 0
        asyncio.run(main(link, path))
        assert {at: int(out[at]) for at in marks} == marks, (link, cma)
        assert not out[unmarked].any(), (link, cma)
    step = 1 << 28
    assert sum(np.count_nonzero(out[at : at + step]) for at in range(0, nbytes, step)) == len(marks)


def test_another_run_of_trio_is_refused() -> None:
    async def first() -> aiocomm.Communicator:
        return await aiocomm.connect(f"unix://@aiocomm-test-{os.getpid()}", rank=0, size=1)

    async def second() -> None:
        with pytest.raises(aiocomm.UsageError, match="another event loop"):
            comm.recv(bytearray(1), 0)
        with pytest.raises(aiocomm.UsageError, match="another event loop"):
            await comm.aclose()

    comm = trio.run(first)
    trio.run(second)
    with pytest.raises(aiocomm.UsageError, match="no event loop is running in this thread"):
        comm.recv(bytearray(1), 0)


def test_who_forgets_to_await_is_told() -> None:
    async def worker(comm: aiocomm.Communicator) -> None:
        pass

    with pytest.raises(AttributeError, match=r"no 'send' yet: .* await aiocomm\.connect"):
        aiocomm.connect().send  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"no 'rank' yet: .*async with aiocomm\.spawn"):
        aiocomm.spawn(worker).rank  # type: ignore[attr-defined]  # noqa: B018
