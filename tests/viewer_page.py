"""Reads a page of the viewer as a program would."""

import json
from html.parser import HTMLParser


class ViewerPage(HTMLParser):
    """Elements with their attributes; the text of scripts, styles and headings; the JSON of each image."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], {}, None
        self.feed(text)
        self.images = [json.loads(data) for data in self.texts.get("application/json", [])]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._open = attributes.get("type", tag)
        self.texts.setdefault(self._open, []).append("")

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open is not None:
            self.texts[self._open][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]
