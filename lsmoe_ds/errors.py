"""The one exception that is meant for the person at the keyboard."""

LONGEST = 1000  # characters of a sentence, in which several long paths have a place


class UserError(Exception):
    """Bad input: one clear sentence saying what was found and what is allowed.

    The command line prints the sentence without a traceback and leaves with status 2. What was found may be
    hostile: it stays on one line, is cut where it is long, and no character in it moves a terminal.
    """

    def __init__(self, sentence: str) -> None:
        if len(sentence) > LONGEST:
            sentence = f"{sentence[: LONGEST - 200]} ... {sentence[-150:]}"
        super().__init__(
            "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in sentence)
        )


class SharedError(UserError):
    """Raised on every rank; only rank 0 prints it."""
