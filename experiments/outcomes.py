"""How a run can end, in words for `summary.json` and as exceptions."""

from strategies.state import BudgetTooSmall

FINISHED, AT_BUDGET, INTERRUPTED = "finished", "stopped at the budget", "interrupted"
DIVERGED, FAILED, UNAFFORDABLE, UNTRAINED = "diverged", "failed", "no round affordable", "nothing trained"


class Diverged(RuntimeError):
    """Training produced NaN or infinity; what was computed before is kept."""


class NothingTrained(RuntimeError):
    """Every client of the first round failed; what was computed before is kept."""


_STATUS: dict[type[BaseException], str] = {
    Diverged: DIVERGED,
    NothingTrained: UNTRAINED,
    BudgetTooSmall: UNAFFORDABLE,
    KeyboardInterrupt: INTERRUPTED,
}


def status_of(error: BaseException) -> str:
    """Return the word for a run that an exception ended."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), FAILED)


def error_of(status: str, reason: str) -> BaseException:
    """Return the exception that ended a run with this status in another process."""
    kind = next((kind for kind, known in _STATUS.items() if known == status), RuntimeError)
    return kind(reason)
