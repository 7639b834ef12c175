"""The one exception that means "what you gave cannot be used".

A leaf of the import graph: every package may raise it, `main` turns it into one line on
stderr and exit code 2. Anything else that escapes is a defect and keeps its traceback.
"""


class InputError(Exception):
    """A file, flag or config value that cannot be used.

    The message is one line: what was given, what is allowed, and what to do.
    """
