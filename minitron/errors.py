"""What a user is told when something cannot be done. The command line turns these into exit codes."""

EXIT_DONE, EXIT_DEFECT, EXIT_REQUEST, EXIT_STOPPED = 0, 1, 2, 75


class RequestError(Exception):
    """The request is wrong or can't be met here: one line that names the setting, its value and what is allowed (exit 2)."""


class Stopped(Exception):
    """Stopped early, by a signal or by the loss of another rank, with what is finished saved: the same command continues (exit 75)."""


class LostRank(Stopped):
    """Another rank of the run was killed, failed, or is out of reach. `rank` is None where it is not known which."""

    def __init__(self, rank: int | None) -> None:
        who = "a rank" if rank is None else f"rank {rank}"
        super().__init__(f"{who} was lost, killed or failed: the same command continues from what is finished")


def refuse(setting: str, value: object, allowed: str) -> RequestError:
    """The one form of a refusal: `setting=value: what is allowed`."""
    return RequestError(f"{setting}={value}: {allowed}")
