"""The data that every Python has."""

import numpy as np
import pytest

from minillm.data import digits, reference_text, split_topics


def test_digits():
    d = digits()
    assert d.train_x.shape[0] + d.test_x.shape[0] == 1797
    assert d.train_x.shape[1] == 64
    assert d.train_x.dtype == np.float32
    assert (d.train_x.min(), d.train_x.max()) == (0, 1)
    assert set(np.unique(d.train_y)) == set(range(10)) == set(np.unique(d.test_y))
    again, other = digits(), digits(seed=1)
    assert np.array_equal(d.test_x, again.test_x)
    assert not np.array_equal(d.test_x, other.test_x)


def test_reference_text():
    text = reference_text()
    assert list(text) == sorted(text)
    assert sum(map(len, text.values())) > 400_000


def test_topics_are_split_whole():
    train, test = split_topics(held_out=0.1)
    assert not train.keys() & test.keys()
    assert train | test == reference_text()
    share = sum(map(len, test.values())) / sum(map(len, reference_text().values()))
    assert 0.1 <= share < 0.2
    assert split_topics() == split_topics()
    assert split_topics(seed=1) != split_topics()


@pytest.mark.parametrize("share", [0, 1, -0.1, 2])
def test_bad_shares(share):
    with pytest.raises(ValueError, match="held_out: expected a share"):
        split_topics(share)
    with pytest.raises(ValueError, match="test_fraction: expected a share"):
        digits(share)
