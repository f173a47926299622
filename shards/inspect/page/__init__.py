"""Pages that are one file: nothing is fetched, and nothing runs but what stands in them.

A page's own styles and scripts are files here or beside who uses them. What comes from sets and runs stands in the page as
JSON, or as text that `escape` wrote, and never as code: the policy in the head names the one style and the one script by
their hashes, so that a browser refuses any other, inline handlers too.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
BASE = (_HERE / "base.css", _HERE / "base.js")  # what all pages look like; the button for light and dark


def assemble(title: str, body: str, files: Sequence[Path], data: Any = None) -> bytes:
    """A page.

    Args:
        title: plain text.
        body: HTML; what others named is escaped in it.
        files: styles and scripts, by their endings, in order behind those of every page.
        data: becomes the JSON of the element `data`.
    """
    style, script = (
        "\n".join(path.read_text(encoding="utf-8") for path in (*BASE, *files) if path.suffix == suffix)
        for suffix in (".css", ".js")
    )
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        '<link rel="icon" href="data:,">',  # or a browser asks the server for one
        f"<style>{style}</style>",
        body,
        f'<script type="application/json" id="data">{_json(data)}</script>' if data is not None else "",
        f"<script>{script}</script>",
        "</html>",
    ]
    # Names of files may hold halves of characters, which no encoding has.
    return "\n".join(filter(None, parts)).encode("utf-8", "backslashreplace")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON in ASCII that ends no element and begins no comment, whatever its texts are."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
