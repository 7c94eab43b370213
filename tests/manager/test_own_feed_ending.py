"""The end of a lab's own feed."""

import asyncio

from tether.manager.peering import own_feed
from tether.manager.peering.own_feed import OwnFeed
from tether.security.identity import Identity


class SilentServer:
    """Of a feed, where nobody answers any more."""

    async def aclose(self):
        await asyncio.Event().wait()


async def test_a_feed_that_nobody_hears_to_be_taken_back_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(own_feed, "_GOODBYE", 0.01)
    feed = OwnFeed(None, None, Identity(bytes(32)), tmp_path, lambda _: True)
    feed._server = SilentServer()
    async with asyncio.timeout(10):
        await feed.aclose()
