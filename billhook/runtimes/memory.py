"""Memory of the process of a runtime."""

from __future__ import annotations

import resource
import sys


def peak_resident() -> int:
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
