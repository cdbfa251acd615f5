"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something only the user can change: a file, a key, a resource. Commands print it as `error: …` and exit 2.

    The message names the file, line or key and says what to do about it.
    """
