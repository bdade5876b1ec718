"""The queue before the engine: batches, turns, limits, callers that leave, work that fails."""

import asyncio
import threading
from dataclasses import dataclass

import pytest

from htfa_jax.demo.options import Limits
from htfa_jax.demo.serving import Serving
from htfa_jax.errors import Busy, Closed, ConfigError, DataError
from htfa_jax.inference.options import ONE_PASS, Completion, Decoding
from htfa_jax.inference.results import Result


@dataclass
class Talk:
    """A conversation whose answer has as many words as its question says."""

    engine: "Engine"
    confidence: float | None = None

    def stream(self, query, decoding):
        try:
            for i in range(int(query)):
                self.engine.log.append(f"word {i}")
                yield f"{i} "
            self.confidence = 0.5
        finally:
            self.engine.log.append("closed")


class Panic(BaseException):
    """As pyo3's PanicException: no `Exception`."""


class Engine:
    """Stands in for the model: it waits until `go` is set, and keeps a log of what it does."""

    def __init__(self):
        self.go, self.entered, self.log = threading.Event(), threading.Event(), []

    def batch_infer(self, scenes, queries, **options):
        self.entered.set()
        assert self.go.wait(10)
        self.log.append(f"batch of {len(scenes)}")
        if "bad" in scenes:
            raise ValueError("broken")
        if "panic" in scenes:
            raise Panic("a library written in Rust")
        if "short" in scenes:
            scenes, queries = scenes[:-1], queries[:-1]
        return [
            [Result(answer=f"{s}: {q}") for q in qs] for s, qs in zip(scenes, queries, strict=True)
        ]

    def chat(self):
        return Talk(self)


def serve(test, chores=(), **limits):
    """Runs a coroutine function with a serving engine; chores are made of that engine."""

    async def run():
        engine = Engine()
        with Serving(engine, Limits(**limits), [chore(engine) for chore in chores]) as serving:
            try:
                await asyncio.wait_for(test(serving, engine), 20)
            finally:
                engine.go.set()

    asyncio.run(run())


def infer(serving, scene, client="a", completion=None):
    options = {"decoding": Decoding(), "completion": completion}
    return asyncio.create_task(serving.infer(client, scene, ["q"], **options))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


async def blocked(serving, engine):
    """A request that the engine works on, so that all others wait."""
    first = infer(serving, "first")
    await until(engine.entered.is_set)
    return first


def test_chores_are_done_while_nobody_waits():
    def chore(name):
        return lambda engine: lambda: engine.go.wait(10) and engine.log.append(name)

    async def test(serving, engine):
        # The first chore is being done when a caller comes: the second one has to wait.
        task = infer(serving, "s")
        await until(lambda: serving.waiting == 1)
        engine.go.set()
        await task
        await until(lambda: len(engine.log) == 3)
        assert engine.log == ["chore 1", "batch of 1", "chore 2"]

    def failing(engine):
        return lambda: 1 / 0

    serve(test, [chore("chore 1"), failing, chore("chore 2")])


def test_what_waits_goes_together():
    async def test(serving, engine):
        tasks = [await blocked(serving, engine)]
        tasks += [infer(serving, f"s{i}") for i in range(5)]
        tasks.append(infer(serving, "other", completion=ONE_PASS))
        await until(lambda: serving.waiting == 6)
        engine.go.set()
        answers = [rows[0].answer for rows in await asyncio.gather(*tasks)]
        assert answers == ["first: q", *(f"s{i}: q" for i in range(5)), "other: q"]
        assert engine.log == ["batch of 1", "batch of 4", "batch of 1", "batch of 1"]

    serve(test, batch=4)


def test_the_oldest_goes_first_whatever_its_options():
    async def test(serving, engine):
        await blocked(serving, engine)
        kinds = [None, ONE_PASS, None, Completion(refinement_steps=2), ONE_PASS]
        order = []

        async def note(i, task):
            await task
            order.append(i)

        notes = [
            asyncio.create_task(note(i, infer(serving, f"s{i}", completion=kind)))
            for i, kind in enumerate(kinds)
        ]
        await until(lambda: serving.waiting == 5)
        engine.go.set()
        await asyncio.gather(*notes)
        assert order == [0, 2, 1, 4, 3]

    serve(test)


def test_a_long_answer_holds_up_nobody():
    async def test(serving, engine):
        engine.go.set()
        long = serving.stream("a", engine.chat, "1000000", Decoding())
        assert await anext(long) == "0 "
        (result,) = await infer(serving, "s")
        short = [piece async for piece in serving.stream("a", engine.chat, "3", Decoding())]
        assert result.answer == "s: q" and short == ["0 ", "1 ", "2 ", 0.5]
        await long.aclose()
        # Who stopped listening costs nothing any more.
        await until(lambda: serving.streaming == 0)
        assert engine.log[-1] == "closed"

    serve(test)


def test_more_answers_than_there_is_room_for_wait():
    async def test(serving, engine):
        streams = [serving.stream("a", engine.chat, "1000000", Decoding()) for _ in range(2)]
        for stream in streams:
            assert await anext(stream) == "0 "
        third = asyncio.create_task(anext(serving.stream("a", engine.chat, "1", Decoding())))
        await asyncio.sleep(0.05)
        assert serving.waiting == 1 and not third.done()
        await streams[0].aclose()
        assert await third == "0 "
        await streams[1].aclose()

    serve(test, streams=2)


def test_a_full_queue_says_when_to_come_again():
    async def test(serving, engine):
        await blocked(serving, engine)
        waiting = [infer(serving, "s", client=str(i)) for i in range(3)]
        await until(lambda: serving.waiting == 3)
        with pytest.raises(Busy, match="3 requests wait already: try again in") as refused:
            await infer(serving, "s", client="late")
        assert refused.value.retry_after >= 1 and not refused.value.by_this_client
        engine.go.set()
        await asyncio.gather(*waiting)
        assert (await infer(serving, "s", client="late"))[0].answer

    serve(test, queue=3)


def test_one_client_does_not_fill_the_queue():
    async def test(serving, engine):
        await blocked(serving, engine)
        for _ in range(2):
            infer(serving, "s")
        await until(lambda: serving.waiting == 2)
        with pytest.raises(Busy, match="2 of your requests") as refused:
            await infer(serving, "s")
        assert refused.value.by_this_client
        other = infer(serving, "s", client="b")
        engine.go.set()
        assert (await other)[0].answer == "s: q"

    serve(test, per_client=2)


def test_who_left_is_not_worked_for():
    async def test(serving, engine):
        first = await blocked(serving, engine)
        gone, stays = infer(serving, "gone"), infer(serving, "stays")
        await until(lambda: serving.waiting == 2)
        gone.cancel()
        await asyncio.sleep(0)
        engine.go.set()
        assert (await stays)[0].answer == "stays: q"
        await first
        assert engine.log == ["batch of 1", "batch of 1"] and serving.waiting == 0

    serve(test)


def test_work_that_fails_fails_alone():
    async def test(serving, engine):
        engine.go.set()
        with pytest.raises(ValueError, match="broken"):
            await infer(serving, "bad")
        with pytest.raises(ValueError, match="invalid literal"):
            await anext(serving.stream("a", engine.chat, "no number", Decoding()))
        assert (await infer(serving, "good"))[0].answer == "good: q"

    serve(test)


def test_an_engine_that_gives_too_few_results_fails_its_callers_and_goes_on():
    async def test(serving, engine):
        first = await blocked(serving, engine)
        batch = [infer(serving, "short"), infer(serving, "other")]
        await until(lambda: serving.waiting == 2)
        engine.go.set()
        await first
        for task in batch:
            with pytest.raises(RuntimeError, match="1 results for 2 pairs"):
                await asyncio.wait_for(task, 5)
        assert serving.alive and (await infer(serving, "good"))[0].answer == "good: q"

    serve(test)


def test_a_panic_fails_its_caller_and_no_other():
    def panics(engine):
        def chore():
            raise Panic

        return chore

    def talk():
        raise Panic

    async def test(serving, engine):
        engine.go.set()
        for task in (infer(serving, "panic"), anext(serving.stream("a", talk, "1", Decoding()))):
            with pytest.raises(RuntimeError, match="Panic"):
                await asyncio.wait_for(task, 5)
        assert serving.alive and (await infer(serving, "good"))[0].answer == "good: q"

    serve(test, [panics])


def test_what_breaks_the_thread_itself_is_told_to_all_who_wait(monkeypatch):
    async def test(serving, engine):
        first = await blocked(serving, engine)
        waiting = infer(serving, "s")
        await until(lambda: serving.waiting == 1)
        monkeypatch.setattr(serving, "_next_answers", lambda: 1 / 0)
        engine.go.set()
        assert (await first)[0].answer == "first: q"
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(waiting, 5)
        monkeypatch.undo()
        assert serving.alive and (await infer(serving, "good"))[0].answer == "good: q"

    serve(test)


def test_without_its_thread_nobody_is_let_in():
    async def test():
        serving = Serving(Engine(), Limits())
        assert not serving.alive
        with pytest.raises(Closed, match="has stopped"):
            await infer(serving, "s")

    asyncio.run(test())


def test_who_waits_is_told_that_the_server_goes():
    async def test(serving, engine):
        first = await blocked(serving, engine)
        waiting = infer(serving, "s")
        await until(lambda: serving.waiting == 1)
        closing = asyncio.create_task(asyncio.to_thread(serving.__exit__))
        await asyncio.sleep(0.05)
        engine.go.set()
        assert (await first)[0].answer == "first: q"
        with pytest.raises(Closed, match="went down"):
            await waiting
        await closing
        with pytest.raises(Closed, match="is going down"):
            await infer(serving, "s")

    serve(test)


def test_limits_that_cannot_be():
    with pytest.raises(ConfigError, match=r"--limits\.queue=0 must be at least 1"):
        Limits(queue=0)
    limits = Limits(question=5, questions=2)
    limits.check_questions(["12345"])
    for questions, said in (
        (["123456"], "6 characters, more than 5"),
        (["a", " "], "is empty"),
        ([], "0 questions"),
        (["a"] * 3, "3 questions: expected 1 to 2"),
    ):
        with pytest.raises(DataError, match=said):
            limits.check_questions(questions)
