"""The errors of `launch` that are meant for its user: one line that names the thing, the value and the next step.

LaunchError
├── HostfileError        a hostfile that cannot be read, or a line of it
├── PreflightError       what a run needs is not there, found before any process started
├── LauncherMissingError deepspeed or pdsh is not installed
├── DemoError            a stage of the demo failed
├── ReportError          a report cannot be made of what is there
└── ViewError            the viewer cannot start, or was asked for what there is not
"""


class LaunchError(Exception):
    """Base of every user-facing error of this folder; the console script prints it and exits with 2."""


class HostfileError(LaunchError):
    """A hostfile cannot be read, or one of its lines is not `NAME slots=N`."""


class PreflightError(LaunchError):
    """A run cannot work; found before any process was started."""


class LauncherMissingError(LaunchError):
    """A program that starts ranks is not installed."""


class DemoError(LaunchError):
    """A stage of the demo failed."""


class ReportError(LaunchError):
    """A report cannot be made: a run without metrics, or a file of it that cannot be read."""


class ViewError(LaunchError):
    """The viewer cannot start here, or a page of it asks for what there is not."""
