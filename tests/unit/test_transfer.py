"""A Transfer where asyncio expects a Future, and on trio."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from itertools import islice
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from harness import BACKENDS, until, world

import aiocomm
from aiocomm._loop.spin import SpinSelector
from aiocomm.errors import TransferCancelled

if TYPE_CHECKING:
    from collections.abc import Generator

    from conftest import Pair

pytestmark = pytest.mark.anyio

SPINNING = ("asyncio", {"loop_factory": lambda: asyncio.SelectorEventLoop(SpinSelector(50e-6))})

on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {}), ("asyncio", {"use_uvloop": True}), SPINNING],
    ids=["asyncio", "uvloop", "spin"],
    indirect=True,
)


@pytest.fixture(params=[*BACKENDS.values(), SPINNING], ids=[*BACKENDS, "spin"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The loops, and the one of `aiocomm.run(spin=…)`."""
    return request.param


async def test_it_can_be_awaited_again_and_by_many(pair: Pair) -> None:
    a, b = pair
    transfer = b.recv(bytearray(3), 0)
    seen = []

    async def wait() -> None:
        seen.append(await transfer)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        await a.send(b"abc", 1)
    assert seen == [(0, 0, 3)] * 3
    assert await transfer == await transfer == transfer.result() == transfer.status
    assert transfer.exception() is None
    assert transfer.done()
    assert not transfer.cancelled()


async def test_it_says_what_it_is(pair: Pair) -> None:
    a, b = pair
    receiving = b.channel("c").recv(bytearray(10), 0, tag=4)
    assert repr(receiving) == "<aiocomm.Transfer recv src=0 tag=4 nbytes=10 pending>"
    assert (receiving.kind, receiving.peer, receiving.tag, receiving.nbytes) == ("recv", 0, 4, 10)
    assert receiving.channel == "c"
    assert receiving.status is None
    await a.channel("c").send(b"abc", 1, tag=4)
    status = await receiving
    assert repr(receiving) == "<aiocomm.Transfer recv src=0 tag=4 nbytes=3 done>"
    assert repr(status) == "aiocomm_native.Status(source=0, tag=4, nbytes=3)"
    assert (status.source, status.tag, status.nbytes) == (0, 4, 3)
    other = b.recv(bytearray(1), 0)
    other.cancel()
    assert "cancelled" in repr(other)


async def test_a_pending_one_has_no_result(pair: Pair) -> None:
    _, b = pair
    transfer = b.recv(bytearray(1), 0)
    with pytest.raises(asyncio.InvalidStateError, match="await"):
        transfer.result()
    with pytest.raises(asyncio.InvalidStateError):
        transfer.exception()
    assert not transfer.done()
    transfer.cancel()


async def test_who_iterates_instead_of_awaiting_is_told_so(pair: Pair) -> None:
    a, b = pair
    rows = b.recv_array(0)
    with pytest.raises(RuntimeError, match=r"Transfer recv src=0 .* was iterated over: await it"):
        list(islice(rows, 9))  # `list(rows)`, if that ends
    seen: list[Any] = []
    with pytest.raises(RuntimeError, match="await it"):
        seen.extend(row for row, _ in zip(rows, range(9), strict=False))
    assert seen == [rows]
    await a.send(b"abc", 1)
    assert (await rows).tobytes() == b"abc"


async def test_it_can_be_delegated_to(pair: Pair) -> None:
    """By objects whose `__await__` goes on to the transfer's."""
    a, b = pair

    class Delegating:
        def __init__(self, transfer: aiocomm.Transfer[Any]) -> None:
            self._transfer = transfer

        def __await__(self) -> Generator[Any, None, Any]:
            return (yield from self._transfer.__await__())

    async def send() -> None:
        await Delegating(a.send(b"abc", 1))

    async with anyio.create_task_group() as group:
        transfer = b.recv(bytearray(3), 0)
        group.start_soon(send)
        assert await Delegating(transfer) == (0, 0, 3)
    assert await Delegating(transfer) == (0, 0, 3)
    with pytest.raises(aiocomm.DeadlineExceeded):
        await Delegating(b.recv(bytearray(1), 0, deadline=0.001))
    transfer = b.recv(bytearray(1), 0)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await Delegating(transfer)
    assert scope.cancelled_caught
    assert transfer.cancelled()


async def test_it_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError):
        aiocomm.Transfer()  # type: ignore[call-arg]


async def test_an_error_is_raised_each_time(pair: Pair) -> None:
    _, b = pair
    transfer = b.recv(bytearray(1), 0, deadline=0.001)
    for _ in range(2):
        with pytest.raises(aiocomm.DeadlineExceeded):
            await transfer
    assert isinstance(transfer.exception(), aiocomm.DeadlineExceeded)
    assert not transfer.cancel()
    assert not transfer.cancelled()


async def test_an_error_that_is_raised_often_keeps_the_last_frames_only(pair: Pair) -> None:
    _, b = pair
    transfer = b.recv(bytearray(1), 0, deadline=0)
    depths = []
    for _ in range(3):
        with pytest.raises(aiocomm.DeadlineExceeded) as caught:
            await transfer
        depths.append(len(caught.traceback))
        with pytest.raises(aiocomm.DeadlineExceeded):
            transfer.result()
    assert depths[1:] == [1, 1]  # the first may have waited in frames of its own


async def test_callbacks_run_once_on_the_loop(pair: Pair) -> None:
    a, b = pair
    transfer = b.recv(bytearray(1), 0)
    called: list[Any] = []

    def remove_me(done: Any) -> None:
        called.append("removed")

    for _ in range(3):
        transfer.add_done_callback(called.append)
    transfer.add_done_callback(remove_me)
    transfer.add_done_callback(remove_me)
    assert transfer.remove_done_callback(remove_me) == 2
    assert transfer.remove_done_callback(remove_me) == 0
    await a.send(b"x", 1)
    await transfer
    await until(lambda: len(called) == 3)
    transfer.add_done_callback(called.append)
    await until(lambda: len(called) == 4)
    assert called == [transfer] * 4


@pytest.mark.parametrize("meanwhile", ["remove", "end"])
async def test_callbacks_that_change_while_they_are_compared(pair: Pair, meanwhile: str) -> None:
    """`__eq__` of a callback may remove others, or have the transfer end, which calls them all."""
    a, b = pair
    transfer = b.recv(bytearray(1), 0)
    called: list[Any] = []
    others: list[Any] = [lambda _, i=i: called.append(i) for i in range(10)]
    left = [*others]

    class Odd:
        def __eq__(self, other: object) -> bool:
            while other is others[7] and meanwhile == "remove" and left:
                transfer.remove_done_callback(left.pop())
            if other is others[7] and meanwhile == "end":
                transfer.cancel()
            return other is self

        def __hash__(self) -> int:
            return 0

        def __call__(self, done: Any) -> None:
            called.append(self)

    odd = Odd()
    transfer.add_done_callback(others[0])
    for one in [*others[1:5], odd, *others[5:]]:
        transfer.add_done_callback(one)
    removed = transfer.remove_done_callback(Odd())
    assert removed == 0
    transfer.cancel()
    await until(lambda: transfer.done())
    await until(lambda: called)
    assert called.count(odd) == 1
    assert len(called) == (1 if meanwhile == "remove" else 11)
    await a.send(b"x", 1)
    await b.recv(bytearray(1), 0)


async def test_a_transfer_is_collected_with_what_names_it(pair: Pair) -> None:
    """By the message of its cancelling, and by the memory that it holds."""
    _, b = pair
    gone: list[weakref.ref[Any]] = []

    class Message:
        transfer: Any = None

    message = Message()
    message.transfer = transfer = b.recv(bytearray(1), 0, tag=3)
    transfer.cancel(message)
    await until(transfer.done)
    gone.append(weakref.ref(message))
    del message, transfer
    gc.collect()
    assert gone[0]() is None


async def test_callbacks_run_in_their_context(pair: Pair) -> None:
    a, b = pair
    variable = contextvars.ContextVar("variable", default="outside")
    seen: list[str] = []
    context = contextvars.copy_context()
    context.run(variable.set, "inside")
    transfer = b.recv(bytearray(1), 0)
    transfer.add_done_callback(lambda _: seen.append(variable.get()), context=context)
    await a.send(b"x", 1)
    await transfer
    await until(lambda: seen)
    assert seen == ["inside"]


@on_asyncio
async def test_a_callback_that_raises_goes_to_the_loops_handler(pair: Pair) -> None:
    a, b = pair
    caught: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: caught.append(context))
    try:
        transfer = b.recv(bytearray(1), 0)
        transfer.add_done_callback(lambda _: 1 / 0)
        await a.send(b"x", 1)
        await transfer
        await until(lambda: caught)
    finally:
        loop.set_exception_handler(before)
    assert isinstance(caught[0]["exception"], ZeroDivisionError)


@on_asyncio
async def test_asyncio_takes_it_as_a_future(pair: Pair) -> None:
    a, b = pair
    assert asyncio.isfuture(b.recv(bytearray(1), 0, tag=9, deadline=0)) is True
    results = await asyncio.gather(b.recv(bytearray(2), 0), a.send(b"ab", 1), return_exceptions=True)
    assert results == [(0, 0, 2), None]
    transfer = b.recv(bytearray(2), 0)
    assert asyncio.ensure_future(transfer) is transfer
    done, pending = await asyncio.wait({transfer}, timeout=0)
    assert (done, pending) == (set(), {transfer})
    await a.send(b"ab", 1)
    done, _ = await asyncio.wait({transfer})
    assert done == {transfer}
    assert transfer.get_loop() is asyncio.get_running_loop()
    assert await asyncio.wait_for(transfer, 1) == (0, 0, 2)
    for finished in asyncio.as_completed([transfer]):
        assert await finished == (0, 0, 2)


@on_asyncio
async def test_wait_for_cancels_it(pair: Pair) -> None:
    _, b = pair
    transfer = b.recv(bytearray(1), 0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(transfer, 0.001)
    assert transfer.cancelled()
    transfer = b.recv(bytearray(1), 0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await transfer
    assert transfer.cancelled()


@on_asyncio
async def test_gather_cancels_its_children(pair: Pair) -> None:
    _, b = pair
    transfers = [b.recv(bytearray(1), 0) for _ in range(3)]
    everything = asyncio.gather(*transfers)
    everything.cancel("enough")
    with pytest.raises(asyncio.CancelledError):
        await everything
    assert all(transfer.cancelled() for transfer in transfers)


@on_asyncio
async def test_a_cancel_carries_its_message(pair: Pair) -> None:
    _, b = pair
    transfer = b.recv(bytearray(1), 0)
    assert transfer.cancel(msg="enough")
    assert not transfer.cancel()
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await transfer
    with pytest.raises(asyncio.CancelledError, match="enough"):
        transfer.result()
    with pytest.raises(asyncio.CancelledError):
        transfer.exception()


@on_asyncio
async def test_shield_keeps_it_going(pair: Pair) -> None:
    a, b = pair
    transfer = b.recv(bytearray(1), 0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(transfer), 0.001)
    assert not transfer.done()
    await a.send(b"x", 1)
    assert (await transfer).nbytes == 1


@on_asyncio
async def test_a_task_group_ends_its_waiters(pair: Pair) -> None:
    _, b = pair
    transfer = b.recv(bytearray(1), 0)

    async def wait() -> None:
        await transfer

    async def fail() -> None:
        raise KeyError

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 -- the group raises at its end
        async with asyncio.TaskGroup() as group:
            group.create_task(wait())
            group.create_task(fail())
    assert caught.group_contains(KeyError)
    assert transfer.cancelled()


@on_asyncio
async def test_a_cancelled_task_is_cancelled_though_many_others_have_ended(pair: Pair) -> None:
    """A cancel that comes too late must not be taken for one that will be told: asyncio would lose it."""
    a, b = pair
    buffers = [bytearray(1) for _ in range(2000)]
    transfers = [b.recv(buffer, 0, tag=tag) for tag, buffer in enumerate(buffers)]

    async def wait() -> str:
        try:
            await transfers[-1]
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            return "cancelled"
        return "went on"

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    for tag in range(2000):
        a.send(b"x", 1, tag=tag)
    task.cancel()
    assert await task == "cancelled"
    for transfer in transfers[:-1]:
        await transfer


async def test_cancelling_one_waiter_ends_it_for_all(pair: Pair) -> None:
    _, b = pair
    transfer = b.recv(bytearray(1), 0)
    seen: list[str] = []

    async def patient() -> None:
        try:
            await transfer
        except (asyncio.CancelledError, TransferCancelled):
            seen.append("told")

    async with anyio.create_task_group() as group:
        group.start_soon(patient)
        await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(0.001):
            await transfer
    assert transfer.cancelled()
    assert seen == ["told"]


async def test_it_can_be_referred_to_weakly(pair: Pair) -> None:
    a, b = pair
    transfer = b.recv(bytearray(1), 0)
    reference = weakref.ref(transfer)
    del transfer
    gc.collect()
    assert reference() is not None, "the engine holds what is under way"
    await a.send(b"x", 1)
    await until(lambda: gc.collect() is not None and reference() is None)


async def test_it_keeps_its_buffer_alive_until_it_ends(pair: Pair) -> None:
    a, b = pair

    class Buffer(bytearray):
        """One that can be referred to weakly."""

    buffer = Buffer(1)
    reference = weakref.ref(buffer)
    transfer = b.recv(buffer, 0)
    del buffer
    gc.collect()
    assert reference() is not None
    with pytest.raises(BufferError):
        reference().append(1)  # type: ignore[union-attr]
    await a.send(b"x", 1)
    await transfer
    gc.collect()
    assert reference() is None


async def test_cycles_are_collected(pair: Pair) -> None:
    a, b = pair

    class Holder:
        transfer: Any

        def ended(self, _: Any) -> None:
            """Keeps the transfer alive by a bound method."""

    holder = Holder()
    holder.transfer = b.recv(bytearray(1), 0)
    holder.transfer.add_done_callback(holder.ended)
    reference = weakref.ref(holder)
    await a.send(b"x", 1)
    await holder.transfer
    holder.transfer.add_done_callback(holder.ended)
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    del holder
    gc.collect()
    assert reference() is None


async def test_a_failure_that_nobody_saw_is_raised_at_the_exit() -> None:
    with pytest.raises(ExceptionGroup, match="nobody awaited") as caught:  # noqa: PT012 -- leaving raises
        async with aiocomm.connect() as comm:
            reference = weakref.ref(comm.recv(bytearray(1), 0, deadline=0))
            await until(lambda: reference() is None)
    assert caught.group_contains(aiocomm.DeadlineExceeded)


async def test_of_many_failures_that_nobody_saw_the_first_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ExceptionGroup, match="nobody awaited") as caught:  # noqa: PT012 -- leaving raises
        async with aiocomm.connect() as comm:
            for _ in range(100):
                reference = weakref.ref(comm.recv(bytearray(1), 0, deadline=0))
            await until(lambda: reference() is None)
            assert len(comm._unretrieved) < 100
    kept = caught.value.exceptions
    assert kept[-1].__notes__ == [f"nobody awaited {100 - len(kept)} more transfers, which failed, too"]
    told = [record.getMessage() for record in caplog.records if "nobody awaited" in record.getMessage()]
    assert len(told) == 1
    assert "recv of 1 bytes from rank 0" in told[0]


async def test_a_failure_that_somebody_saw_is_not() -> None:
    async with aiocomm.connect() as comm:
        transfer = comm.recv(bytearray(1), 0, deadline=0)
        await until(transfer.done)
        transfer.exception()
        other = comm.recv(bytearray(1), 0)
        other.cancel()
        del transfer, other


async def test_an_error_in_the_block_hides_no_failure() -> None:
    with pytest.raises(KeyError):  # noqa: PT012 -- in the block
        async with aiocomm.connect() as comm:
            comm.recv(bytearray(1), 0, deadline=0)
            raise KeyError


async def test_closing_ends_everything_that_waits() -> None:
    async with world(2, warmup=True) as (a, b):
        transfers = [b.recv(bytearray(1), 0, tag=tag) for tag in range(1000)]
        ended: list[int] = []
        for tag, transfer in enumerate(transfers):
            transfer.add_done_callback(lambda _, tag=tag: ended.append(tag))
        await b.aclose()
        for transfer in transfers:
            with pytest.raises(aiocomm.ClosedError):
                await transfer
        await until(lambda: len(ended) == 1000)
        await a.aclose()


async def test_closing_lets_sends_end(pair: Pair) -> None:
    a, b = pair
    sending = a.send(bytes(1 << 20), 1)
    got: list[Any] = []

    async def receive() -> None:
        got.append(await b.recv_array(0))

    async with anyio.create_task_group() as group:
        group.start_soon(a.aclose)
        group.start_soon(receive)
    await sending
    assert len(got[0]) == 1 << 20
