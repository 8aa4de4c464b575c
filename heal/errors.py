"""What can go wrong, as one tree.

    HealError
    ├── InputError              the user must change something (exit code 2)
    │   ├── BudgetError         a budget that is malformed or cannot be met
    │   ├── MethodError         a method that is unknown, or makes no sense here
    │   ├── ArchitectureError   an architecture without the table a method needs
    │   ├── WeightsError        weights that do not fit, or are not finite
    │   ├── ImagesError         images that are missing, corrupt or too few
    │   └── BundleError         a bundle that is damaged, foreign or too new
    └── NumericalError          a computation that left the finite numbers (exit code 1)

A message says what is wrong (with the value), where, and what to do.
"""


class HealError(Exception):
    """Base of everything that heal raises on purpose."""


class InputError(HealError):
    """The user must change something."""


class BudgetError(InputError):
    """A budget is malformed or cannot be met."""


class MethodError(InputError):
    """A method is unknown, or the combination makes no sense."""


class ArchitectureError(InputError):
    """The architecture has no table for what was asked."""


class WeightsError(InputError):
    """Weights do not fit the architecture, or are not finite."""


class ImagesError(InputError):
    """Images are missing, corrupt, of the wrong shape or too few."""


class BundleError(InputError):
    """A bundle is damaged, of an unknown version, or not a bundle."""


class NumericalError(HealError):
    """A computation produced NaN or infinity."""
