"""The one error base for what a user can mend: wrong data, wrong configuration, a model or file that is not there."""


class UserError(ValueError):
    """Says in one sentence what is wrong, where, and what to do. A retry does not help, so none is made."""
