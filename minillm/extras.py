"""What only part of the package needs is an extra; whoever lacks it is told which: `pip install 'minillm[serve]'`."""

from importlib.util import find_spec

__all__ = ["require"]


def require(extra: str, *modules: str) -> None:
    """Raise ImportError that names the missing modules and the extra that brings them; nothing where all are there."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ImportError(f"{', '.join(missing)}: not installed; pip install 'minillm[{extra}]' brings it")
