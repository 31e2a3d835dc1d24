"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can change: a path, a key, a level, a class count.

    The message is one line that says what is wrong and what to change. ``tools/`` print it
    without a traceback; library users can catch it as a :class:`ValueError`.
    """
