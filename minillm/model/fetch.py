"""The name that `minillm.fetch` had: both are one module."""

import sys

from .. import fetch

sys.modules[__name__] = fetch
