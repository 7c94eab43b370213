"""Several machines on one: hosts, routers with NAT, the network between them, each in a network namespace of its own. It needs no root.

    with Internet(delay=0.02, loss=0.01) as internet:
        public = internet.host()
        laptop = internet.router(Nat.PRESERVING).host()
        laptop.popen([sys.executable, "program.py"])

Each namespace is held by a process that reads a pipe of ours. However this process ends, the pipes close with it, the holders end, and the
kernel takes back namespaces, interfaces and rules: nothing has a name in the system that could stay behind.

What goes from site to site passes `netns_path.py`, in the namespace of the network between them, if there is delay or loss: a router like
any other, so that addresses stay what they are. (The kernel's own netem is missing in many systems.)
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from enum import Enum
from pathlib import Path
from typing import Any, Self

PATH_PROGRAM = Path(__file__).with_name("netns_path.py")
SECONDS = 20
TABLE = 100
"""The route of what comes from a site, where the path is not the kernel's."""


class Nat(Enum):
    """What a router does to packets. None lets in what was not asked for, but `ANSWERING`, which says that nobody is there."""

    PRESERVING = "every remote sees the same port, which most homes have"
    RANDOM = "every remote sees another port: many firms, and mobile networks"
    ANSWERING = "as PRESERVING, but a packet that comes too early is answered, and takes the port: it must not arrive"
    FIREWALL = "public addresses inside"
    NO_UDP = "neither in nor out"


class Namespace:
    """One, and what runs in it."""

    def __init__(self, first: Namespace | None = None) -> None:
        """`first`: whose user namespace it belongs to, so that interfaces can be moved between them."""
        enter = [] if first is None else [*first.enter[:-1], "--user", "--preserve-credentials"]
        user = ["--user", "--map-root-user"] if first is None else []
        self._holder = subprocess.Popen(
            [*enter, "unshare", *user, "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if not self._holder.stdout.read(1):
            raise AssertionError("no network namespace could be made here")
        self.pid = self._holder.pid
        self.enter = ["nsenter", f"--target={self.pid}", "--user", "--preserve-credentials", "--net"]
        self._started: list[subprocess.Popen[Any]] = []
        self.run("ip link set lo up")

    def command(self, arguments: list[str]) -> list[str]:
        """The same, in here."""
        return [*self.enter, *arguments]

    def popen(self, arguments: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in here; it is killed, if it still runs, when the namespace goes."""
        self._started.append(subprocess.Popen(self.command(arguments), **options))
        return self._started[-1]

    def run(self, script: str) -> None:
        """Lines for the shell, each of which must work."""
        subprocess.run(self.command(["sh", "-ec", script]), check=True, timeout=SECONDS)

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait(SECONDS)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait(SECONDS)


class Host(Namespace):
    """A machine with one address of IPv4, or several, and one of IPv6 where its network has that."""

    def __init__(self, first: Namespace, address: str, gateway: str, others: tuple[str, ...] = ()) -> None:
        super().__init__(first)
        self.address, self.others = address, others
        self._gateway = gateway
        self.address6 = ""

    def up(self) -> None:
        """Its cable is there."""
        addresses = "".join(f"ip address add {address}/24 dev uplink\n" for address in (self.address, *self.others))
        self.run(f"{addresses}ip link set uplink up\nip route add default via {self._gateway}")


class Router(Namespace):
    """A site's: one address outside, many inside."""

    def __init__(self, internet: Internet, number: int, nat: Nat) -> None:
        super().__init__(internet)
        self.nat, self.address = nat, f"11.0.{number}.2"
        self._internet, self._count = internet, 0
        self.inside = f"11.1.{number}" if nat is Nat.FIREWALL else f"192.168.{number}"

    def up(self, gateway: str) -> None:
        self.run(
            f"ip address add {self.address}/24 dev uplink\nip link set uplink up\nip route add default via {gateway}\n"
            f"ip link add name lan type bridge\nip address add {self.inside}.1/24 dev lan\nip link set lan up\n"
            "echo 1 > /proc/sys/net/ipv4/ip_forward"
        )
        self.run(f"nft -f - <<'END'\n{_rules(self.nat)}\nEND")

    def host(self) -> Host:
        """A machine inside."""
        self._count += 1
        made = Host(self._internet, f"{self.inside}.{self._count + 1}", f"{self.inside}.1")
        self._internet.keep(made)
        _cable(made, self, f"port{self._count}")
        self.run(f"ip link set port{self._count} master lan up")
        made.up()
        return made


class Internet(Namespace):
    """The network between sites, where each has an address of its own: public ones, which nothing outside of here ever sees."""

    def __init__(self, *, mtu: int = 1500, **path: float) -> None:
        """`path`: how what goes from site to site fares, as `netns_path.py` takes it; nothing: as fast as it can. `mtu`: of that way."""
        super().__init__()
        self._within: list[Namespace] = []
        self._sites = 0
        self._path: subprocess.Popen[str] | None = None
        self.run("echo 1 > /proc/sys/net/ipv4/ip_forward\necho 1 > /proc/sys/net/ipv6/conf/all/forwarding")
        if path:
            self._begin_path(mtu, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in reversed(self._within):
            namespace.close()
        self.close()

    def keep(self, namespace: Namespace) -> None:
        """To be closed with the others."""
        self._within.append(namespace)

    def host(self, addresses: int = 1) -> Host:
        """A machine that everybody reaches, IPv6 too."""
        site = self._next_site()
        own = [f"11.0.{site}.{number + 2}" for number in range(addresses)]
        made = Host(self, own[0], f"11.0.{site}.1", tuple(own[1:]))
        self._connect(made, site)
        made.up()
        made.address6 = f"2a00:{site}::2"
        self.run(f"ip address add 2a00:{site}::1/64 dev site{site} nodad")
        made.run(f"ip address add {made.address6}/64 dev uplink nodad\nip route add default via 2a00:{site}::1")
        return made

    def router(self, nat: Nat) -> Router:
        """A site behind one."""
        site = self._next_site()
        made = Router(self, site, nat)
        self._connect(made, site)
        made.up(f"11.0.{site}.1")
        if nat is Nat.FIREWALL:
            self.run(f"ip route add {made.inside}.0/24 via {made.address}")
        return made

    def path(self, **changes: float) -> dict[str, int]:
        """Change how packets fare from now on; what became of those until now, counted."""
        if self._path is None:
            raise AssertionError("the path was made without delay and loss: there is nothing to change")
        self._path.stdin.write(json.dumps(changes) + "\n")
        self._path.stdin.flush()
        return json.loads(self._path.stdout.readline())

    def _next_site(self) -> int:
        self._sites += 1
        return self._sites

    def _connect(self, site: Namespace, number: int) -> None:
        self.keep(site)
        _cable(site, self, f"site{number}")
        self.run(f"ip address add 11.0.{number}.1/24 dev site{number}\nip link set site{number} up")
        if self._path is not None:
            self.run("".join(f"ip {family} rule add dev site{number} lookup {TABLE}\n" for family in ("-4", "-6")))

    def _begin_path(self, mtu: int, path: dict[str, float]) -> None:
        self.run(
            f"ip tuntap add path mode tun\nip link set path mtu {mtu} txqueuelen 10000 up\necho 0 > /proc/sys/net/ipv4/conf/all/rp_filter\n"
            f"ip route add default dev path table {TABLE}\nip -6 route add default dev path table {TABLE}"
        )
        self._path = self.popen(
            [sys.executable, str(PATH_PROGRAM), json.dumps(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._path.stdout.readline() == "ready\n"


def _cable(upper: Namespace, lower: Namespace, port: str) -> None:
    """Between the interface `uplink` of one and `port` of the other."""
    lower.run(f"ip link add name {port} type veth peer name uplink netns {upper.pid}")


def _rules(nat: Nat) -> str:
    sources = {Nat.FIREWALL: "accept", Nat.RANDOM: "oifname uplink masquerade fully-random"}
    return textwrap.dedent(
        f"""
        table ip nat {{
            chain source {{
                type nat hook postrouting priority srcnat
                {sources.get(nat, "oifname uplink masquerade")}
            }}
        }}
        table ip filter {{
            chain through {{
                type filter hook forward priority filter
                {"oifname uplink meta l4proto udp drop" if nat is Nat.NO_UDP else ""}
                iifname uplink ct state new drop
            }}
            chain in {{
                type filter hook input priority filter
                {"" if nat is Nat.ANSWERING else "iifname uplink ct state new drop"}
            }}
        }}
        """
    )


def wait_until(condition: Any, seconds: float = SECONDS) -> None:
    """Look again and again."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)
