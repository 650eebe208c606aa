"""The page at `/`: one file, which asks nobody but this server. Its policy lets run what stands in it, by its hash, and
nothing else: neither what a model says nor what an extension of the file could load.

Source: W3C, "Content Security Policy Level 3".
"""

import base64
import hashlib
import re
from pathlib import Path

__all__ = ["HEADERS", "PAGE"]

PAGE = Path(__file__).with_name("page.html").read_bytes()


def _hashes(tag: str) -> str:
    inside = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), PAGE, re.DOTALL)
    return " ".join([f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'" for one in inside])


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')};"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
