"""Peers on several machines, behind NATs and firewalls: how they find a way to each other, and what is said where there is none."""

import time

import pytest
from nat_harness import Peer, PeerError, Peers, dht, introduce
from netns import Internet, Nat, wait_until

from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("node"), needs("npm"), needs("ip"), needs("nft"), needs("namespaces")]
NBYTES = 1 << 20
HOPS = 4
"""So many routers more on the way: what is sent to open a NAT, and may not arrive, expires there (hyperdht gives it five)."""
KEY = "00" * 32
SECONDS_A_GIB = 600


@pytest.fixture(scope="module")
def internet():
    with Internet(delay=0.01, hops=HOPS) as made:
        yield made


@pytest.fixture(scope="module")
def bootstrap(internet):
    return dht(internet.host(5))


@pytest.fixture(scope="module")
def kept_peers(internet):
    return Peers(internet)


@pytest.fixture
def peers(kept_peers):
    yield kept_peers
    kept_peers.give_back()


@pytest.fixture
def behind(peers):
    return peers.behind


@pytest.fixture
def public(peers):
    return peers.public


@pytest.fixture(scope="module")
def lossy():
    with Internet(delay=0.02, loss=0.01) as made:
        yield made, dht(made.host(5))


def refused(call):
    with pytest.raises(PeerError) as raised:
        call()
    return raised.value.args


@pytest.mark.parametrize(
    ("here", "there"),
    [(Nat.PRESERVING, Nat.PRESERVING), (Nat.FIREWALL, Nat.PRESERVING), (Nat.ANSWERING, Nat.ANSWERING), (Nat.RANDOM, Nat.PRESERVING)],
    ids=lambda nat: nat.name.lower(),
)
def test_two_behind_nats_punch_a_hole(internet, bootstrap, behind, measured, here, there):
    caller, called = behind(here), behind(there)
    key = introduce(bootstrap, caller, called)
    assert caller.status()["randomized"] == (here is Nat.RANDOM)
    before = internet.path()["expired"]
    way = caller.connect(key=key, within=45)
    assert way["route"] == "punched"
    assert way["address"][0] != bootstrap[0][0]
    assert caller.push(stream=way["stream"], nbytes=NBYTES)["equal"]
    assert called.seen()[0]["route"] == "punched"
    if here is Nat.ANSWERING:  # whose router would have taken the port of what came too early
        assert internet.path()["expired"] > before
    measured(f"nat: {here.name} to {there.name}, 20 ms of round trip: punched in {way['seconds']:.2f} s")


def test_two_behind_the_same_nat_use_the_network_that_they_share(internet, bootstrap):
    router = internet.router(Nat.PRESERVING)
    inside = [router.host(), router.host()]
    caller, called = map(Peer, inside)
    way = caller.connect(key=introduce(bootstrap, caller, called))
    assert (way["route"], way["address"][0]) == ("direct", inside[1].address)
    assert caller.push(stream=way["stream"], nbytes=NBYTES)["equal"]


def test_one_in_public_is_reached_directly_and_reaches_the_other(bootstrap, behind, public):
    inside, outside = behind(Nat.RANDOM), public()
    key = introduce(bootstrap, inside, outside)
    assert outside.probe()
    assert not outside.status()["firewalled"]
    way = inside.connect(key=key)
    assert way["route"] == "direct"
    assert inside.push(stream=way["stream"], nbytes=NBYTES)["equal"]
    assert not inside.probe()
    inside.start(name="another", bootstrap=bootstrap)
    inside.listen(name="another")
    key = inside.start(name="third", bootstrap=bootstrap)
    inside.listen(name="third")
    assert outside.push(stream=outside.connect(key=key)["stream"], nbytes=NBYTES)["equal"]


@pytest.mark.parametrize("in_node", ["", "caller called", "relay", "called"])
def test_two_with_random_ports_are_relayed(bootstrap, behind, public, in_node, measured):
    relay = public(in_node="relay" in in_node)
    caller, called = (behind(Nat.RANDOM, in_node=who in in_node) for who in ("caller", "called"))
    through = relay.start(bootstrap=bootstrap, firewalled=False)
    relay.begin_relay()
    way = caller.connect(key=introduce(bootstrap, caller, called, through))
    assert way["route"] == "relayed"
    pushed = caller.push(stream=way["stream"], nbytes=NBYTES)
    assert pushed["equal"]
    assert called.seen()[0]["route"] == "relayed"
    if in_node != "relay":
        status = relay.relayed()
        assert (status["total"], status["dropped_nbytes"]) == (1, 0)
        assert status["nbytes"] > NBYTES
    measured(f"nat: relayed in {way['seconds']:.2f} s")


def test_without_a_relay_two_with_random_ports_are_told_to_use_one(bootstrap, behind):
    caller, called = behind(Nat.RANDOM), behind(Nat.RANDOM)
    key = introduce(bootstrap, caller, called)
    began = time.monotonic()
    name, message, _ = refused(lambda: caller.connect(key=key))
    assert name == "PeerUnreachableError"
    assert "use a relay" in message
    assert time.monotonic() - began < 5


def test_a_relayed_stream_moves_to_the_way_that_was_found_meanwhile(bootstrap, behind, public):
    relay, caller, called = public(), behind(Nat.RANDOM), behind(Nat.PRESERVING)
    through = relay.start(bootstrap=bootstrap, firewalled=False)
    relay.begin_relay(nbytes_per_second=1e6)
    way = caller.connect(key=(key := introduce(bootstrap, caller, called, through)))
    if way["route"] == "punched":  # quicker than the relay, for once: the next one has to wait for its turn to be punched
        way = caller.connect(key=key)
    stream = way["stream"]
    pushing = caller.begin("push", stream=stream, nbytes=64 * NBYTES)
    wait_until(lambda: relay.relayed()["nbytes"] > NBYTES / 4)
    wait_until(lambda: caller.route(stream=stream) == "punched", 50)
    assert caller.end(pushing)["equal"]
    assert called.seen()[0]["route"] == "punched"
    wait_until(lambda: relay.relayed()["pairs"] == 0)


def test_a_relay_serves_whom_it_admits(bootstrap, behind, public):
    relay, caller, called = public(), behind(Nat.RANDOM), behind(Nat.RANDOM)
    through = relay.start(bootstrap=bootstrap, firewalled=False)
    key = introduce(bootstrap, caller, called, through)
    relay.begin_relay(admit=[key])
    began = time.monotonic()
    assert refused(lambda: caller.connect(key=key, within=30))[0] == "PeerUnreachableError"
    assert time.monotonic() - began < 20
    assert relay.relayed()["total"] == 0


def test_a_relay_and_who_uses_it_need_no_relay_to_each_other(bootstrap, behind, public):
    relay, inside = public(), behind(Nat.RANDOM)
    through = relay.start(bootstrap=bootstrap, firewalled=False)
    relay.begin_relay()
    key = inside.start(bootstrap=bootstrap, relay_through=through)
    inside.listen()
    assert inside.connect(key=through)["route"] == "direct"
    way = relay.connect(key=key)  # which says to go through the relay, that is, through itself
    assert way["route"] == "direct"
    assert relay.push(stream=way["stream"], nbytes=NBYTES)["equal"]
    assert (relay.relayed()["waiting"], relay.relayed()["total"]) == (0, 0)


def test_a_relay_serves_for_as_long_and_as_fast_as_it_says_and_tells_the_end(bootstrap, behind, public):
    rate, relay, caller, called = 2e6, public(), behind(Nat.RANDOM), behind(Nat.RANDOM)
    through = relay.start(bootstrap=bootstrap, firewalled=False)
    relay.begin_relay(seconds=2.0, nbytes_per_second=rate)
    way = caller.connect(key=introduce(bootstrap, caller, called, through))
    began = time.monotonic()
    assert refused(lambda: caller.push(stream=way["stream"], nbytes=64 * NBYTES))[0] == "StreamLostError"
    seconds = time.monotonic() - began
    assert seconds < 10  # of silence it would have known after thirty
    status = relay.relayed()
    assert status["pairs"] == 0
    assert rate < status["nbytes"] < rate * (seconds + 1)


def test_without_udp_or_ipv4_it_is_said_and_what_is_local_works(internet, bootstrap):
    host = internet.host()
    host.run("ip -4 address flush dev uplink")
    blocked, modern = Peer(internet.router(Nat.NO_UDP).host()), Peer(host)
    began = time.monotonic()
    for peer, call in [(peer, peer.begin("start", bootstrap=bootstrap)) for peer in (blocked, modern)]:
        peer.end(call)
    assert time.monotonic() - began < 20
    for peer, call in [(peer, peer.begin("connect", key=KEY, within=10)) for peer in (blocked, modern)]:
        name, message, code = refused(lambda peer=peer, call=call: peer.end(call))
        assert (name, code) == ("PeerUnreachableError", "NO_NODES")
        assert "UDP" in message
        assert "IPv4" in message
    assert time.monotonic() - began < 30
    beside = []
    for number in range(3):
        blocked.start(name=f"local {number}", bootstrap=beside, host="127.0.0.1", ephemeral=False, firewalled=False)
        beside = beside or [["127.0.0.1", blocked.address(name="local 0")[1]]]
    key = blocked.start(name="called", bootstrap=beside)
    blocked.listen(name="called")
    blocked.start(name="caller", bootstrap=beside)
    assert blocked.push(stream=blocked.connect(name="caller", key=key)["stream"], nbytes=NBYTES)["equal"]
    for peer in (blocked, modern):
        peer.process.kill()


@pytest.mark.parametrize("mtu", [1500, 1280])
def test_streams_go_over_ipv6_through_routers(mtu, measured):
    with Internet(mtu=mtu, delay=0.01, loss=0.01) as internet:
        hosts = [internet.host(), internet.host()]
        ends = [Peer(host) for host in hosts]
        ports = [end.bind(host=host.address6) for end, host in zip(ends, hosts, strict=True)]
        for end, host, port in zip(ends, hosts[::-1], ports[::-1], strict=True):
            end.join(host=host.address6, port=port)
        first = ends[0].begin("bare", nbytes=4 * NBYTES)
        sent = [ends[1].bare(nbytes=NBYTES), ends[0].end(first)][::-1]
        assert [said["digest"] for said in sent] == [end.received() for end in ends[::-1]]
        assert [said["code"] for said in sent] == [None, None]
        assert 1200 < sent[0]["mtu"] <= mtu
        assert internet.path()["lost"] > 0
        measured(f"nat: IPv6, a link of {mtu} bytes on the way: packets of {sent[0]['mtu']}")


@pytest.mark.chaos
@pytest.mark.timeout(2 * SECONDS_A_GIB)
def test_row_103_bulk_through_a_path_that_delays_and_loses(chaos, lossy, measured):
    """Two behind NATs, 20 ms each way, 1 % lost: bytes right, and how fast; Holepunch's own in Node on the same path."""
    mebibytes, began, found = chaos.count(1024, 32), time.monotonic(), {}
    internet, bootstrap = lossy
    for who, in_node in (("Python", False), ("Node", True)):
        caller, called = (Peer(internet.router(Nat.PRESERVING).host(), in_node=in_node) for _ in range(2))
        way = caller.connect(key=introduce(bootstrap, caller, called))
        pushed = caller.end(caller.begin("push", stream=way["stream"], nbytes=mebibytes << 20), SECONDS_A_GIB)
        assert pushed["equal"]
        assert pushed["route"] == "punched"
        found[who] = (mebibytes << 20) / pushed["seconds"] / 1e6
        for peer in (caller, called):
            peer.process.kill()
    said = f"{mebibytes} MiB at 40 ms and 1 % loss: Python {found['Python']:.1f} MB/s, Node {found['Node']:.1f}"
    measured(f"nat: {said}")
    chaos.record(103, f"swarm: {said}, bytes right", time.monotonic() - began)


@pytest.mark.chaos
@pytest.mark.timeout(2 * SECONDS_A_GIB)
def test_row_103_three_hosts_two_of_them_behind_nats_and_a_holder_killed_half_way(chaos, lossy, measured):
    """One in public and one behind a NAT hold it, another behind a NAT fetches it, over 20 ms each way that lose 1 %."""
    count, began = chaos.count(1024, 48), time.monotonic()
    internet, bootstrap = lossy
    public, inside, fetching = Peer(internet.host()), *(Peer(internet.router(Nat.PRESERVING).host()) for _ in range(2))
    keys = [holder.start(bootstrap=bootstrap) for holder in (public, inside)]
    for holder in (public, inside):
        holder.hold(count=count)
    fetching.start(bootstrap=bootstrap)
    gathering = fetching.begin("gather", keys=keys, count=count)
    wait_until(lambda: fetching.so_far() >= count // 2, SECONDS_A_GIB)
    public.process.kill()
    gathered = fetching.end(gathering, SECONDS_A_GIB)
    assert sum(gathered["from"]) == count
    assert all(gathered["from"])
    assert gathered["routes"][1] == "punched"
    seconds = gathered["seconds"]
    said = f"{count} MiB from two holders, one of them killed half-way: {seconds:.1f} s, {count * 1.048576 / seconds:.1f} MB/s"
    measured(f"nat: {said}")
    chaos.record(103, f"swarm: {said}", time.monotonic() - began)
