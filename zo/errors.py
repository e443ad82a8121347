"""Errors that a command prints as one line."""


class UserError(ValueError):
    """Mistake that a user can correct; a command prints it as one line, exit code 2."""


class RankError(RuntimeError):
    """Loss of another rank, or its silence; a command prints it as one line, exit code 1."""
