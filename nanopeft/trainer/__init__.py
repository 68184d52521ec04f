# SPDX-License-Identifier: MIT
"""What train.py stands on, and no learner has to read: flags, files, engines, the report."""


class Error(ValueError):
    """A run that cannot be done as asked; the message says what would be right."""


class Failure(Exception):
    """A run that was asked for rightly and cannot go on; the message says what is left of it."""
