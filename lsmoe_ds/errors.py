"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: one clear sentence saying what was found and what is allowed.

    The command line prints the sentence without a traceback and leaves with status 2.
    """
