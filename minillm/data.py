"""The data of the curriculum: what every Python already has, so that nothing is downloaded.

- `digits()`: 1,797 handwritten digits of 8 by 8 pixels, from scikit-learn (Alpaydin and Kaynak, UCI, 1998).
- `reference_text()`: the language reference that ships inside CPython: technical English, about 465,000 characters.
  It differs between Python versions, so no exact figure that is made from it may be compared across versions.
"""

import random
from dataclasses import dataclass

import numpy as np

__all__ = ["Digits", "digits", "reference_text", "split_topics"]


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, split into training and test images.

    `train_x` [N, 64] and `test_x` [M, 64] are float32 pixels in 0..1, row by row; `train_y` [N] and `test_y` [M] are
    int64 labels 0..9.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def digits(test_fraction: float = 0.25, seed: int = 0) -> Digits:
    """Load scikit-learn's 8 by 8 handwritten digits, shuffled by `seed` and split.

    Raises ValueError unless 0 < test_fraction < 1.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: expected a share between 0 and 1 (both excluded), got {test_fraction}")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # [1797, 64] values 0..16, [1797]
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    num_test = round(len(x) * test_fraction)
    return Digits(x[num_test:], y[num_test:], x[:num_test], y[:num_test])


def reference_text() -> dict[str, str]:
    """The topics of CPython's language reference, {topic name: text}, sorted by name."""
    from pydoc_data.topics import topics

    return {name: topics[name] for name in sorted(topics)}


def split_topics(held_out: float = 0.1, seed: int = 0) -> tuple[dict[str, str], dict[str, str]]:
    """Split `reference_text()` by topic into (training, held-out) dictionaries.

    Whole topics are held out: neighboring sentences of one topic repeat each other, so a split inside a topic would
    leak training text into the test. Topics are drawn at random until they hold at least `held_out` of all
    characters.

    Raises ValueError unless 0 < held_out < 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1 (both excluded), got {held_out}")
    text = reference_text()
    names = list(text)
    random.Random(seed).shuffle(names)
    wanted, taken = held_out * sum(map(len, text.values())), 0
    test = {}
    for name in names:
        if taken >= wanted:
            break
        test[name] = text[name]
        taken += len(text[name])
    train = {name: body for name, body in text.items() if name not in test}
    return train, test
