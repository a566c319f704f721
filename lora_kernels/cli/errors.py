"""What a command raises when the user, not the program, has to change something."""


class UserError(Exception):
    """Printed as one line on standard error, with exit status 2."""
