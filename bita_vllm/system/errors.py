"""What a user can put right: the base of all errors whose message is for the person at the command line."""


class UserError(ValueError):
    """An input that cannot be used; the message is one sentence: what was given, what was expected, what to do."""
