"""What only part of the package needs is an extra, and whoever lacks it is told which."""

from importlib.util import find_spec

from . import __version__

__all__ = ["install", "require"]


def install(extra: str) -> str:
    """The command that adds an extra. With our version: a package index has another project under this name."""
    return f"pip install 'minillm[{extra}]=={__version__}'"


def require(extra: str, *modules: str) -> None:
    """Raise ImportError that names the missing modules and the extra that brings them; nothing where all are there."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ImportError(f"{', '.join(missing)}: not installed, comes with an extra: {install(extra)}")
