"""What a hostile or broken model may do, as functions for the sandbox to call."""

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path

from tether.errors import ChunkMissingError


def double(number):
    return 2 * number


def sleep_forever(_argument):
    time.sleep(3600)


def spin_without_the_interpreter(_argument):
    ctypes.CDLL(None).pause()  # ctypes lets go of the GIL; what counts is that no Python code runs any more


def spin(_argument):
    while True:
        pass


def eat(nbytes):
    return len(eaten(nbytes))


def eaten(nbytes):
    held = bytearray(nbytes)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    return held


def eat_in_children(nbytes):
    for _ in range(4):
        if os.fork() == 0:
            held = eaten(nbytes)  # kept: who gives it back at once may not have it at any look
            time.sleep(3600)
            del held
    time.sleep(3600)


def eat_shared(nbytes):
    """Shared memory, which RLIMIT_DATA does not count."""
    import mmap

    held = mmap.mmap(-1, nbytes)
    for at in range(0, nbytes, 1 << 12):
        held[at] = 1
    time.sleep(3600)


def crash(_argument):
    ctypes.string_at(0)


def kill_itself(number):
    os.kill(os.getpid(), number)


def leave(status):
    os._exit(status)


def flood(nbytes):
    line = "x" * 99 + "\n"
    for _ in range(nbytes // 100):
        sys.stdout.write(line)
    sys.stderr.write("the very last line\n")
    sys.stdout.flush()
    sys.exit("enough")


def leave_a_child_behind(file):
    """One that has left the session, so that no kill of the process group finds it."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path(file).write_text(str(os.getpid()))
            time.sleep(3600)
        os._exit(0)
    while not (Path(file).exists() and Path(file).read_text()):
        time.sleep(0.01)
    return "done"


def leave_a_child_behind_and_hang(file):
    leave_a_child_behind(file)
    time.sleep(3600)


def write_much(file):
    with Path(file).open("wb") as out:
        out.writelines(b"x" * (1 << 20) for _ in range(1 << 20))


def call_out(port):
    socket.create_connection(("127.0.0.1", port), 1).close()


def kill_the_caller(pid):
    os.kill(pid, signal.SIGKILL)


def raise_ours(path):
    raise ChunkMissingError("blob is gone", "ab" * 32, path)


def raise_theirs(_argument):
    raise ZeroDivisionError("by\nnothing")


def answer_no_json(_argument):
    return {1, 2}


def answer_nan(_argument):
    return float("nan")


def environment(_argument):
    return dict(os.environ), str(Path.cwd())


def scribble_on_the_answer(_argument):
    for fd in range(3, 64):
        try:
            os.write(fd, b"}garbage")
        except OSError:
            continue
    os._exit(0)
