"""The Python half of the interpreter, without one: the bundle's functions do nothing."""

import asyncio
from collections import defaultdict

import pytest

from tether.swarm.engine.host import Host


async def test_who_is_cancelled_while_the_last_node_goes_is_told_so():
    """Else a manager that is ended in that turn goes on for ever: nobody cancels it twice."""
    host = Host(lambda _: (defaultdict(lambda: lambda: None), []))
    host.use(asyncio.get_running_loop())
    host.add(1, None)
    await asyncio.sleep(0)
    removing = asyncio.create_task(host.remove(1))
    await asyncio.sleep(0)
    removing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await removing
    assert not any(task.get_name() == "swarm-interfaces" for task in asyncio.all_tasks())
