"""The one exception a user meets: input that cannot be used, said in one message."""


class BridgeError(Exception):
    """Input or environment that cannot be used (exit code 2 on the command line).

    The message says what was being done, to which tensor or file, what came, what was
    expected, and what to do.
    """
