"""Every error that this project raises on purpose.

MoviedreamerError           anything below; the command line prints its text and exits
+-- UsageError              the call, a setting or a story is wrong (exit code 2)
|   +-- ProfileError        a profile file or a --set override is wrong
|   +-- StoryError          a story file is wrong
|   +-- CatalogueError      a film catalogue is wrong
+-- MissingInputError       an artifact that a stage needs does not exist yet
+-- FilmError               one film cannot be used; other films go on
+-- StageError              a stage broke its own contract (a bug in the stage)
+-- ComputationError        a stage could not produce its result from good inputs
+-- FailureBudgetError      so many films failed that a run was stopped
+-- ServerError             the Prefect server that a command started for itself is gone

Storage has its own small tree in `storage/errors.py`, because storage knows nothing of stages.
Each message says what went wrong, the offending value, what was expected and what to do.
"""


class MoviedreamerError(Exception):
    """Base of all errors of the stages and flows."""


class UsageError(MoviedreamerError):
    """The call was wrong; nothing was done."""


class ProfileError(UsageError):
    """A profile or an override cannot be used."""


class StoryError(UsageError):
    """A story cannot be used as the input of generation."""


class CatalogueError(UsageError):
    """A film catalogue cannot be read or is inconsistent."""


class MissingInputError(MoviedreamerError):
    """An artifact that a stage needs is absent."""


class FilmError(MoviedreamerError):
    """One film cannot be used; the others go on."""


class StageError(MoviedreamerError):
    """A stage broke its contract: no outcome or two for an item, or rows off its schema."""


class ComputationError(MoviedreamerError):
    """A stage failed on inputs that were good."""


class FailureBudgetError(MoviedreamerError):
    """So many films failed that going on would only fail more of them."""


class ServerError(MoviedreamerError):
    """The Prefect server of this command did not come up, or ended."""
