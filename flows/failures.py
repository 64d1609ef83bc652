"""Which errors are the user's to mend, and the exit code of each. Anything else is a bug and shows its traceback."""

from models.script import ScriptError
from models.weights import WeightsError
from stages.errors import MoviedreamerError, UsageError
from storage.errors import StorageError


def exit_code_of(error: BaseException) -> int | None:
    """2 for a wrong call, 1 for something that failed, None for what nobody foresaw."""
    if isinstance(error, UsageError | ScriptError):
        return 2
    if isinstance(error, MoviedreamerError | StorageError | WeightsError):
        return 1
    return None
