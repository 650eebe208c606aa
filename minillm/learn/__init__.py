"""The learner's side: checks, progress, the doctor, and the tools that keep exercises and chapters in step with the
code.
"""

from .checker import check

__all__ = ["check"]
