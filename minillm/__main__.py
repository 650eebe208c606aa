"""`python -m minillm` is the command `minillm`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="minillm")
