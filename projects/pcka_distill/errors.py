"""The one exception that is meant for the person at the keyboard."""

import re
from urllib.error import URLError


class UserError(ValueError):
    """Something the user can change: a path, a key, a level, a class count.

    The message is one line that says what is wrong and what to change. ``tools/`` print it
    without a traceback; library users can catch it as a :class:`ValueError`.
    """


def reason(e: BaseException) -> str:
    """What an exception of a library says, on one line."""
    # str() of a KeyError is the repr of its argument.
    text = " ".join(str(e.args[0] if isinstance(e, KeyError) and e.args else e).split())
    if isinstance(e, URLError):
        return f"it could not be downloaded: {text}; fetch it by hand and name the file"
    # torch >= 2.6 says it in a paragraph of advice for those who call it.
    cause = re.search(
        r"WeightsUnpickler error: (.*?)(?= Please use | Check the documentation|$)", text
    )
    if cause:
        return cause[1]
    return text or type(e).__name__
