"""Workers of two engines hand KV blocks over: threads with a loop each, as in vLLM, members of one world.

vLLM itself is not needed; `test_vllm.py` runs it where it is installed.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, until
from kv_engines import GEOMETRY, Engine, fetch, hand_over

import aiocomm
from aiocomm.vllm.caches import Geometry
from aiocomm.vllm.steps import Figures, Origin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Child

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The workers have loops of their own; this one only looks at them."""
    return "asyncio"


@pytest.fixture
def engine(address: str) -> Iterator[Callable[..., Any]]:
    """Makes engines, and ends them."""
    with contextlib.ExitStack() as stack:

        async def make(name: str, seed: int, *, geometry: Geometry = GEOMETRY, **options: Any) -> Engine:
            made = Engine(address, name, seed, **options)
            stack.callback(made.close)
            await anyio.to_thread.run_sync(made.join, geometry)
            return made

        yield make


@pytest.mark.parametrize(
    ("theirs", "ours", "heads"),
    [
        (1, 1, 4),
        (2, 1, 4),
        (1, 2, 4),
        (4, 2, 4),
        (2, 4, 4),
        (4, 4, 2),
        (4, 1, 2),
        (1, 4, 2),
        (4, 2, 1),
        (2, 4, 1),
    ],
)
async def test_blocks_go_over_whatever_the_degrees(
    engine: Callable[..., Any], theirs: int, ours: int, heads: int
) -> None:
    """Also of latents, of which all ranks hold all (one head)."""
    prefill = await engine("prefill", 1, ranks=theirs, heads=heads)
    decode = await engine("decode", 2, ranks=ours, heads=heads)
    await hand_over(prefill, decode)


@pytest.mark.parametrize("links", ["shm", "tcp"])
async def test_blocks_go_over_on_any_link(engine: Callable[..., Any], links: str) -> None:
    prefill = await engine("prefill", 1, ranks=2, links=links)
    decode = await engine("decode", 2, links=[links])
    await hand_over(prefill, decode)


async def test_what_was_handed_over_is_counted(engine: Callable[..., Any]) -> None:
    prefill, decode = await engine("prefill", 1, lease_s=0.01), await engine("decode", 2)
    decode.begin(claim=[prefill.origin("p")])
    kept = prefill.workers[0]._exchange._lender._kept
    await until(lambda: "p" in kept and kept["p"].claimed_by)
    prefill.begin(keep={"p": (3, 1), "nobody's": (5,)})
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3, 1], [0, 1]))
    assert await decode.has_received("d")
    await prefill.has_sent("nobody's")
    decode.begin(fetch=fetch("e", prefill.origin("nobody's"), [5], [2]))
    assert not await decode.has_received("e")
    decode.begin(fetch=fetch("f", prefill.origin("never"), [5], [2]), cancel=["f"])
    assert await decode.has_received("f")
    figures = decode.workers[0].figures()
    assert figures.nbytes == [2 * decode.memory[0][:, :2].nbytes]
    assert [0 < seconds < LIMIT_S for seconds in figures.seconds] == [True]
    assert (figures.failed, figures.unclaimed) == (1, 0)
    assert prefill.workers[0].figures().unclaimed == 1
    assert decode.workers[0].figures() == prefill.workers[0].figures() == Figures()


async def test_two_requests_share_a_block(engine: Callable[..., Any]) -> None:
    """As those do whose prompts begin alike: the second lease does not end the first."""
    prefill, decode = await engine("prefill", 1), await engine("decode", 2)
    prefill.begin(keep={"p1": (3, 1), "p2": (3, 4)})
    decode.begin(fetch=fetch("d1", prefill.origin("p1"), [3, 1], [0, 1]))
    assert await decode.has_received("d1")
    await prefill.has_sent("p1")
    decode.begin(fetch=fetch("d2", prefill.origin("p2"), [3, 4], [2, 3]))
    assert await decode.has_received("d2")
    np.testing.assert_array_equal(decode.blocks([0, 1, 2, 3]), prefill.blocks([3, 1, 3, 4]))


@pytest.mark.parametrize("last", ["fetched", "released", "cancelled"])
async def test_blocks_are_kept_for_all_who_want_them(engine: Callable[..., Any], last: str) -> None:
    """Such as several answers to one prompt, of which one is begun when another has its blocks."""
    prefill, decode = await engine("prefill", 1, ranks=2), await engine("decode", 2, ranks=2)
    origin = prefill.origin("p")
    prefill.begin(keep={"p": (3, 1)})
    decode.begin(claim=[origin] * 3)
    decode.begin(fetch=fetch("d1", origin, [3, 1], [0, 1]))
    assert await decode.has_received("d1")
    decode.begin(fetch=fetch("d2", origin, [3, 1], [2, 3]))
    assert await decode.has_received("d2")
    np.testing.assert_array_equal(decode.blocks([0, 1, 2, 3]), prefill.blocks([3, 1, 3, 1]))
    if last == "released":
        decode.begin(release=[origin])
    else:
        decode.begin(fetch=fetch("d3", origin, [1], [4]), cancel=["d3"] if last == "cancelled" else [])
        assert await decode.has_received("d3")
    await prefill.has_sent("p")


async def test_who_asks_before_the_step_that_gives_waits(engine: Callable[..., Any]) -> None:
    prefill, decode = await engine("prefill", 1), await engine("decode", 2)
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3], [0]))
    asked = prefill.workers[0]._exchange._lender._kept
    await until(lambda: "p" in asked)
    prefill.begin(keep={"p": (3,)})
    assert await decode.has_received("d")
    np.testing.assert_array_equal(decode.blocks([0]), prefill.blocks([3]))


async def test_an_engine_that_comes_later_is_waited_for(engine: Callable[..., Any]) -> None:
    decode = await engine("decode", 2)
    decode.begin(fetch=fetch("d", Origin("prefill", 1, "p"), [3], [0]))
    prefill = await engine("prefill", 1)
    prefill.begin(keep={"p": (3,)})
    assert await decode.has_received("d")
    np.testing.assert_array_equal(decode.blocks([0]), prefill.blocks([3]))


async def test_blocks_that_nobody_claims_are_given_back_and_refused(
    engine: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever comes late computes them again, and reads nothing that another request has put there."""
    prefill, decode = await engine("prefill", 1, lease_s=0.01), await engine("decode", 2)
    before = decode.memory[0].copy()
    prefill.begin(keep={"p": (3,)})
    await prefill.has_sent("p")
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3], [0]))
    assert not await decode.has_received("d")
    np.testing.assert_array_equal(decode.memory[0], before)
    assert "its blocks are not here" in caplog.text


async def test_blocks_that_are_claimed_are_kept_while_the_claimant_lives(engine: Callable[..., Any]) -> None:
    prefill = await engine("prefill", 1, lease_s=0.05)
    waits, dies = await engine("waits", 2), await engine("dies", 3)
    waits.begin(claim=[prefill.origin("p1")])
    dies.begin(claim=[prefill.origin("p2")])
    kept = prefill.workers[0]._exchange._lender._kept
    await until(lambda: len(kept) == 2 and all(entry.claimed_by for entry in kept.values()))
    prefill.begin(keep={"p1": (3,), "p2": (4,), "p3": (5,)})
    await prefill.has_sent("p3")  # a lease has passed
    assert {"p1", "p2"} <= set(kept)
    dies.close()
    await prefill.has_sent("p2")
    waits.begin(fetch=fetch("d", prefill.origin("p1"), [3], [0]))
    assert await waits.has_received("d")
    np.testing.assert_array_equal(waits.blocks([0]), prefill.blocks([3]))


@pytest.mark.parametrize("ranks", [1, 2])
async def test_released_blocks_are_given_back(engine: Callable[..., Any], ranks: int) -> None:
    prefill, decode = await engine("prefill", 1, ranks=ranks), await engine("decode", 2)
    prefill.begin(keep={"p": (3,)})
    decode.begin(release=[prefill.origin("p")])
    await prefill.has_sent("p")
    decode.begin(release=[prefill.origin("q")])  # before the step that gives them
    gone = [worker._exchange._lender._gone for worker in prefill.workers]
    await until(lambda: all("q" in requests for requests in gone))
    prefill.begin(keep={"q": (3,)})
    await prefill.has_sent("q")


async def test_a_fetch_that_is_broken_off_gives_both_their_blocks_back(engine: Callable[..., Any]) -> None:
    prefill, decode = await engine("prefill", 1), await engine("decode", 2)
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3], [0]), cancel=["d"])  # before it has begun
    assert await decode.has_received("d")
    decode.begin(fetch=fetch("e", prefill.origin("q"), [3], [0]))
    kept = prefill.workers[0]._exchange._lender._kept
    await until(lambda: "q" in kept)
    decode.begin(cancel=["e", "unknown"])
    assert await decode.has_received("e")
    prefill.begin(keep={"p": (3,), "q": (4,)})
    await prefill.has_sent("p")
    await prefill.has_sent("q")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "another"),
        ("dtype", "float16"),
        ("block_size", 16),
        ("layers", 4),
        ("layout", "LBNHC"),
        ("backend", "FLASHINFER"),
        ("vllm", "0.33.0"),
    ],
)
async def test_engines_that_do_not_fit_say_why(
    engine: Callable[..., Any], caplog: pytest.LogCaptureFixture, field: str, value: Any
) -> None:
    prefill = await engine("prefill", 1)
    other = Geometry(**{name: getattr(GEOMETRY, name) for name in GEOMETRY.__slots__} | {field: value})
    decode = await engine("decode", 2, geometry=other)
    prefill.begin(keep={"p": (3, 4, 5)})
    # Of blocks of another size there are more, or fewer.
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3, 4, 5], [0]))
    assert not await decode.has_received("d")
    assert f"{field} is {value!r} there" in caplog.text
    await prefill.has_sent("p")


@pytest.mark.parametrize("there", [[99], [3, 3, 4]])
async def test_blocks_that_are_not_there(engine: Callable[..., Any], there: list[int]) -> None:
    """Neither side is left with blocks that it never has back."""
    prefill, decode = await engine("prefill", 1), await engine("decode", 2)
    prefill.begin(keep={"p": (3, 4)})
    decode.begin(fetch=fetch("d", prefill.origin("p"), there, [0, 1]))
    assert not await decode.has_received("d")
    await prefill.has_sent("p")
    prefill.begin(keep={"q": (99,)})
    await prefill.has_sent("q")


async def test_an_engine_that_is_gone(engine: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = await engine("prefill", 1), await engine("decode", 2)
    prefill.close()
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3], [0]))
    assert not await decode.has_received("d")
    assert "is gone" in caplog.text or "left" in caplog.text


async def test_a_fetch_has_its_time(engine: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = await engine("prefill", 1), await engine("decode", 2, fetch_s=0.05)
    decode.begin(fetch=fetch("d", prefill.origin("never"), [3], [0]))
    assert not await decode.has_received("d")
    assert "within 0.05 s" in caplog.text


async def test_words_that_make_no_sense_are_passed_over(
    engine: Callable[..., Any], address: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = await engine("prefill", 1), await engine("decode", 2)
    async with aiocomm.connect(address, name="stranger") as comm:
        (rank,) = (peer.rank for peer in comm.peers if peer.name == "vllm/prefill/0/0")
        channel = comm.channel("vllm")
        for word in (b"\xff", b"[]", b"{}", json.dumps({"kind": "?", "request": "r"}).encode(), bytes(65537)):
            with contextlib.suppress(aiocomm.TruncationError):
                await channel.send(np.frombuffer(word, np.uint8), rank)
    prefill.begin(keep={"p": (3,)})
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3], [0]))
    assert await decode.has_received("d")
    assert caplog.text.count("not understood") == 5


PREFILL = """
import sys
tests, address = sys.argv[1:]
sys.path.insert(0, tests)
from kv_engines import Engine
engine = Engine(address, "prefill", 1)
engine.join()
engine.begin(keep={"p": (3, 1)})
print("joined", flush=True)
sys.stdin.read()
"""


async def test_an_engine_that_is_killed(
    engine: Callable[..., Any], address: str, child: Callable[..., Child]
) -> None:
    """What it was asked for fails at once; what others do goes on."""
    victim = child(PREFILL, str(Path(__file__).parents[1]), address)
    assert await victim.line() == "joined"
    decode, other = await engine("decode", 2), await engine("other", 3)
    decode.begin(fetch=fetch("before", Origin("prefill", 1, "p"), [3, 1], [0, 1]))
    assert await decode.has_received("before")
    decode.begin(fetch=fetch("d", Origin("prefill", 1, "never"), [3], [0]))  # it waits there
    other.begin(keep={"q": (5,)})
    decode.begin(fetch=fetch("e", other.origin("q"), [5], [4]))
    assert await decode.has_received("e")
    victim.process.send_signal(signal.SIGKILL)
    assert not await decode.has_received("d")
    np.testing.assert_array_equal(decode.blocks([4]), other.blocks([5]))


async def test_an_engine_that_cannot_join_says_so(address: str) -> None:
    nowhere = Engine("unix://@aiocomm-test-nobody", "decode", 2, join_s=0.05)
    with pytest.raises(aiocomm.DeadlineExceeded):
        await anyio.to_thread.run_sync(nowhere.join)
    nowhere.close()
    stranger = Engine(address, "decode", 2, token="another", join_s=LIMIT_S)
    with pytest.raises(aiocomm.AuthenticationError):
        await anyio.to_thread.run_sync(stranger.join)
    stranger.close()


RENDEZVOUS = """
import sys
from aiocomm.cli import main
sys.exit(main(["rendezvous", "--listen", sys.argv[1]]))
"""


async def test_a_rendezvous_that_is_lost_and_comes_back(
    child: Callable[..., Child], request: pytest.FixtureRequest
) -> None:
    """Meanwhile who is there is reached; then all meet who comes later, and what was lent is lent yet."""
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    made = [Engine(address, name, seed) for name, seed in (("prefill", 1), ("decode", 2), ("later", 3))]
    for one in made:
        request.addfinalizer(one.close)
    prefill, decode, later = made
    first = child(RENDEZVOUS, address)
    assert (await first.line()).startswith("listening")
    for one in (prefill, decode):
        await anyio.to_thread.run_sync(one.join)
    await hand_over(prefill, decode)  # those are reached that were before
    first.process.kill()
    assert await anyio.to_thread.run_sync(first.process.wait) == -signal.SIGKILL
    prefill.begin(keep={"a": (3,), "q": (4,)})
    decode.begin(claim=[prefill.origin("q")], fetch=fetch("b", prefill.origin("a"), [3], [0]))
    assert await decode.has_received("b")
    workers = [one.workers[0] for one in (prefill, decode)]
    before = [worker._exchange for worker in workers]
    assert (await child(RENDEZVOUS, address).line()).startswith("listening")
    await anyio.to_thread.run_sync(later.join)
    await until(lambda: all(worker._exchange not in before for worker in workers))
    later.begin(keep={"r": (5,)})
    decode.begin(fetch=fetch("e", prefill.origin("q"), [4], [1]) + fetch("f", later.origin("r"), [5], [2]))
    assert await decode.has_received("e")
    assert await decode.has_received("f")
    await prefill.has_sent("q")
    np.testing.assert_array_equal(decode.blocks([0, 1]), prefill.blocks([3, 4]))
    np.testing.assert_array_equal(decode.blocks([2]), later.blocks([5]))


async def test_who_was_left_alone_without_a_rendezvous_meets_others_at_the_next(
    child: Callable[..., Child], request: pytest.FixtureRequest
) -> None:
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    prefill, decode, later = (Engine(address, name, seed) for seed, name in enumerate("pdl", 1))
    for one in (prefill, decode, later):
        request.addfinalizer(one.close)
    first = child(RENDEZVOUS, address)
    assert (await first.line()).startswith("listening")
    for one in (prefill, decode):
        await anyio.to_thread.run_sync(one.join)
    await hand_over(prefill, decode)
    first.process.kill()
    (worker,) = prefill.workers
    before = worker._exchange
    await anyio.to_thread.run_sync(decode.close)
    await until(lambda: before._words._comm.statistics().posted_receives == 0)  # since nobody can come
    assert (await child(RENDEZVOUS, address).line()).startswith("listening")
    await anyio.to_thread.run_sync(later.join)
    await until(lambda: worker._exchange is not before)
    await hand_over(prefill, later)


async def test_an_engine_that_has_anothers_name_says_so(engine: Callable[..., Any]) -> None:
    """As where a configuration was copied: nobody could tell whose blocks are meant."""
    first = await engine("same", 1)
    with pytest.raises(aiocomm.UsageError, match=r"'same' is there already.*give each its own"):
        await engine("same", 2)
    await anyio.to_thread.run_sync(first.close)
    await engine("same", 3)


async def test_a_loop_that_has_ended_fails_what_it_is_asked_for_and_keeps_nothing(
    engine: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine goes on by itself: nothing that did not come is taken for come, and no block is lost."""
    prefill, decode = await engine("prefill", 1), await engine("decode", 2)
    prefill.begin(keep={"p": (3,)})
    decode.begin(fetch=fetch("d", prefill.origin("never"), [3], [0]))
    await until(lambda: set(prefill.workers[0]._exchange._lender._kept) == {"p", "never"})
    for one in (prefill, decode):
        lender = one.workers[0]._exchange._lender
        monkeypatch.setattr(lender, "hear", lambda *_: 1 / 0)
    decode.begin(release=[prefill.origin("x")])  # which ends the loop there
    prefill.begin(release=[decode.origin("x")])
    assert not await decode.has_received("d")
    await prefill.has_sent("p")
    prefill.begin(keep={"q": (4,)})
    decode.begin(fetch=fetch("e", prefill.origin("q"), [4], [0]))
    await prefill.has_sent("q")
    assert not await decode.has_received("e")
    assert "ZeroDivisionError" in caplog.text


async def test_caches_that_are_no_pages_say_so(address: str) -> None:
    decode = Engine(address, "decode", 2)
    decode.memory = [decode.memory[0][::2, ::2, ::2, ::2, ::2]]
    with pytest.raises(aiocomm.UsageError):
        await anyio.to_thread.run_sync(decode.join)
    decode.close()


async def test_answers_that_nobody_waits_for_any_more_are_not_kept(engine: Callable[..., Any]) -> None:
    prefill, decode = await engine("prefill", 1), await engine("decode", 2)
    kept = prefill.workers[0]._exchange._lender._kept
    for n in range(8):
        decode.begin(fetch=fetch(f"d{n}", prefill.origin(f"p{n}"), [3], [0]))
        await until(lambda n=n: f"p{n}" in kept)
        decode.begin(cancel=[f"d{n}"])
        assert await decode.has_received(f"d{n}")
        prefill.begin(keep={f"p{n}": (3,)})
        await prefill.has_sent(f"p{n}")
    prefill.begin(keep={"p": (3,)})
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3], [0]))
    assert await decode.has_received("d")
    said = decode.workers[0]._exchange._words._comm.statistics()
    assert said.unexpected_messages == 0
    assert said.posted_receives == 1, "what others say to it"


async def test_engines_of_other_heads_leave_no_blocks_behind(engine: Callable[..., Any]) -> None:
    """Which of them read what each reckons otherwise."""
    prefill = await engine("prefill", 1, ranks=4)
    other = Geometry(**{name: getattr(GEOMETRY, name) for name in GEOMETRY.__slots__} | {"heads": 1})
    decode = await engine("decode", 2, geometry=other, ranks=2, heads=1)
    prefill.begin(keep={"p": (3,)})
    decode.begin(claim=[prefill.origin("p")], fetch=fetch("d", prefill.origin("p"), [3], [0]))
    assert not await decode.has_received("d")
    await prefill.has_sent("p")
