"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something the user can mend: the message is one line that names the file, the key and the fix.

    The command line prints the message and exits with code 2; nothing has been written by then.
    """
