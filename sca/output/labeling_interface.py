"""Labeling interfaces of Label Studio projects: the controls that show regions, see https://labelstud.io/tags/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from sca.io.errors import InputError


@dataclass(frozen=True)
class Control:
    """Control of a labeling interface.

    Args:
        name: Name of the control.
        labels: Labels that it accepts; empty for any label.
        is_multiple: Whether a region may have several labels.
    """

    name: str
    labels: tuple[str, ...] = ()
    is_multiple: bool = False

    def choose_labels(self, preferred: Sequence[str], alternatives: Sequence[str | None]) -> list[str]:
        """Return the labels of a region.

        Args:
            preferred: Preferred labels, of which all accepted ones are returned if `is_multiple`, and else the first.
            alternatives: Labels of which the first accepted one is returned if no preferred label is accepted.

        Returns:
            At least one label that the control accepts; its first label if it accepts no given one.
        """
        own_labels = frozenset(self.labels)
        accepted, accepted_alternatives = (
            [label for label in dict.fromkeys(labels) if label and (label in own_labels or not own_labels)]
            for labels in (preferred, alternatives)
        )
        if accepted:
            return accepted if self.is_multiple else accepted[:1]
        return (accepted_alternatives or list(self.labels))[:1]


@dataclass(frozen=True)
class LabelingInterface:
    """Image of a labeling interface, and the controls for its regions.

    Args:
        image: Name of the image tag.
        data_key: Key of the image in the data of a task.
        mask: Control for brush masks, if any.
        box: Control for rectangles, if any.
        point: Control for keypoints, if any.
        caption: Name of the text area for each region, if any.
    """

    image: str = "image"
    data_key: str = "image"
    mask: Control | None = None
    box: Control | None = None
    point: Control | None = None
    caption: str | None = None


def parse_labeling_interface(text: str) -> LabelingInterface:
    """Parse the labeling configuration of a project.

    Args:
        text: XML with one `Image`, and `BrushLabels`, `RectangleLabels`, `KeyPointLabels` or `TextArea` for it. A text
            area requires `perRegion="true"`. Other tags are ignored.

    Returns:
        The interface.

    Raises:
        InputError: The XML is invalid, or has no image, several images, or no control for masks or boxes.
    """
    if "<!" in text.replace("<!--", ""):  # entities of a document type can be expanded without limit
        raise InputError("the labeling configuration contains a document type; remove it")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"the labeling configuration is not XML ({error}); copy it from the project") from error
    images = [each for each in root.iter("Image") if each.get("name") and each.get("value", "").startswith("$")]
    if len(images) != 1:
        raise InputError(
            f'the labeling configuration has {len(images)} tags <Image name="image" value="$image"/>; use one'
        )
    (image,) = images
    name = image.get("name", "")
    mask, box, point = (_find_control(root, tag, name) for tag in ("BrushLabels", "RectangleLabels", "KeyPointLabels"))
    if mask is None and box is None:
        raise InputError(
            "the labeling configuration has no BrushLabels or RectangleLabels for the image; add one of them"
        )
    text_areas = (each for each in root.iter("TextArea") if each.get("toName") == name and each.get("name"))
    caption = next((each.get("name") for each in text_areas if each.get("perRegion") == "true"), None)
    return LabelingInterface(name, image.get("value", "")[1:], mask, box, point, caption)


def _find_control(root: ElementTree.Element, tag: str, image: str) -> Control | None:
    """Return the first control of a kind for an image that has labels."""
    for element in root.iter(tag):
        labels = tuple(label for each in element.iter("Label") if (label := each.get("value")))
        if element.get("toName") == image and labels and (name := element.get("name")):
            return Control(name, labels, element.get("choice") == "multiple")
    return None
