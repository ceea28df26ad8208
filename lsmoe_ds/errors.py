"""The one exception whose message is meant for the user."""

LONGEST = 1000  # characters of a sentence: enough for several long paths


class UserError(Exception):
    """Bad input: one clear sentence saying what was found and what is allowed.

    The command line prints the sentence without a traceback and exits with status 2. It may quote hostile
    input, so it stays on one line, long text is cut, and control characters cannot affect a terminal.
    """

    def __init__(self, sentence: str) -> None:
        if len(sentence) > LONGEST:
            sentence = f"{sentence[: LONGEST - 200]} ... {sentence[-150:]}"
        super().__init__(
            "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in sentence)
        )


class SharedError(UserError):
    """Raised on every rank; only rank 0 prints it."""
