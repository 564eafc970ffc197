"""Errors: what a person did that cannot work, said in one line."""


class Stopped(Exception):
    """A job that was asked to stop has left everything so that it can go on; says how."""


class UserError(Exception):
    """Something the user can put right: the command line prints it as one line and ends with exit code 2.

    The message says what was found, what was wanted, and what to do.
    """
