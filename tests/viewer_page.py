"""Parser for viewer pages."""

import json
from html.parser import HTMLParser


class ViewerPage(HTMLParser):
    """Parsed viewer page.

    Attributes:
        elements: Tag and attributes of each element.
        texts: Text of elements without children, by tag; scripts with a type by their type.
        images: JSON of each image.
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts_by_tag, self._open_key = [], {}, None
        self.feed(text)
        self.images = [json.loads(data) for data in self.texts_by_tag.get("application/json", [])]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._open_key = attributes.get("type", tag)
        self.texts_by_tag.setdefault(self._open_key, []).append("")

    def handle_endtag(self, tag):
        self._open_key = None

    def handle_data(self, data):
        if self._open_key is not None:
            self.texts_by_tag[self._open_key][-1] += data

    def find_all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]
