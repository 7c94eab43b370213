"""What a process takes on itself before it runs a model: limits that hold for all that it starts, and that nothing of it can lift.

    memory      RLIMIT_DATA; and it is the first that the kernel ends when memory runs out
    files       largest file (RLIMIT_FSIZE); writes below given folders only (Landlock, Linux 5.13)
    network     no sockets but local ones (seccomp): EACCES
    processes   of its user (RLIMIT_NPROC; root has no such limit); no signals to any that it did not start (Landlock, Linux 6.12)

Nothing but the standard library: the sandbox's child runs it before it may import anything else.  Where the kernel lacks one of these the
others hold; `missing` says which.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Confinement", "confine", "missing"]

_PR_SET_NO_NEW_PRIVS = 38
_OOM_SCORE = 500
"""Of 1000: what holds a model goes before the worker and the other services do, however small it is."""


@dataclass(frozen=True)
class Confinement:
    """What a process may use; None: as much as there is."""

    memory_nbytes: int | None = None
    """Private writable memory. Not RLIMIT_AS: PyTorch and TensorFlow reserve tens of gigabytes of addresses that they never touch."""
    file_nbytes: int | None = None
    """Largest file that may be written; what is shared through memory counts as a file."""
    cpu_seconds: int | None = None
    processes: int | None = None
    """More than its user has now."""
    writable: Sequence[str] | None = None
    """Folders that may be written to."""
    network: bool = True
    signals: bool = True
    """Whether it may send signals to processes that it did not start."""


def confine(rules: Confinement) -> None:
    """Take the limits on this process: for good, for all threads that it starts and for all processes that come of it."""
    _limit(rules)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")
    _call(_libc().prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        _restrict(rules)
    if not rules.network:
        with contextlib.suppress(OSError):
            _close_network()


def missing() -> tuple[str, ...]:
    """Which of the limits this kernel lacks: of `files`, `signals`, `network`."""
    version = _landlock_version()
    lacks = {"files": version < 1, "signals": version < _SIGNALS_SINCE, "network": platform.machine() not in _MACHINES}
    return tuple(name for name, lacking in lacks.items() if lacking)


def _limit(rules: Confinement) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if rules.file_nbytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (rules.file_nbytes,) * 2)
    if rules.cpu_seconds is not None:
        # The hard limit a second later: where both are one the kernel sends SIGKILL, which says nothing.
        resource.setrlimit(resource.RLIMIT_CPU, (rules.cpu_seconds, rules.cpu_seconds + 1))
    if rules.memory_nbytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (rules.memory_nbytes,) * 2)
    if rules.processes is not None:
        most, hard = _threads_of_user() + rules.processes, resource.getrlimit(resource.RLIMIT_NPROC)[1]
        resource.setrlimit(resource.RLIMIT_NPROC, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _threads_of_user() -> int:
    """Roughly: those of all users (the kernel counts threads, and tells how many there are in one place only)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[2])
    return 0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(function: object, *arguments: object) -> int:
    """Raises: OSError: what the kernel says; it lacks the call."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "not on this system")
    result = int(function(*arguments))  # type: ignore[operator]  # of ctypes
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# --- files and signals: Landlock, as in the kernel's header of that name

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH, _SCOPE_SIGNAL, _SIGNALS_SINCE = 1, 1, 1 << 1, 6
_WRITES = sum(1 << bit for bit in (1, *range(4, 13)))
"""Write to a file; remove and make files, folders, links and all else that has a name."""
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_O_PATH = getattr(os, "O_PATH", 0)


def _landlock_version() -> int:
    try:
        return _call(_libc().syscall, _CREATE_RULESET, None, 0, _VERSION)
    except OSError:
        return 0


def _restrict(rules: Confinement) -> None:
    version = _landlock_version()
    writes = _WRITES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)  # noqa: PLR2004 (versions that brought them)
    handled = writes if rules.writable is not None and version else 0
    scoped = _SCOPE_SIGNAL if not rules.signals and version >= _SIGNALS_SINCE else 0
    if not handled and not scoped:
        return
    libc = _libc()
    attributes = struct.pack("QQQ", handled, 0, scoped) if scoped else struct.pack("Q", handled)
    ruleset = _call(libc.syscall, _CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for folder in rules.writable or () if handled else ():
            with contextlib.suppress(OSError):  # one that is not there is no reason to let it write everywhere
                _allow(libc, ruleset, folder, handled)
        _call(libc.syscall, _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, folder: str, rights: int) -> None:
    descriptor = os.open(folder, _O_PATH | os.O_CLOEXEC)
    try:
        _call(libc.syscall, _ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


# --- network: a seccomp filter, as in the kernel's headers of seccomp and BPF

_MACHINES = {"x86_64": (0xC000003E, 41, 317), "aarch64": (0xC00000B7, 198, 277)}
"""Machine → its AUDIT_ARCH, the numbers of `socket` and `seccomp`."""
_IO_URING_SETUP, _X32 = 425, 0x40000000
"""It makes sockets too, unseen; the bit that marks the calls of x86-64's other interface."""
_LOCAL = (1, 16, 38)
"""Families of sockets that lead nowhere else: Unix, the kernel, its ciphers. Of the others some are the Internet by another name (SMC)."""
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_AT_CALL, _AT_MACHINE, _AT_FIRST = 0, 4, 16
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
_SET_FILTER, _ALL_THREADS = 1, 1


def _close_network() -> None:
    if platform.machine() not in _MACHINES:
        return
    audit, socket_call, seccomp_call = _MACHINES[platform.machine()]
    program = _program(audit, socket_call)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    _call(_libc().syscall, seccomp_call, _SET_FILTER, _ALL_THREADS, header)


def _program(audit: int, socket_call: int) -> list[tuple[int, int, int, int]]:
    """Of the kernel's filter: what to do, steps to skip if true and if false, operand."""
    families = [(_EQUAL, len(_LOCAL) - index, 0, family) for index, family in enumerate(_LOCAL)]
    refuse = 7 + len(families)  # the last step but one; the last one allows
    return [
        (_LOAD, 0, 0, _AT_MACHINE),
        (_EQUAL, 0, refuse - 2, audit),
        (_LOAD, 0, 0, _AT_CALL),
        (_AT_LEAST, refuse - 4, 0, _X32),
        (_EQUAL, refuse - 5, 0, _IO_URING_SETUP),
        (_EQUAL, 0, len(families) + 2, socket_call),
        (_LOAD, 0, 0, _AT_FIRST),
        *families,
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
