"""`python -m minillm` is the command `minillm`."""

from .cli import app

app()
