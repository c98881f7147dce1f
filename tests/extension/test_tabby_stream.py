"""The tokens of a generation, for a caller that is not always there."""

from __future__ import annotations

import asyncio

import pytest

import exl_loader
from extension.tabby.stream import TokenStream


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    with exl_loader.load(tiny_model_dir, ctx_size=512) as model:
        yield model


SETTINGS = {"max_new_tokens": 40, "temperature": 0, "ban_eos_token": True}


async def stay() -> None:
    """The client is still there."""


async def all_of(stream: TokenStream) -> list[int]:
    ids: list[int] = []
    while some := await stream.next(stay):
        ids += some
    return ids


def test_tokens_arrive_while_nobody_asks(model):
    async def run():
        stream = TokenStream(model.agenerate_ids([5, 6], SETTINGS))
        while stream.generation.finish_reason is None:
            await asyncio.sleep(0.01)
        first = await stream.next(stay)
        return first + await all_of(stream)

    assert asyncio.run(run()) == list(model.generate_ids([5, 6], SETTINGS))


def test_a_stream_that_is_cancelled_at_once_ends(model):
    async def run():
        stream = TokenStream(model.agenerate_ids([5, 6], SETTINGS))
        await stream.cancel()
        assert await all_of(stream) == [] and stream.was_cancelled
        await stream.close()

    asyncio.run(run())


def test_the_reason_of_a_cancellation_is_the_error_that_the_caller_gets(model):
    async def run():
        stream = TokenStream(model.agenerate_ids([5, 6], SETTINGS | {"max_new_tokens": 400}))
        await stream.next(stay)
        await stream.cancel(RuntimeError("unloaded"))
        await stream.cancel(RuntimeError("later"))
        with pytest.raises(RuntimeError, match="unloaded"):
            await all_of(stream)
        await stream.close()

    asyncio.run(run())


def test_the_caller_looks_while_nothing_arrives(model):
    class Left(Exception):
        pass

    async def look():
        raise Left

    async def nothing():
        await asyncio.sleep(60)
        yield 0

    class Silent:
        async def __aenter__(self):
            return nothing()

        async def __aexit__(self, *_):
            pass

    async def run():
        stream = TokenStream(Silent())
        with pytest.raises(Left):
            await stream.next(look)
        await stream.close()

    asyncio.run(run())
