"""What `tether up` says of relays reaches the manager, and a wrong address is said before anything is started."""

import asyncio

import pytest

import tether
from tether.config import DataFolder
from tether.errors import ConfigError
from tether.lab.supervisor import Supervisor, UpSettings
from tether.security.addresses import Address
from tether.security.identity import Identity

RELAY = str(Address(Identity(b"somebody" * 4).public))


@pytest.mark.parametrize(
    ("wished", "options"),
    [
        ({}, []),
        ({"relay": True}, ["--relay"]),
        ({"relay_through": RELAY}, ["--relay-through", RELAY]),
        ({"relay": True, "relay_through": RELAY, "swarm": False}, ["--no-swarm"]),
    ],
)
def test_the_manager_is_told(tmp_path, wished, options):
    supervisor = Supervisor(UpSettings(DataFolder(tmp_path).create(), gateway=False, **wished))
    assert supervisor._swarm_options() == options
    asyncio.run(supervisor.stop())


def test_an_address_that_is_none_starts_nothing(tmp_path):
    with pytest.raises(ConfigError, match="relay-through"):
        tether.up(data=tmp_path, relay_through=RELAY[:-1])
    assert not (tmp_path / "store").exists()
