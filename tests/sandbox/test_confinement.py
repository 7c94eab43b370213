"""What a process can not do any more once it is confined."""

import errno
import subprocess
import sys

import pytest

from tether.sandbox.confinement import missing


def confined(rules, *lines):
    """What a process prints that takes these rules on itself first."""
    program = ["from tether.sandbox.confinement import Confinement, confine", f"confine(Confinement({rules}))", *lines]
    return subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=True, timeout=60).stdout


OPEN = """
import socket
def tried(*arguments):
    try:
        socket.socket(*arguments).close()
    except OSError as error:
        return error.errno
    return 0
"""


@pytest.mark.skipif("network" in missing(), reason="needs Linux on x86-64 or arm64")
def test_only_sockets_that_lead_nowhere_can_be_opened():
    """SMC (43) finds its way over TCP, TIPC (30) and RDS (21) to other machines, Bluetooth (31) to other devices."""
    far = confined("network=False", OPEN, "print({tried(family, socket.SOCK_STREAM) for family in (2, 10, 17, 21, 30, 31, 40, 43)})")
    assert far.strip() == f"{{{errno.EACCES}}}"
    near = confined("network=False", OPEN, "print(tried(socket.AF_UNIX), tried(socket.AF_NETLINK, socket.SOCK_RAW))")
    assert near.split() == ["0", "0"]
    assert confined("network=True", OPEN, "print(tried(socket.AF_INET))").strip() == "0"


@pytest.mark.skipif("files" in missing(), reason="needs Linux 5.13 with Landlock")
def test_a_folder_that_is_not_there_opens_no_other(tmp_path):
    mine, others = tmp_path / "mine", tmp_path / "others"
    mine.mkdir()
    write = [f"for folder in {str(mine)!r}, {str(others)!r}:", "    try: open(folder + '/new', 'w').close(); print('wrote')"]
    others.mkdir()
    rules = f"writable=[{str(tmp_path / 'gone')!r}, {str(mine)!r}]"
    assert confined(rules, *write, "    except PermissionError: print('refused')").split() == ["wrote", "refused"]
