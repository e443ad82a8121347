"""The two errors that a command tells in one line."""


class UserError(ValueError):
    """What a user can cause and mend; a launcher prints it as one line and ends with exit code
    2."""


class RankError(RuntimeError):
    """Another rank is gone or silent, which no one rank can mend; told in one line too, with exit
    code 1."""
