"""The page for people: one file, which loads nothing from elsewhere."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from importlib.resources import files

PAGE = files("bara.serving").joinpath("page.html").read_text("utf-8")


def _policy(page: str) -> str:
    """Allows the page's own style and script, by their hashes, and this server."""
    allowed = {}
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        allowed[tag] = b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; "
        f"frame-ancestors 'none'; style-src 'sha256-{allowed['style']}'; "
        f"script-src 'sha256-{allowed['script']}'"
    )


HEADERS = {"Content-Security-Policy": _policy(PAGE), "Referrer-Policy": "no-referrer"}
