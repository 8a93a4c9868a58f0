"""The system-call filter for the sandbox: a short list of calls that no grader needs.

Written as classic BPF by hand, since the kernel takes nothing else and the list is short. It closes what
namespaces and rlimits leave open: further namespaces and mounts, tracing and other processes' memory,
memory that no limit counts (memfd, System V segments), kernel interfaces with a long history of holes,
and the few ways one process may change another of the same user (the warm worker has pid 2 inside).

Machines other than x86-64 and aarch64 run without the filter; the namespaces hold there all the same.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct

# name -> (x86-64, aarch64); None where the architecture has no such call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "quotactl": (179, 60),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "syslog": (103, 116),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "personality": (135, 92),
    "mbind": (237, 235),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "ioprio_set": (251, 30),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "mlockall": (151, 230),
    "vhangup": (153, 58),
}
# Calls whose first argument is a pid: refused when it names the warm worker, so that a call can neither
# lower its limits nor move it about. (name -> numbers)
ON_OTHERS: dict[str, tuple[int, int]] = {
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "setpgid": (109, 154),
}
SETPRIORITY = (141, 140)  # which, who: allowed only for oneself (who = 0, which = process)
CLONE, CLONE3 = (56, 220), (435, 435)
# Second argument is a signal: stopping the warm worker would only be seen when the time is up.
KILLERS: dict[str, tuple[int, int]] = {"kill": (62, 129), "tkill": (200, 130)}
WORKER_PID = 2
SIGSTOP = 19
CLONE_NEW = 0x7E020000  # every CLONE_NEW* flag that clone() takes

_LD, _JEQ, _JSET, _JGE, _RET = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@functools.cache
def program() -> bytes | None:
    """The filter for this machine as an array of `struct sock_filter`, or None where it has no table."""
    if platform.machine() not in _ARCH:
        return None
    column, arch = _ARCH[platform.machine()]
    code = [(_LD, 0, 0, 4), (_JEQ, 1, 0, arch), _refuse(), (_LD, 0, 0, 0)]
    if column == 0:  # the x32 calls: the same kernel by other numbers
        code += [(_JGE, 0, 1, 0x40000000), _refuse()]
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            code += [(_JEQ, 0, 1, number), _refuse()]
    # clone3 hides its flags behind a pointer: ENOSYS makes libc fall back to clone.
    code += [(_JEQ, 0, 1, CLONE3[column]), _refuse(errno.ENOSYS)]
    code += _when(CLONE[column], 0, (_JSET, 0, 1, CLONE_NEW))
    for number, _ in ((numbers[column], name) for name, numbers in ON_OTHERS.items()):
        code += _when(number, 0, (_JEQ, 0, 1, WORKER_PID))
    for number, _ in ((numbers[column], name) for name, numbers in KILLERS.items()):
        code += _when(number, 1, (_JEQ, 0, 1, SIGSTOP))
    code += _when(SETPRIORITY[column], 0, (_JEQ, 1, 0, 0))  # which != PRIO_PROCESS
    code += _when(SETPRIORITY[column], 1, (_JEQ, 1, 0, 0))  # who != self
    code.append((_RET, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _refuse(number: int = errno.EPERM) -> tuple[int, int, int, int]:
    return (_RET, 0, 0, _ERRNO | number)


def _when(number: int, argument: int, test: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """If the call is `number` and its argument passes `test` (which skips one instruction if not): refuse."""
    low_word = 16 + 8 * argument  # of struct seccomp_data, little-endian
    return [(_JEQ, 0, 4, number), (_LD, 0, 0, low_word), test, _refuse(), (_LD, 0, 0, 0)]
