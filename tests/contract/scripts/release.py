"""The releases that a client's environment holds.

python release.py CLIENT
"""

from __future__ import annotations

import importlib.metadata
import sys

from findings import Findings

found = Findings()


@found.step
def release():
    return importlib.metadata.version(sys.argv[1])


@found.step
def project():
    """From the project's own environment, below this one."""
    return importlib.metadata.version("transformers")


found.report()
