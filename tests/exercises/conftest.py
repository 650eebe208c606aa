"""`impl`: the object under check, from solutions/ or from where --impl points."""

from functools import cache
from pathlib import Path

import pytest

from minillm.learn.checker import load_module, load_notebook
from minillm.learn.paths import root


@cache
def _namespace(source: Path) -> dict:
    return load_notebook(source) if source.suffix == ".ipynb" else vars(load_module(source))


@pytest.fixture
def impl(request: pytest.FixtureRequest):
    stem = Path(request.node.path).stem.removeprefix("test_")
    where = request.config.getoption("--impl")
    source = {"solutions": root() / "solutions" / f"{stem}.py", "exercises": root() / "exercises" / f"{stem}.ipynb"}
    names = _namespace(source.get(where) or Path(where))
    if request.cls.object_name not in names:
        pytest.fail(f"{where} defines no `{request.cls.object_name}` (exercise {request.cls.number})", pytrace=False)
    return names[request.cls.object_name]
