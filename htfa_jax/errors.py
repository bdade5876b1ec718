"""The errors that are raised on purpose; a command prints them without a traceback.

It exits with 2, because the user can mend the cause, but with 1 for a `TrainingError`.
"""


class HTFAError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(HTFAError):
    """A configuration that cannot work: an unknown name, a wrong type, values that contradict."""


class DataError(HTFAError):
    """A dataset, record or image that cannot be used; the message says which and why.

    Attributes:
      kind: what sort of problem it is, in a few words, so that many can be counted.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


class CheckpointError(HTFAError):
    """A checkpoint or weight folder that is missing, damaged or of another model."""


class Damaged(CheckpointError):
    """A checkpoint whose files are not what was written.

    Attributes:
      reason: what is wrong with it, without its name.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class TrainingError(HTFAError):
    """A run that cannot go on, for example because its loss is not finite."""


class Busy(HTFAError):
    """A server's queue has no room.

    Attributes:
      retry_after: seconds after which there may be room.
      by_this_client: whether it is this client who fills it.
    """

    def __init__(self, message: str, retry_after: int, by_this_client: bool = False):
        super().__init__(message)
        self.retry_after, self.by_this_client = retry_after, by_this_client


class Closed(HTFAError):
    """The server goes down."""
