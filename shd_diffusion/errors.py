"""Exceptions that a person is meant to read."""


class UserError(Exception):
    """Something the user can mend: the message is one line that names the file, the key and the fix.

    The command line prints the message and exits with `exit_code`. What is wrong with the input is found before
    anything is written.
    """

    exit_code = 2


class DivergedError(UserError):
    """A training that was ended since its numbers were not finite; its checkpoints are kept."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
