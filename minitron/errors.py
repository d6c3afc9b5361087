"""What a user is told when something cannot be done. The command line turns these into exit codes."""

EXIT_DONE, EXIT_DEFECT, EXIT_REQUEST, EXIT_STOPPED = 0, 1, 2, 75


class RequestError(Exception):
    """The request is wrong or can't be met here: one line that names the setting, its value and what is allowed (exit 2)."""


class Stopped(Exception):
    """Stopped early on a signal with everything saved: the same command continues (exit 75)."""


def refuse(setting: str, value: object, allowed: str) -> RequestError:
    """The one form of a refusal: `setting=value: what is allowed`."""
    return RequestError(f"{setting}={value}: {allowed}")
