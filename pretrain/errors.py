"""The errors of `pretrain` that are meant for its user: one line that names the thing, the value and the next step."""


class PretrainError(Exception):
    """Base of every user-facing error of this folder; the console script prints it and exits with 2."""
