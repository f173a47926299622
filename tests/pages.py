"""A page of ours taken apart, without a browser."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Its elements, and the text of each kind of them."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open, []).append(data)

    def policy(self) -> dict[str, str]:
        said = next(a["content"] or "" for _, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")
        return dict(rule.split(" ", 1) for rule in said.split("; "))

    def data(self) -> Any:
        return json.loads(self.texts["script"][0])


def check_self_contained(page: Page, scripts: int = 2) -> None:
    """One style and one script that may run, named by their hashes; nothing is fetched, nothing stands in attributes."""
    policy = page.policy()
    assert policy.pop("img-src") == "data:"
    for kind, text in (("style-src", page.texts["style"][0]), ("script-src", page.texts["script"][-1])):
        assert policy.pop(kind) == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert set(policy) == {"default-src", "base-uri", "form-action"} and set(policy.values()) == {"'none'"}
    assert [tag for tag, _ in page.tags].count("script") == scripts and [tag for tag, _ in page.tags].count(
        "style"
    ) == 1
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"style", "src", "srcset", "action"}
    assert [a["href"] for _, a in page.tags if "href" in a] == ["data:,"]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["for"] for tag, a in page.tags if tag == "label" and "for" in a} <= set(ids)
