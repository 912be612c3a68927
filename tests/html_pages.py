# SPDX-License-Identifier: Apache-2.0
"""Reads HTML pages as a browser would."""

import html.parser
import re


class Page(html.parser.HTMLParser):
    """Collects tags and text, and refuses tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def assert_stands_alone(text):
    """No other file, no script, no network; light and dark; any width."""
    page = Page(text)
    assert all(re.match(r"data:image/(png|jpeg);base64,", source) for source in page.sources)
    assert "script" not in page.tags
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    return page
