"""`Explained`: the base of errors whose message is enough."""


class Explained(Exception):
    """An error that a user or a machine causes, not a defect of Tiphys. Its message says what happened and what to do, so a
    command shows it without a traceback. Errors of values and of files (ValueError, OSError) need not derive from it."""
