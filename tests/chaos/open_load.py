"""Clients that ask at their times, whatever becomes of those before; and a link between two processes that can be cut."""

import asyncio
import contextlib
import itertools
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from chaos_lab import PROMPT, Client

PATIENCE = 10.0
"""Seconds of a request's deadline."""


@dataclass(frozen=True)
class Asked:
    """One request: when it was due, how long it took, what came of it."""

    at: float
    seconds: float
    status: int | str
    answer: float | str
    expected: float

    @property
    def is_wrong(self):
        return self.status == 200 and self.answer != self.expected


class Caller(Client):
    """A connection to one door of the lab."""

    def __init__(self, url):
        self.address = urlsplit(url)
        self.reader = self.writer = None

    @property
    def is_over(self):
        """Whether the door hung up, while nothing was asked."""
        return self.writer is not None and self.reader.at_eof()


class OpenLoad(threading.Thread):
    """So many requests a second, in turn to each of the doors, each for another number: `echo` gives it back."""

    model = "echo"

    def __init__(self, *doors, rate=50):
        super().__init__(daemon=True)
        self.doors, self.rate = doors, rate
        self.asked, self.surplus, self.again = [], [], 0
        self.done = threading.Event()
        self._idle = {door: [] for door in doors}

    @property
    def failed(self):
        return [each for each in self.asked if each.status != 200]

    @property
    def wrong(self):
        return [each for each in self.asked if each.is_wrong]

    @property
    def slowest(self):
        return max(each.seconds for each in self.asked)

    def quantile(self, share):
        seconds = sorted(each.seconds for each in self.asked)
        return seconds[int(share * (len(seconds) - 1))]

    def run(self):
        asyncio.run(self._all())

    async def _all(self):
        begun, doors, going = time.monotonic(), itertools.cycle(self.doors), set()
        for number in itertools.count(1):
            await asyncio.sleep(max(0.0, begun + number / self.rate - time.monotonic()))
            if self.done.is_set():
                break
            task = asyncio.create_task(self._one(next(doors), number / 1e6))
            going.add(task)
            task.add_done_callback(going.discard)
        await asyncio.gather(*going)
        for caller in itertools.chain.from_iterable(self._idle.values()):
            self.surplus.append(await caller.aclose())

    async def _one(self, door, number):
        begun = time.monotonic()
        try:
            status, answer = await self._answer(door, number)
        except OSError as error:
            status, answer = type(error).__name__, str(error)
        self.asked.append(Asked(begun, time.monotonic() - begun, status, answer, number))

    async def _answer(self, door, number):
        """Of the next door, where one is shut: it got nothing. Raises: OSError: the connection ended before the answer.

        Of one that was used before another one is tried, as HTTP's clients do: it may have ended while nothing was asked (RFC 9112, 9.3.1).
        """
        for each in sorted(self.doors, key=lambda other: other != door):
            caller = await self._caller(each)
            is_used = caller.writer is not None
            try:
                status, answer, _ = await caller.ask(self.model, number, PATIENCE)
            except ConnectionRefusedError:
                continue
            except OSError:
                await caller.aclose()
                if not is_used:
                    raise
                self.again += 1
                return await self._answer(each, number)
            self._idle[each].append(caller)
            return status, answer
        return "no door", ""

    async def _caller(self, door):
        while self._idle[door]:
            caller = self._idle[door].pop()
            if not caller.is_over:
                return caller
            await caller.aclose()
        return Caller(door)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join(2 * PROMPT)


class Link(threading.Thread):
    """Carries TCP from a port of its own to another one. A direction that is cut loses nothing: what was sent comes when it is healed."""

    def __init__(self, port=None):
        super().__init__(daemon=True)
        self.target = port
        self.port = None
        self._begun = threading.Event()

    def run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._there, self._back = asyncio.Event(), asyncio.Event()
        self._there.set()
        self._back.set()
        self._going = set()
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._begun.set()
        await self._over.wait()
        server.close()
        for task in self._going:
            task.cancel()
        await asyncio.gather(*self._going, return_exceptions=True)

    async def _carry(self, reader, writer):
        task = asyncio.current_task()
        self._going.add(task)
        task.add_done_callback(self._going.discard)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, self._there))
                group.create_task(self._pump(far_reader, writer, self._back))
        except* OSError:
            pass
        finally:
            writer.transport.abort()
            far_writer.transport.abort()

    async def _pump(self, reader, writer, is_open):
        while data := await reader.read(1 << 16):
            await is_open.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    def reset(self):
        """Every connection ends."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._going])

    def cut(self, *, there=True, back=True):
        """The way to the target, and the way from it; what is not cut is open afterwards."""
        for gate, closed in ((self._there, there), (self._back, back)):
            self._loop.call_soon_threadsafe(gate.clear if closed else gate.set)

    def heal(self):
        self.cut(there=False, back=False)

    def __enter__(self):
        self.start()
        assert self._begun.wait(PROMPT)
        return self

    def __exit__(self, *_):
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._over.set)
        self.join(PROMPT)
