"""minillm: LLM inference, read in one sitting.

from minillm import LLM, SamplingParams
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Late, so that chapter 1 (NumPy alone) and the learner's tools do not wait two seconds for torch.
    if name == "LLM":
        from .llm import LLM

        return LLM
    if name == "SamplingParams":
        from .sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'minillm' has no attribute {name!r}")
