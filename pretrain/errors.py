"""The errors of `pretrain` that are meant for its user: one line that names the thing, the value and the next step."""


class PretrainError(Exception):
    """Base of every user-facing error of this folder; the console script prints it and exits with 2."""


class ParticipationError(PretrainError):
    """A rank called a tower that it had not announced, or the reverse; names rank, module, step and samples."""


class HealthError(PretrainError):
    """Too many steps of a run were bad, or it has nothing to roll back to; names the step and the samples."""


class NonFiniteError(HealthError):
    """The loss or the gradient of a step is NaN or infinite; names the step and the samples."""


class CheckpointError(PretrainError):
    """A checkpoint is missing, damaged or of another model; names the file or the parameter."""


class OpenModelError(PretrainError):
    """An open model's folder is missing, damaged, of an unknown kind or not the one of the config; names the tensor."""
