"""What the tests of feeds do in a process of its own: as `engine_scenarios.py`."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
from engine_scenarios import engine, failure, main, say, told
from structlog.testing import capture_logs

from tether.errors import TetherError
from tether.manager.peering import own_feed, own_log
from tether.manager.peering.feed_content import content_of
from tether.manager.peering.feed_memory import load_memory, save_memory
from tether.manager.peering.feeds import FollowedFeed, Following, News, OwnFeed
from tether.manager.peering.handing_on import HandingOn, HandingOnSide
from tether.security.identity import Identity
from tether.store import Manifest, Repository, encode, signed_message
from tether.swarm.engine.engine import Engine
from tether.swarm.feeds import entries as feed_entries
from tether.swarm.feeds import log as feed_log
from tether.swarm.feeds.entries import Content, FeedModel
from tether.swarm.feeds.heads import Head, parse_head, sign_head
from tether.swarm.feeds.hyperbee import Hyperbee
from tether.swarm.feeds.state import FeedStates, Verdict
from tether.swarm.feeds.tree import FeedTree
from tether.types import ModelInfo

SECONDS = 10
LAB = Identity(bytes([50]) * 32)
INFO = ModelInfo("onnx", "onnx", (), (), batched=False, pure=True, code=False)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (of what is tested, nothing tells)
            await asyncio.sleep(0.005)


class Lab:
    """A catalog and its feed."""

    def __init__(self, node: Engine, folder: Path, *, admits: Callable[[str], bool] = lambda _: True) -> None:
        self.node, self.folder, self._admits = node, folder, admits
        self.repository = Repository.open(folder / "store", own=LAB.public)
        self.ahead = 0.0
        """Of its clock."""
        self.feed = self.another_feed()

    def another_feed(self, name: str = "feed") -> OwnFeed:
        return OwnFeed(self._engine, self.repository, LAB, self.folder / name, self._admits, clock=lambda: time.time() + self.ahead)

    async def _engine(self) -> Engine:
        return self.node

    async def publish(self, number: int, name: str = "net", **options: Any) -> None:
        manifest = Manifest(framework="onnx", entry="m", info=INFO, arrays=(self.repository.add_bytes("m", b"%d " % number * 100),))
        data = encode(manifest)
        self.repository.publish(name, data, LAB.public, LAB.sign(signed_message(data)), **options)
        await self.feed.changed()

    async def alias(self, version: int) -> None:
        self.repository.set_alias("net", "prod", version)
        await self.feed.changed()

    async def head(self) -> Head:
        return parse_head(base64.b64decode((await self.feed.answer())["head"]), LAB.public)

    async def aclose(self) -> None:
        await self.feed.aclose()
        self.repository.close()


@contextlib.asynccontextmanager
async def lab(node: Engine, folder: Path, **options: Any) -> AsyncIterator[Lab]:
    opened = Lab(node, folder, **options)
    try:
        yield opened
    finally:
        await opened.aclose()


class Follower:
    """Follows one lab, or whoever `of` is at the time."""

    def __init__(self, node: Engine, folder: Path, of: OwnFeed, bound: Content | None = None) -> None:
        self.of, self.node = of, node
        self.news: asyncio.Queue[News] = asyncio.Queue()
        self.answers: dict[str, str] | None = None
        """What is answered in place of what the lab says."""
        self.ahead = 0.0
        """Of its clock."""
        following = Following(
            self._engine,
            self._ask,
            lambda _, news: self.news.put_nowait(news),
            lambda: bound or Content(),
            FeedStates(folder / "states"),
            folder / "copies",
            clock=lambda: time.time() + self.ahead,
        )
        self.feed = FollowedFeed(LAB.public, following)
        self.feed.start()

    async def _engine(self) -> Engine:
        return self.node

    async def _ask(self) -> dict[str, str]:
        return self.answers or await self.of.answer()

    async def any(self) -> News:
        news = await asyncio.wait_for(self.news.get(), SECONDS)
        await self.feed.imported(news)
        return news

    async def next(self) -> News:
        """What was not known before."""
        while (news := await self.any()).verdict is Verdict.SAME:
            pass
        return news

    async def problem(self) -> list[str]:
        """The next one, in words."""
        await until(lambda: self.feed.problem is not None)
        return [type(self.feed.problem).__name__, str(self.feed.problem), *map(str, self.feed.problem.args[1:2])]


@contextlib.asynccontextmanager
async def follower(node: Engine, folder: Path, of: OwnFeed, **options: Any) -> AsyncIterator[Follower]:
    opened = Follower(node, folder, of, **options)
    try:
        yield opened
    finally:
        await opened.feed.aclose()


def said(content: Content) -> dict[str, Any]:
    return {name: [sorted(model.versions), dict(model.aliases), model.next] for name, model in content.models.items()}


@contextlib.asynccontextmanager
async def two_nodes(bootstrap: list) -> AsyncIterator[tuple[Engine, Engine, list]]:
    """With what is logged."""
    with capture_logs() as logs:
        async with engine(160, bootstrap) as one, engine(161, bootstrap) as other:
            try:
                yield one, other, logs
            except BaseException:
                print(*logs, sep="\n", file=sys.stderr)
                raise


def loud(logs: list) -> list[str]:
    """What was said so far, once each."""
    return list(dict.fromkeys(entry["event"] for entry in logs if entry["log_level"] == "warning"))


async def followed(bootstrap: list, folder: str) -> dict:
    """A catalog is said, read by Node, followed here; a moved alias comes at once; a restart brings only the difference."""
    root = Path(folder)
    async with two_nodes(bootstrap) as (one, other, _), lab(one, root / "lab") as own:
        await own.publish(1)
        assert not own.feed.is_begun
        await own.publish(2, alias=["prod"])
        async with follower(other, root / "f", own.feed) as there:
            first = await there.next()
            say(await own.feed.answer() | {"publisher": LAB.public})
            await told()
            before = (await own.head()).length
            began = asyncio.get_running_loop().time()
            await own.alias(1)
            moved = await there.next()
            seconds = asyncio.get_running_loop().time() - began
            own.repository.delete_version("net", 2)
            await asyncio.gather(own.publish(3), own.publish(4), *(own.feed.changed() for _ in range(20)))
            blocks = (await own.head()).length - before
            while (last := await there.next()).length < (await own.head()).length:
                pass
        async with follower(other, root / "f", own.feed) as there:
            known = await there.any()
            await own.publish(5, name="other")
            again = await there.any()
            state = there.feed.state
        catalog = content_of(own.repository.snapshot().models, LAB.public)
        return {
            "first": [first.verdict.value, said(first.content)],
            "moved": [moved.verdict.value, said(moved.content), list(moved.changed)],
            "seconds": seconds,
            "blocks": blocks,
            "last": [last.verdict.value, said(last.content)],
            "again": [again.verdict.value, list(again.changed)],
            "known before": [known.verdict.value, known.content == last.content, list(known.changed)],
            "same": again.content == catalog,
            "known": state.known == await own.head(),
            "digests": {name: [version.digest for version in model.versions.values()] for name, model in first.content.models.items()},
            "files": sorted(path.name for path in (root / "f" / "copies").iterdir()) == [state.known.core],
        }


async def begun_anew(bootstrap: list, folder: str) -> dict:
    """The log loses its end, then all is lost, then what was remembered is damaged: followers see new eras, and the same catalog."""
    root, seen = Path(folder), []
    async with two_nodes(bootstrap) as (one, other, logs), lab(one, root / "lab") as own:
        await own.publish(1, alias=["prod"])
        await own.publish(2)
        async with follower(other, root / "f", own.feed) as there:
            await there.next()
            eras = [(await own.head()).era]
            for harm in (_tear_the_log, _lose_everything, _damage_the_memory):
                await own.feed.aclose()
                harm(root / "lab" / "feed")
                own.ahead += 2  # an era has another second
                own.feed = there.of = own.another_feed()
                there.feed.nudge()
                news = await there.next()
                eras.append((await own.head()).era)
                seen.append([news.verdict.value, said(news.content), list(news.changed)])
            await own.publish(3)
            went_on = (await there.next()).verdict.value
            folders = [sorted(path.name for path in (root / where).iterdir() if path.is_dir()) for where in ("lab/feed", "f/copies")]
            kept = folders == [[str(eras[-1])], [there.feed.state.known.core]]
        return {"seen": seen, "grows": eras == sorted(set(eras)), "went_on": went_on, "kept": kept, "loud": loud(logs)}


def _tear_the_log(folder: Path) -> None:
    (log,) = folder.glob("*/oplog")
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 3)


def _lose_everything(folder: Path) -> None:
    shutil.rmtree(folder)


def _damage_the_memory(folder: Path) -> None:
    (folder / "own.json").write_bytes(b"{")


async def killed(bootstrap: list, folder: str) -> dict:
    """A process that dies between writing and signing, then one that dies as it begins: the next one goes on, and followers see no fork."""
    root = Path(folder)
    values = {"bootstrap": bootstrap, "folder": folder}
    async with two_nodes(bootstrap) as (one, other, logs):
        async with lab(one, root / "lab") as own:
            await own.publish(1)
            async with follower(other, root / "f", own.feed) as there:
                await there.next()
            before = await own.head()
        died = await asyncio.to_thread(_run, "dies", values)
        async with lab(one, root / "lab") as own:
            after = await own.head()
            async with follower(other, root / "f", own.feed) as there:
                news = await there.next()
        shutil.rmtree(root / "lab" / "feed")
        await until(lambda: int(time.time()) > after.era)  # an era has another second
        born = await asyncio.to_thread(_run, "dies", values)
        begun = [path.name for path in (root / "lab" / "feed").iterdir() if path.is_dir()]
        async with lab(one, root / "lab") as own:
            last = await own.head()
        return {
            "died": [died, born],
            "era": [after.era == before.era, after.core == before.core, last.era == int(begun[0]), last.length == 1 + 3],
            "grew": after.length - before.length,
            "news": [news.verdict.value, said(news.content)],
            "loud": loud(logs),
        }


def _run(name: str, values: dict[str, Any]) -> int:
    return subprocess.run([sys.executable, __file__, name, json.dumps(values)], check=False, stderr=subprocess.DEVNULL).returncode


async def dies(bootstrap: list, folder: str) -> None:
    """At the next signature."""

    def end(*_: Any) -> None:
        os._exit(9)

    own_feed.sign_head = end
    async with engine(162, bootstrap) as node, lab(node, Path(folder) / "lab") as own:
        await own.publish(2)
        await own.feed.answer()


@contextlib.asynccontextmanager
async def stolen(bootstrap: list, root: Path, own: Lab) -> AsyncIterator[Lab]:
    """Somebody has a copy of all that the lab has, its key as well, and serves it elsewhere."""
    await own.feed.answer()
    await own.feed.aclose()
    shutil.copytree(root / "lab" / "feed", root / "thief" / "feed")
    shutil.copytree(root / "lab" / "store", root / "thief" / "store")
    memory = root / "thief" / "feed" / "own.json"
    save_memory(memory, msgspec.structs.replace(load_memory(memory, LAB.public), server="ee" * 32))
    async with engine(165, bootstrap) as node, lab(node, root / "thief") as thief:
        yield thief


async def forked(bootstrap: list, folder: str) -> dict:
    """A second history under the stolen key, longer, shorter, of one length; then an old head: refused, remembered, forgiven."""
    root, seen = Path(folder), {}
    feed_log._REACH = 1.0
    async with two_nodes(bootstrap) as (one, other, logs), lab(one, root / "lab") as own:
        await own.publish(1)
        old = await own.feed.answer()
        async with stolen(bootstrap, root, own) as thief, follower(other, root / "f", own.feed) as there:
            first = await there.next()
            await own.publish(2)
            known = await there.next()
            for number in (7, 8):
                await thief.publish(number)
            there.of = thief.feed
            there.feed.nudge()
            seen["longer"] = await there.problem()
            seen["content"] = there.feed.content == known.content
            seen["quiet"] = there.news.empty()
        async with follower(other, root / "f", own.feed) as there:
            seen["restarted"] = await there.problem()
            await there.feed.forgive()
            await own.publish(3)
            seen["forgiven"] = (await there.next()).verdict.value
            there.answers = old
            there.feed.nudge()
            seen["old"] = await there.problem()
            there.answers = None
            there.feed.nudge()
            await own.publish(4)
            after = await there.next()
            seen["goes on"] = [after.verdict.value, there.feed.state.rollbacks > 0]
            head = parse_head(base64.b64decode((await own.feed.answer())["head"]), LAB.public)
            fork = sign_head(LAB, Head(LAB.public, head.core, head.era, head.length + 1, 1, "ab" * 32, head.began, head.signed))
            seen["heard"] = (await there.feed.heard(fork, "cd" * 32)).value
            there.feed.nudge()
            seen["cut"] = await there.problem()
        return seen | {"first": first.verdict.value, "loud": loud(logs)}


class Meeting:
    """Two followers that hand on what they have; counted."""

    def __init__(self, *followers: Follower) -> None:
        self.asked = 0
        self.sides = [HandingOn(self._side(number, each)) for number, each in enumerate(followers)]

    def _side(self, number: int, follower: Follower) -> HandingOnSide:
        async def ask(_: str, value: bytes) -> bytes:
            self.asked += 1
            return await self.sides[1 - number].answer(f"{number:064x}", value)

        return HandingOnSide(lambda: {LAB.public: follower.feed}, lambda: {f"{1 - number:064x}"}, ask)


async def met(bootstrap: list, folder: str, ours: int, theirs: int) -> dict:
    """The thief shows one follower so many versions, the lab so many others to another one; then the two meet."""
    root = Path(folder)
    feed_log._REACH = 1.0
    async with two_nodes(bootstrap) as (one, other, logs), engine(166, bootstrap) as third, lab(one, root / "lab") as own:
        await own.publish(1)
        async with stolen(bootstrap, root, own) as thief:
            for number in range(ours):
                await own.publish(10 + number)
            for number in range(theirs):
                await thief.publish(20 + number)
            async with follower(other, root / "f", own.feed) as here, follower(third, root / "g", thief.feed) as there:
                before = [(await each.next()).content for each in (here, there)]
                meeting = Meeting(here, there)
                await meeting.sides[0].look()
                problems = [await each.problem() for each in (here, there)]
                asked = meeting.asked
                await meeting.sides[0].look()
                await meeting.sides[1].look()
        return {
            "problems": problems,
            "kept": [here.feed.content, there.feed.content] == before,
            "asked": [asked, meeting.asked],
            "loud": [entry["event"] for entry in logs].count("a feed was refused"),
        }


async def handed_on(bootstrap: list, folder: str) -> dict:
    """One follower is behind and hears of news from the other: it asks, and nothing is held against anybody."""
    root = Path(folder)
    async with two_nodes(bootstrap) as (one, other, logs), engine(166, bootstrap) as third, lab(one, root / "lab") as own:
        await own.publish(1)
        async with follower(other, root / "f", own.feed) as here, follower(third, root / "g", own.feed) as there:
            await here.next()
            await there.next()
            there.answers = await own.feed.answer()  # it is told nothing new, for now
            await there.feed._copies.aclose()
            for number in (2, 3):
                await own.publish(number)
                await here.next()
            meeting, behind = Meeting(here, there), there.feed.state.known
            there.answers = None
            await meeting.sides[1].look()
            await meeting.sides[0].look()
            news = await there.next()
            asked = meeting.asked
            for side in (*meeting.sides, *meeting.sides):
                await side.look()
            return {
                "behind": behind.length < news.state.known.length,
                "same": there.feed.state.known == here.feed.state.known,
                "rollbacks": [each.feed.state.rollbacks for each in (here, there)],
                "asked": [asked, meeting.asked],
                "loud": loud(logs),
                "nonsense": [
                    await failure(meeting.sides[0].answer("cd" * 32, value))
                    for value in (
                        b"[]",
                        json.dumps({"publisher": LAB.public, "head": "?"}).encode(),
                        b'{"publisher": "%s"}' % LAB.public.encode(),
                    )
                ],
                "not followed": json.loads(await meeting.sides[0].answer("cd" * 32, b'{"publisher": "ab", "head": ""}')),
            }


async def stolen_era(bootstrap: list, folder: str) -> dict:
    """The thief begins a new era: with less, it contradicts; with all, it is found out when the lab signs once more."""
    root, seen = Path(folder), {}
    async with two_nodes(bootstrap) as (one, other, logs), lab(one, root / "lab") as own:
        await own.publish(1)
        await own.publish(2)
        async with stolen(bootstrap, root, own) as thief, follower(other, root / "f", own.feed) as there:
            await there.next()
            await thief.feed.aclose()
            shutil.rmtree(root / "thief" / "feed")
            thief.ahead = 5.0  # an era has another second
            await thief.publish(7)
            there.of = thief.feed
            there.feed.nudge()
            seen["era"] = (await there.next()).verdict.value
            own.ahead = there.ahead = 3600.0
            there.of = own.feed
            there.feed.nudge()
            seen["found out"] = await there.problem()
        async with follower(other, root / "g", own.feed) as there:
            there.ahead = 3600.0
            before = await there.next()
            own.repository.delete_version("net", 1)
            await own.feed.changed()
            deleted = await there.next()
            await thief_with_less(one, root / "less")
            async with lab(one, root / "less") as less:
                less.ahead = 7200.0
                there.ahead = 7200.0
                there.of = less.feed
                there.feed.nudge()
                seen["less"] = await there.problem()
                seen["kept"] = there.feed.content == deleted.content != before.content
                await there.feed.forgive()
                accepted = await there.next()
                seen["accepted"] = [accepted.verdict.value, said(accepted.content)]
        bound = Content({"net": FeedModel(3, {2: accepted.content.models["net"].versions[1]})})
        async with follower(other, root / "h", own.feed, bound=bound) as there:
            there.ahead = 3600.0
            seen["bound"] = await there.problem()
        return seen | {"loud": loud(logs)}


async def thief_with_less(node: Engine, folder: Path) -> None:
    async with lab(node, folder) as less:
        await less.publish(8)


async def admitted(bootstrap: list, folder: str) -> dict:
    """Who may not follow gets nothing though it knows the keys; who may no more is cut off at once; a new core is for those who ask."""
    root = Path(folder)
    feed_log._REACH = 1.0
    allowed: set[str] = set()
    async with two_nodes(bootstrap) as (one, other, _), lab(one, root / "lab", admits=lambda key: key in allowed) as own:
        await own.publish(1)
        async with follower(other, root / "f", own.feed) as there:
            refused = await there.problem()
            allowed.add(other.public_key.hex())
            there.feed.nudge()
            await there.next()
            keys = await own.feed.answer()
            say(keys)
            admit = await told()
            allowed.add(admit)
            say(None)
            await told()
            copy = await there.feed._copies.of(keys["core"])
            began = asyncio.get_running_loop().time()
            allowed.clear()
            await own.feed.cut(other.public_key.hex())
            await until(lambda: not copy.is_live)
            cut = asyncio.get_running_loop().time() - began
            await own.publish(2)
            still_refused = await there.problem()
            nothing = there.news.empty()
            allowed.add(other.public_key.hex())
            await own.feed.renew()
            there.feed.nudge()
            news = await there.next()
        return {
            "refused": refused[0],
            "cut": cut,
            "still": still_refused[0],
            "nothing": nothing,
            "news": [news.verdict.value, said(news.content)],
            "other core": (await own.feed.answer())["core"] != keys["core"],
        }


async def hostile(bootstrap: list, feeds: dict) -> dict:
    """Logs that somebody made by hand: read, or refused, and nothing hangs."""
    found = {}
    async with engine(163, bootstrap) as node:
        for name, (core, server) in feeds.items():
            with tempfile.TemporaryDirectory() as folder:
                bee = await Hyperbee.open(node, Path(folder), key=bytes.fromhex(core), whole=False)
                head = await bee.follow(bytes.fromhex(server))
                try:
                    read = await asyncio.wait_for(feed_log.read_log(bee, FeedTree(), head.length), SECONDS)
                    assert read.tree.root() == head.digest.hex()
                    found[name] = [[change.key, change.value and change.value.decode()] for change in read.sound().changes]
                except TetherError as error:
                    found[name] = [type(error).__name__, str(error)]
                await bee.close()
    return found


async def damaged_copies(bootstrap: list, folder: str) -> list:
    """What lies here of another's feed was altered, or is gone: nothing of it is believed, and it is fetched again."""
    root, seen = Path(folder), []
    async with two_nodes(bootstrap) as (one, other, logs), lab(one, root / "lab") as own:
        await own.publish(1)
        async with follower(other, root / "f", own.feed) as there:
            before = await there.next()
        for number, harm in enumerate((_alter, shutil.rmtree), 2):
            (copy,) = (root / "f" / "copies").iterdir()
            harm(copy)
            await own.publish(number)
            async with follower(other, root / "f", own.feed) as there:
                news = await there.next()
                right = content_of(own.repository.snapshot().models, LAB.public) == news.content
                seen.append([news.verdict.value, right, news.content != before.content])
        shutil.rmtree(root / "f" / "copies")
        async with follower(other, root / "f", own.feed) as there:
            again = await there.any()
        return [*seen, [again.verdict.value, again.content == news.content, list(again.changed)], loud(logs)]


def _alter(copy: Path) -> None:
    """A digit of a digest, in a block that still is a good entry."""
    data = bytearray((copy / "data").read_bytes())
    at = data.index(b'"digest":"') + 15
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    (copy / "data").write_bytes(data)


async def another_wrote(bootstrap: list, folder: str) -> dict:
    """A manager that wrote, followed another one and writes again does not go on with its feed: the other one signed one, too."""
    root = Path(folder)
    async with two_nodes(bootstrap) as (one, other, logs), lab(one, root / "lab") as own:
        own.repository.begin_term(1)
        await own.publish(1)
        eras = [(await own.head()).era]
        async with follower(other, root / "f", own.feed) as there:
            await there.next()
            for term in (2, 4):
                await own.feed.aclose()
                if term == 4:
                    own.repository.mirror(3, own.repository.snapshot())
                    own.ahead = 2.0  # an era has another second
                own.repository.begin_term(term)
                own.feed = there.of = own.another_feed()
                await own.publish(term)
                eras.append((await own.head()).era)
                there.feed.nudge()
                verdict = (await there.next()).verdict.value
        return {"restart": eras[1] == eras[0], "another": eras[2] > eras[0], "verdict": verdict, "loud": loud(logs)}


async def unsayable(bootstrap: list, folder: str) -> dict:
    """What followers would refuse is not written; what is there stays, and the lab is told."""
    root = Path(folder)
    async with two_nodes(bootstrap) as (one, other, logs), lab(one, root / "lab") as own:
        await own.publish(1)
        async with follower(other, root / "f", own.feed) as there:
            await there.next()
            before = await own.feed.answer()
            feed_entries.MAX_VERSIONS = 1
            await own.publish(2)
            problem = [type(own.feed.problem).__name__, str(own.feed.problem)]
            after = await own.feed.answer()
            feed_entries.MAX_VERSIONS = 100
            await own.feed.changed()
            news = await there.next()
            feed_entries.MAX_VERSIONS = 1
            empty = own.another_feed("empty")
            refused = await failure(empty.answer())
            await empty.aclose()
            feed_entries.MAX_VERSIONS = 100
            own_log.MAX_BLOCKS = 4
            await own.publish(3)
            full = await there.next()
        return {
            "problem": problem,
            "same": before == after,
            "mended": [said(news.content), own.feed.problem is None],
            "refused": refused,
            "full": [full.verdict.value, said(full.content)],
            "loud": loud(logs),
        }


async def engine_again(bootstrap: list, folder: str) -> dict:
    """The node is replaced by another one: feeds go on by the new one."""
    root = Path(folder)
    async with two_nodes(bootstrap) as (one, other, _), lab(one, root / "lab") as own:
        await own.publish(1)
        async with follower(other, root / "f", own.feed) as there:
            await there.next()
            await one.close()
            async with engine(164, bootstrap) as again:
                own.node = again
                await own.publish(2)
                there.feed.nudge()
                news = await there.next()
                era = (await own.head()).era
                await own.feed.aclose()
        return {"news": [news.verdict.value, said(news.content)], "same": era == news.state.known.era}


if __name__ == "__main__":
    main(globals())
