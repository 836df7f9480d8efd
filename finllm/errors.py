"""What goes wrong in ways a user can mend. The command prints the message and exits with 2.

FinllmError
├── RecipeError   a recipe, a profile or an argument is wrong
├── DataError     a data set is missing, unreadable, or its parts overlap
└── RunError      a run folder, a model or this machine cannot do what was asked
"""


class FinllmError(Exception):
    """Something the user can mend; the message says where, what was found, what is allowed, what to do."""


class RecipeError(FinllmError):
    """A recipe, a profile or a command-line argument is wrong."""


class DataError(FinllmError):
    """A data set is missing or unreadable, or its parts overlap."""


class RunError(FinllmError):
    """A run folder, a model or this machine cannot do what was asked."""
