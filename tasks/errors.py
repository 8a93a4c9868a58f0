"""The two ways in which OpenRFT stops on purpose; neither is ever shown as a traceback."""


class BadInput(Exception):
    """What the user gave cannot be used. Exit code 2; nothing was trained, nothing is billed.

    The message says what is wrong, where (file, line, field), what was found, what was expected and
    the nearest valid name, one finding per line.
    """


class StageFailed(Exception):
    """A stage could not finish, or a gate closed. Exit code 1; what was retained stays retained."""


class Damaged(StageFailed):
    """A published folder is incomplete, or a file of it is not what its manifest says."""


class GateClosed(StageFailed):
    """A gate said no: an outcome with a report, not a crash."""


class StoreUnreachable(StageFailed):
    """The store did not answer; trying again may help."""
