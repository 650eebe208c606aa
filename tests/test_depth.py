"""Profiles of drawn tests: what a test asks for is what `make test` draws; `quick` takes a third, `deep` sevenfold."""

import os

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

EXPECTED = {"quick": (100, 15), "full": (300, 15), "deep": (2100, 105)}[os.environ.get("HYPOTHESIS_PROFILE", "full")]
drawn: list[int] = []
machines: list[object] = []


@settings(max_examples=300)
@given(st.integers())
def test_draws(number):
    drawn.append(number)


class Counting(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        machines.append(self)

    @rule(number=st.integers())
    def nothing(self, number):
        assert isinstance(number, int)


TestCounting = Counting.TestCase
TestCounting.settings = settings(max_examples=15, stateful_step_count=2)


def test_as_many_as_the_profile_wants():
    """Both are run here, as they may run in another process."""
    drawn.clear()
    test_draws()
    assert len(drawn) == EXPECTED[0]
    machines.clear()
    assert TestCounting("runTest").run().wasSuccessful()
    assert len(machines) >= EXPECTED[1]
