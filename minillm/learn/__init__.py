"""The learner's side: checks, progress, the doctor, and the tools that keep exercises and chapters in step with the
code.
"""

from .checker import check
from .pictures import COLORS, show, use_colors
from .prediction import predict, reveal

__all__ = ["COLORS", "check", "predict", "reveal", "show", "use_colors"]
