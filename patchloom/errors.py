"""Errors: the exceptions that Patchloom raises on purpose, all below `Error`."""


class Error(Exception):
    """The base of every exception that Patchloom raises on purpose."""


class UserError(Error):
    """Something the user can fix. The command line prints it as one line and exits with code 2.

    The message says what was found, what was wanted and what to do.
    """


class CheckpointError(UserError, ValueError):
    """A model, checkpoint or snapshot that cannot be read."""


class Stopped(Error):
    """A job was asked to stop and has saved everything it needs to continue. The message says how to continue."""
