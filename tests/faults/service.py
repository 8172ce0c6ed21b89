"""`service.app` as it is, but that a full disk can be told as any other trouble of the store's.

It does so while the file `SWITCH` is in the folder of faults (tests.faults.faults), so that
one process shows a test with its guard and without.
"""

from __future__ import annotations

import core.store
from core.errors import GraftError, NoSpace, Unavailable
from service.app import Graft
from tests.faults.faults import SWITCH, folder

__all__ = ["Graft"]


def no_space(message: str) -> GraftError:
    """Return the error that the store raises for want of room."""
    return Unavailable(message) if (folder() / SWITCH).exists() else NoSpace(message)


vars(core.store)["NoSpace"] = no_space
