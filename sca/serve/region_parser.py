"""Parser for a region in the text of a chat message, in the notations that clients use.

Boxes: `box=10,20,30,40`, `Box: [10, 20, 30, 40]`, `"bbox_2d": [...]`, `<box>...</box>`, `(10,20),(30,40)`, four numbers
in brackets or on a separate line, or `x1=10, y1=20, x2=30, y2=40`. Points: `point=10,20` or `point=10,20,0`. Other
coordinates, and boxes described as another order such as xywh, are errors, so that no region is ignored silently. Four
numbers in a sentence, such as "the classes 1, 2, 3, 4", are not a region.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from sca.io.errors import InputError
from sca.io.prompts import Box, Point, parse_box, parse_point

_NUMBER = r"[-+]?(?:\d++(?:\.\d++|\.(?![\w.]))?+|\.\d++)(?:e[-+]?\d++)?+"
_NUMBER_WITH_UNIT = rf"(?<![\w.]){_NUMBER}(?:px|(?!\w)(?:\s?(?:px|pixels?)\b|\s?%)?+)"
_SEPARATOR = r"(?:[\s,;|()\[\]{}<>/\"'`&*]|->|(?<=[)\]}])\s*+-\s*+(?=[(\[{])|\b(?:and|to)\b)"
_RUN = re.compile(rf"{_NUMBER_WITH_UNIT}(?:{_SEPARATOR}++{_NUMBER_WITH_UNIT})*+")
_TOKEN = re.compile(rf"(?P<number>{_NUMBER_WITH_UNIT})|(?P<joint>{_SEPARATOR}++)")
_EDGE_NAMES = (
    r"[xy](?:_?(?:min|max|[0-2]))?|c_?[xy]|[xy]_?c(?:ent(?:er|re))?|cent(?:er|re)_?[xy]|left|top|right|bottom"
    r"|width|height|[wh]|label"
)
_NAMED_NUMBER = re.compile(
    rf"(?<![\w.])({_EDGE_NAMES})[\"'`]?(\s*[:=]\s*|\s+(?:is\s+|at\s+)?)[\"'`]?({_NUMBER_WITH_UNIT})"
)
_NAMED_NUMBER_SEPARATOR = re.compile(rf"(?:{_SEPARATOR}|[-\N{{BULLET}}])*+")
_WORD = re.compile(r"[^\W\d][\w-]*")

_CONNECTING_WORDS = {"a", "an", "are", "at", "by", "for", "from", "image", "in", "is", "of", "on", "the", "with"}
_LOCATION_WORD = re.compile(
    r"at|xy|co-?ordinates?|coords?|pos(?:itions?)?|loc(?:ations?)?|regions?|areas?|crops?|windows?|zones?"
    r"|bounds|selections?"
)
_BOX_WORD = re.compile(
    r"(?:.*[_-])?(?:b?box(?:es)?|bounding-?box(?:es)?|rect(?:angle)?s?|rois?|xyxy|ltrb)(?:[_-].*|\d?d?)"
)
_POINT_WORD = re.compile(r"(?:.*[_-])?(?:(?:key)?points?|pts?|clicks?|pixels?)(?:[_-].*|\d?d?)")
_SIZE_WORD = re.compile(r"(?:.*[_-])?(?:sizes?|resolutions?|dimensions?|shapes?)")
_OTHER_ORDER_WORD = re.compile(  # names of boxes and numbers in an order other than x1, y1, x2, y2
    r"box_?2d|(?:.*[_-])?(?:xywh|cxcywh|ltwh|tlwh|yxyx)|h|height|x2|x_?max|right|(?:.*[_-])?(?:poly(?:gon)?|segmentation)s?"
)
_OTHER_ORDER_PHRASE = re.compile(  # an order other than x1, y1, x2, y2, before or after the numbers of a box
    r"(?<![a-z\d])(?:c?xc?ywh|xyhw|ltwh|tlwh|yxyx|yxhw)(?![a-z])"
    r"|(?:\b(?:in|as|format|mode|order|style|type)\W{1,8}|\()(?:coco|yolo)(?:v?\d+)?\b"
    r"|\b(?:coco|yolo)(?:v?\d+)?[\s_-]+(?:format|style|order|convention|notation|b?box)"
    r"|(?<!\w)(?:(?:c_?|center_?)?x\W{1,3}(?:c_?|center_?)?y|x_?[01c]\W{1,3}y_?[01c]|x_?min\W{1,3}y_?min|left\W{1,3}top)"
    r"\W{1,3}(?:w(?:idth)?\W{1,3}(?:and\s)?h(?:eight)?|h(?:eight)?\W{1,3}(?:and\s)?w(?:idth)?)\b"
    r"|(?<!\w)(?:y\W{1,3}x\W{1,3}y\W{1,3}x|y_?(?:1\W{1,3}x_?1|0\W{1,3}x_?0|min\W{1,3}x_?min)"
    r"|x_?(?:1\W{1,3}x_?2|0\W{1,3}x_?1|min\W{1,3}x_?max)|top\s*,\s*left\s*,\s*bottom)\b"
)
_RANGE = (  # range on an axis, after the name of the axis
    rf"(?=[\s:=])\s*+(?:[:=]|from|between|in|is|of)?+\s*+{_NUMBER}\s*+(?:to|and|-|:|\.\.+|\N{{EN DASH}})\s*+{_NUMBER}"
)
_CORNER_COORDINATES = rf"(?<![\w.,])(?!\d,\d{{3}}\b|\d+,0\d\d\b){_NUMBER}\s*,\s*{_NUMBER}"  # not 1,200 or 12,000
_UNREADABLE = re.compile(  # location tokens, mask files, array slices, X11 geometries, ranges, numbers joined by "-"
    r"<(?:loc|patch_index|bin|coord|seg|[xy])_?\d+>|(?<!\w)mask\s*=\s*\S+"
    r"|[\[(]\s*\d+\s*:\s*\d+\s*,\s*\d+\s*:\s*\d+|(?<!\w)\d+(?:x\d+){3}|(?<!\w)\d+x\d+[-+]\d+[-+]\d+"
    rf"|(?<![\w.])(?<!\d )[xy]{_RANGE}|(?<!\w)rows?{_RANGE}\W{{1,3}}(?:and\s)?col(?:umn)?s?{_RANGE}"
    rf"|(?<!\w)col(?:umn)?s?{_RANGE}\W{{1,3}}(?:and\s)?rows?{_RANGE}"
    r"|(?<!\w)(?:b?box|rect(?:angle)?|roi|region|area|crop|selection|coord(?:inate)?s|xyxy)\W{0,4}"
    r"\d+(?:\.\d+)?(?:\s?[-\N{EN DASH}_:]\s?\d+(?:\.\d+)?){3}"
    rf"|{_CORNER_COORDINATES}\s*[-\N{{EN DASH}}]\s*{_NUMBER}\s*,\s*{_NUMBER}"
    rf"|(?<!\w)cent(?:er|re)\s*[:=]\s*{_NUMBER}[\s,;]+{_NUMBER}"
)
_CORNER_PAIR = re.compile(rf"{_CORNER_COORDINATES}(?:px)?\s+to\s+{_NUMBER_WITH_UNIT}\s*,\s*{_NUMBER_WITH_UNIT}")
_NO_REGION = re.compile(  # colors, bullet points, counts as in "box: 2 sentences"
    r"\b(?:rgb|hs[lv])a?\s?\([^()]{0,60}\)|\bcmyk\s?\([^()]{0,60}\)|\b(?:bullet|talking|main|selling)[\s-]?points?\b"
    r"|\b(?:b?box(?:es)?|points?)\s?:\s?\d+(?:\s?(?:-|or)\s?\d+)?\s(?!(?:px|pixels?|and|to|by|x|y)\b)(?=[^\W\d_])"
)
_ASCII_SIGNS = {0xFF01 + offset: 0x21 + offset for offset in range(94)}  # full-width characters
_ASCII_SIGNS |= str.maketrans(
    "\N{MINUS SIGN}\N{LEFT BLACK LENTICULAR BRACKET}\N{RIGHT BLACK LENTICULAR BRACKET}", "-[]"
)
_NAME_WITHOUT_SPACE = re.compile(r"(?<!\w)(b?box|point|region)(?=\d+\s*[,;])")  # before its first number
_ESCAPE_SEQUENCE = re.compile(r"\\[nrt\"']")  # in JSON that was encoded twice
_ASSIGNED_VALUE = re.compile(
    r"(?<!\w)(?:b?box(?:_2d)?|point(?:_2d)?)[\"'`]?\s*[:=][\s\"'`(\[{<|>]*([^\s\"'`)\]}>|]{1,40})"
)
_OPENING_CHARACTERS, _CLOSING_CHARACTERS = " \t\n\"'`([{<|=:", " \t\n\"'`)]}>|"  # around the numbers of a region
_COORDINATE_NAMES = ("box", "bbox", "box_2d", "bbox_2d", "boxes", "point", "points", "point_2d", "coordinates", "xyxy")
_REGION_NOUNS = ("region", "area", "object", "part", "crop")
_PREPOSITIONS = ("at", "in", "inside", "within", "with")
_DETERMINERS = ("the", "this", "that")
_FORMS_OF_BE = ("is", "are", "was", "were")
MAX_NUMBERS = 2048  # per text; a region has at most 256 points of 3 numbers
_MAX_NAME_DISTANCE = 60  # characters before numbers that are searched for their name

# names of the numbers of a box
_BOX_ORDERS: tuple[list[str], ...] = ([], ["x1", "y1", "x2", "y2"], ["x0", "y0", "x1", "y1"])
_BOX_HINT = "write box=x1,y1,x2,y2 in pixels"
_POINT_HINT = "write point=x,y in pixels"


class ParsedRegion(NamedTuple):
    """Region in a text, in pixels: a box, points, or both.

    Attributes:
        box: x1 y1 x2 y2.
        points: x, y and label 1 inside or 0 outside.
    """

    box: Box | None
    points: tuple[Point, ...]


class _RegionMention(NamedTuple):
    """Box or points, and their position in the text."""

    start: int
    end: int
    box: Box | None
    points: tuple[Point, ...]


@dataclass
class _NumberRun:
    """Numbers that belong together; `groups` contains those in each innermost pair of brackets."""

    start: int
    end: int
    numbers: list[str] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)

    def add_number(self, match: re.Match[str], is_inside: bool, is_new_group: bool) -> None:
        self.numbers.append(match[0])
        self.end = match.end()
        if is_inside:
            if is_new_group or not self.groups:
                self.groups.append([])
            self.groups[-1].append(match[0])


def find_region(text: str, reject_ambiguous: bool = True) -> ParsedRegion | None:
    """Find the region in a text.

    Args:
        text: Text in any case, with ASCII or full-width characters.
        reject_ambiguous: Reject four numbers in a sentence that may or may not be a box, such as "1,2,3,4".

    Returns:
        The region in the pixels of the text; None if nothing in the text looks like coordinates.

    Raises:
        InputError: The text contains several regions, coordinates that cannot be read, or too many numbers.
    """
    mention = _find_mention(_normalize_text(text), reject_ambiguous)
    return None if mention is None else ParsedRegion(mention.box, mention.points)


def _normalize_text(text: str) -> str:
    text = text.translate(_ASCII_SIGNS).casefold()
    return _NAME_WITHOUT_SPACE.sub(r"\1 ", _ESCAPE_SEQUENCE.sub("  ", text))


def _find_mention(text: str, reject_ambiguous: bool) -> _RegionMention | None:
    """Return the region in a normalized text, with the position of its numbers."""
    text = _NO_REGION.sub(lambda match: "_" * len(match[0]), text)
    num_numbers = len(re.findall(r"\d+", text))
    if num_numbers > MAX_NUMBERS:
        raise InputError(f"the text contains {num_numbers:,} numbers; shorten it to at most {MAX_NUMBERS:,} numbers")
    if match := _UNREADABLE.search(text):
        raise InputError(f"cannot parse {_shorten_text(match[0])} as a region; {_BOX_HINT}")
    named_mentions = list(_parse_named_values(text))
    for mention in named_mentions:
        text = f"{text[: mention.start]}{' ' * (mention.end - mention.start)}{text[mention.end :]}"
    unnamed_mentions = list(_parse_runs(text, reject_ambiguous))
    if any(mention.box for mention in unnamed_mentions) and (match := _OTHER_ORDER_PHRASE.search(text)):
        raise InputError(f"the box has the order {_shorten_text(match[0])} instead of x1,y1,x2,y2; {_BOX_HINT}")
    mentions = sorted([*named_mentions, *unnamed_mentions])
    _check_assignments(text, mentions)
    return _merge_mentions(text, mentions)


def remove_region(text: str) -> str:
    """Remove the region from a text, so that its question remains.

    Args:
        text: Text as for `find_region`.

    Returns:
        The text with "it" in place of a region within a sentence: "what color is it?" for "what color is
        box=10,20,30,40?". A region on its own, or one that specifies a noun, is removed without replacement: "what
        color is the car?" for "what color is the car at 10,20,30,40?". If the text has characters that the parser
        replaces, the result has folded case.

    Raises:
        InputError: As in `find_region`.
    """
    parsed_text = _normalize_text(text)
    mention = _find_mention(parsed_text, reject_ambiguous=True)
    if mention is None:
        return " ".join(text.split())
    text = text if len(text) == len(parsed_text) else parsed_text
    before, after = text[: mention.start].rstrip(_OPENING_CHARACTERS), text[mention.end :].lstrip(_CLOSING_CHARACTERS)
    after = re.sub(r"^</?\w{1,20}>", "", after)  # closing tag
    terms = before.split()
    removed = _count_region_terms(terms)
    is_noun_kept = bool(terms[: len(terms) - removed]) and removed > 0 and _names_region(terms[len(terms) - removed :])
    terms = terms[: len(terms) - removed]
    is_in_sentence = bool(terms) and terms[-1][-1].isalnum() and re.match(r"[?.!,\w]", after.lstrip()) is not None
    pronoun = ["it"] if is_in_sentence and not is_noun_kept else []
    joined = " ".join([*terms, *pronoun, *after.split()])
    return re.sub(r" ([?.!,])", r"\1", joined).strip(" ,;:.|-")


def _count_region_terms(terms: Sequence[str]) -> int:
    """Return how many terms at the end of a text introduce the numbers of a region, such as "at" or "in the box"."""
    count = 0

    def get_term() -> str:
        return terms[-1 - count].casefold().strip(_OPENING_CHARACTERS) if count < len(terms) else ""

    count += get_term() in _COORDINATE_NAMES
    count += get_term() in _REGION_NOUNS
    count += get_term() in _DETERMINERS
    if get_term() in _PREPOSITIONS:
        previous = terms[-2 - count].casefold() if count + 1 < len(terms) else ""
        count += previous not in (*_FORMS_OF_BE, "")  # "the car at", not "what is in"
    return count


def _names_region(terms: Sequence[str]) -> bool:
    """Return whether the removed terms follow a noun that they specify: "the car" for "the car at 10,20,30,40"."""
    return terms[0].casefold() in _PREPOSITIONS


def _merge_mentions(text: str, mentions: Sequence[_RegionMention]) -> _RegionMention | None:
    """Merge adjacent mentions to one region; raise InputError for several regions."""
    if not mentions:
        return None
    boxes = [each.box for each in mentions if each.box]
    if len(boxes) > 1:
        raise InputError("the text contains more than one box; send one request per box, or use /v1/captions")
    for current, following in pairwise(mentions):
        if re.search(r"\w", text[current.end : following.start]):
            raise InputError(
                f"the text contains {len(mentions)} regions; send one request per region, or write "
                "box=x1,y1,x2,y2;point=x,y to combine prompts of one region"
            )
    points = tuple(point for each in mentions for point in each.points)
    return _RegionMention(mentions[0].start, mentions[-1].end, boxes[0] if boxes else None, points)


def _check_assignments(text: str, mentions: Sequence[_RegionMention]) -> None:
    """Reject `box=` and `point=` with a value that has digits and was not parsed; names, as in box=x1,y1, are text."""
    for match in _ASSIGNED_VALUE.finditer(text):
        value = re.sub(rf"(?<![^\W_])(?:{_EDGE_NAMES})(?![^\W_])", "", match[1])
        if re.search(r"\d", value) and not any(each.start <= match.start(1) < each.end for each in mentions):
            raise InputError(f"cannot parse {_shorten_text(match[0])} as a region; {_BOX_HINT}")


# --- named numbers ---------------------------------------------------------------------------------------------------


def _parse_named_values(text: str) -> Iterator[_RegionMention]:
    """Parse `x1=10, y1=20, x2=30, y2=40`, `{"x": 10, "y": 20, "width": 5, "height": 5}` and `x=10, y=20`."""
    unread_matches = []
    for matches in _iter_named_groups(text):
        values = {_normalize_edge_name(match[1]): match[3] for match in matches}
        start, end = matches[0].start(), matches[-1].end()
        is_point = bool(re.fullmatch("points?", _find_name(text, start, 0)[0]))
        is_one_region = len(values) == len(matches) and not (is_point and len(values) > 3)
        mention = _values_to_mention(values, start, end) if is_one_region else None
        if mention is not None:
            yield mention
        else:
            unread_matches += [match for match in matches if _normalize_edge_name(match[1]) not in ("w", "h", "label")]
    if len(unread_matches) > 2 or sum(bool(match[2].strip(" isat\n\t")) for match in unread_matches) > 1:
        raise InputError(
            f"cannot parse {_shorten_text(' '.join(each[0] for each in unread_matches))} as a region; {_BOX_HINT}"
        )


def _iter_named_groups(text: str) -> Iterator[list[re.Match[str]]]:
    """Yield groups of adjacent named numbers."""
    matches: list[re.Match[str]] = []
    for match in _NAMED_NUMBER.finditer(text):
        if matches:
            separator = _NAMED_NUMBER_SEPARATOR.match(text, matches[-1].end())
            if separator is None or separator.end() != match.start():
                yield matches
                matches = []
        matches.append(match)
    if matches:
        yield matches


def _normalize_edge_name(name: str) -> str:
    """Return the canonical name of an edge."""
    name = name.replace("_", "")
    canonical_names = {"left": "x1", "xmin": "x1", "top": "y1", "ymin": "y1"}
    canonical_names |= dict.fromkeys(("xc", "xcenter", "xcentre", "centerx", "centrex"), "cx")
    canonical_names |= dict.fromkeys(("yc", "ycenter", "ycentre", "centery", "centrey"), "cy")
    canonical_names |= {"right": "x2", "xmax": "x2", "bottom": "y2", "ymax": "y2", "width": "w", "height": "h"}
    return canonical_names.get(name, name)


def _values_to_mention(values: dict[str, str], start: int, end: int) -> _RegionMention | None:
    """Convert named values to a box or a point; None for other names."""
    names = frozenset(values)
    if names == {"x", "y"} or names == {"x", "y", "label"}:
        return _RegionMention(
            start, end, None, (_numbers_to_point([values[name] for name in ("x", "y", "label") if name in names]),)
        )
    if names == {"x0", "y0", "x1", "y1"}:
        return _RegionMention(start, end, _numbers_to_box([values[name] for name in ("x0", "y0", "x1", "y1")]), ())
    if names == {"x1", "y1", "x2", "y2"}:
        return _RegionMention(start, end, _numbers_to_box([values[name] for name in ("x1", "y1", "x2", "y2")]), ())
    for x, y in (("x", "y"), ("x1", "y1")):
        if names == {x, y, "w", "h"}:
            left, top, width, height = _numbers_to_box([values[name] for name in (x, y, "w", "h")])
            return _RegionMention(start, end, (left, top, left + width, top + height), ())
    if names == {"cx", "cy", "w", "h"}:
        center_x, center_y, width, height = _numbers_to_box([values[name] for name in ("cx", "cy", "w", "h")])
        left, top = center_x - width / 2, center_y - height / 2
        return _RegionMention(start, end, (left, top, center_x + width / 2, center_y + height / 2), ())
    return None


# --- unnamed numbers -------------------------------------------------------------------------------------------------


def _parse_runs(text: str, reject_ambiguous: bool) -> Iterator[_RegionMention]:
    end = 0
    for match in _RUN.finditer(text):
        for run in _split_runs(text, match):
            mention = _parse_run(text, run, end, reject_ambiguous)
            if mention is not None:
                yield mention
            end = run.end


def _split_runs(text: str, match: re.Match[str]) -> Iterator[_NumberRun]:
    """Split a match where numbers leave or enter brackets, or where a space follows numbers separated by commas."""
    opening_text = re.search(r"[\s([{\"'`<|]*$", text[max(0, match.start() - _MAX_NAME_DISTANCE) : match.start()])
    depth = len(re.findall(r"[([{]", opening_text[0])) if opening_text else 0
    run, has_commas, is_new_group = _NumberRun(match.start(), match.start()), False, True
    for token in _TOKEN.finditer(text, match.start(), match.end()):
        if token["number"]:
            run.add_number(token, depth > 0, is_new_group)
            is_new_group = False
            continue
        separator = token[0]
        is_new_group = bool(re.search(r"[()\[\]{}]", separator))
        depth = max(0, depth - len(re.findall(r"[)\]}]", separator))) + len(re.findall(r"[([{]", separator))
        is_comma = bool(re.search(r"[,;|/]", separator))
        leaves_group = (depth > 0) != bool(run.groups) and not (
            is_comma and run.groups and _has_region_name(text, run.start)
        )
        if leaves_group or (has_commas and not is_new_group and depth == 0 and separator.isspace()):
            yield run
            run, has_commas = _NumberRun(token.end(), token.end()), False
        elif len(run.numbers) == 1:
            has_commas = is_comma
    yield run


def _has_region_name(text: str, start: int) -> bool:
    name, _ = _find_name(text, start, 0)
    return bool(_BOX_WORD.fullmatch(name) or _POINT_WORD.fullmatch(name))


def _find_name(text: str, start: int, end: int) -> tuple[str, int]:
    """Return the word that names the numbers at `start`, and its position; "" if no word after `end` names them.

    Words such as "is" and "of" are skipped. In "box coordinates", the name is "box".
    """
    search_start = max(end, start - _MAX_NAME_DISTANCE)
    name, name_start = "", start
    for match in reversed(list(_WORD.finditer(text, search_start, start))):
        word = match[0].rstrip("-_")
        if _LOCATION_WORD.fullmatch(word):
            name, name_start = name or word, match.start() if not name else name_start
        elif word not in _CONNECTING_WORDS:
            is_region_word = (
                _BOX_WORD.fullmatch(word) or _POINT_WORD.fullmatch(word) or _OTHER_ORDER_WORD.fullmatch(word)
            )
            if is_region_word or (not name and _SIZE_WORD.fullmatch(word)):
                return word, match.start()
            break
    return name, name_start


def _parse_run(text: str, run: _NumberRun, search_start: int, reject_ambiguous: bool) -> _RegionMention | None:
    """Convert a run to a box or points; None if it is not coordinates, InputError if it is and cannot be read."""
    num_numbers = len(run.numbers)
    name, name_start = _find_name(text, run.start, search_start)
    is_assigned = bool(re.search(r"[:=]\W*$", text[max(name_start, run.start - _MAX_NAME_DISTANCE) : run.start]))
    is_point = bool(_POINT_WORD.fullmatch(name)) and not _OTHER_ORDER_WORD.fullmatch(name)
    is_box = bool(_BOX_WORD.fullmatch(name)) and not _OTHER_ORDER_WORD.fullmatch(name)
    if num_numbers == 1 and not (is_assigned and (is_point or is_box)):
        return None
    if num_numbers == 1 and name.endswith("s"):  # "points: 3"
        return None
    if _SIZE_WORD.fullmatch(name) and num_numbers < 4:
        return None
    if (
        is_point
        and not run.groups
        and _is_count_of_others(text[max(0, name_start - _MAX_NAME_DISTANCE) : name_start], num_numbers)
    ):
        return None
    is_unmarked = not (is_box or is_point or _OTHER_ORDER_WORD.fullmatch(name)) and _is_unmarked(text, run, name)
    if is_unmarked and not _is_alone(text, run):
        if reject_ambiguous and _may_be_box(text, run):
            raise InputError(
                f"it is unclear whether the numbers {_shorten_text(text[run.start : run.end])} are a region; if so, "
                f"{_BOX_HINT}; if not, write the numbers as words"
            )
        return None
    order = _parse_edge_order(text[max(search_start, run.start - _MAX_NAME_DISTANCE) : run.start])
    if _OTHER_ORDER_WORD.fullmatch(name) or order not in _BOX_ORDERS:
        raise InputError(f"{_shorten_text(text[name_start : run.end])} is not a box x1,y1,x2,y2; {_BOX_HINT}")
    if is_point:
        return _RegionMention(name_start, run.end, None, _numbers_to_points(text[name_start : run.end], run))
    if num_numbers == 4:
        return _RegionMention(name_start if is_box else run.start, run.end, _numbers_to_box(run.numbers), ())
    raise InputError(
        f"{_shorten_text(text[name_start : run.end])} has {_format_number_count(run)} instead of 4; {_BOX_HINT}, or "
        f"{_POINT_HINT.removeprefix('write ')}"
    )


def _is_count_of_others(text: str, num_numbers: int) -> bool:
    """Return whether a text ends with a count of points that does not match, as in "3 points: 10, 20 words"."""
    match = re.search(r"(?:^|[^\W\d_]\s+)(\d+)\s+(?:[^\W\d_]+\s+)?$", text)
    return match is not None and num_numbers != 2 * int(match[1])


def _may_be_box(text: str, run: _NumberRun) -> bool:
    """Return whether unmarked numbers form a nonempty box x1 y1 x2 y2 and are not amounts of money."""
    numbers = re.split(r"[ \t,;|*]+", text[run.start : run.end])
    if text[: run.start].endswith(("$", "\N{EURO SIGN}", "\N{POUND SIGN}")) or len(numbers) != 4:
        return False
    if not all(re.fullmatch(r"\d+(?:\.\d+)?(?:px)?", number) for number in numbers):
        return False
    x1, y1, x2, y2 = (float(number.removesuffix("px")) for number in numbers)
    return x1 < x2 and y1 < y2


def _is_unmarked(text: str, run: _NumberRun, name: str) -> bool:
    """Return whether numbers have no mark of coordinates: a name, brackets around several, or "1,2 to 3,4"."""
    numbers = text[run.start : run.end]
    if name in ("", "at") and re.search(r"\d/\d", numbers):  # a date
        return True
    if (
        name
        or _parse_edge_order(text[max(0, run.start - _MAX_NAME_DISTANCE) : run.start])
        or _CORNER_PAIR.fullmatch(numbers)
    ):
        return False
    return max(map(len, run.groups), default=0) < 2


def _is_alone(text: str, run: _NumberRun) -> bool:
    """Return whether numbers are the only content of the text or, if there are four, of their line."""
    if re.search(r"\d/\d", text[run.start : run.end]):
        return False
    start, end = 0, len(text)
    if len(run.numbers) == 4 and "\n" not in text[run.start : run.end]:
        start = text.rfind("\n", 0, run.start) + 1
        end = text.find("\n", run.end) if "\n" in text[run.end :] else end
    return not re.search(r"\w", text[start : run.start] + text[run.end : end])


def _parse_edge_order(text: str) -> list[str]:
    """Return the last four words of a text if all of them name coordinates, else an empty list."""
    names = [match[0] for match in _WORD.finditer(text)][-4:]
    is_order = len(names) == 4 and all(re.fullmatch(_EDGE_NAMES, name) for name in names)
    return [_normalize_edge_name(name) for name in names] if is_order else []


def _format_number_count(run: _NumberRun) -> str:
    return "1 number" if len(run.numbers) == 1 else f"{len(run.numbers)} numbers"


def _numbers_to_points(text: str, run: _NumberRun) -> tuple[Point, ...]:
    """Convert numbers to one point, or to one per pair of brackets."""
    if len(run.numbers) in (1, 2, 3) and len(run.groups) < 2:
        return (_numbers_to_point(run.numbers),)
    if run.groups and sum(map(len, run.groups)) == len(run.numbers) and {len(each) for each in run.groups} <= {2, 3}:
        return tuple(map(_numbers_to_point, run.groups))
    raise InputError(f"{_shorten_text(text)} is not a point x,y or a list of points [[x,y],[x,y]]; {_POINT_HINT}")


def _numbers_to_point(numbers: Sequence[str]) -> Point:
    return parse_point(",".join(map(_strip_pixel_unit, numbers)))


def _numbers_to_box(numbers: Sequence[str]) -> Box:
    return parse_box(",".join(map(_strip_pixel_unit, numbers)))


def _strip_pixel_unit(number: str) -> str:
    """Remove the unit of a number in pixels; raise InputError for percentages."""
    if number.endswith("%"):
        raise InputError(f"the coordinate {_shorten_text(number)} is not in pixels; {_BOX_HINT}")
    return re.sub(r"\s?[a-z]+$", "", number)


def _shorten_text(text: str) -> str:
    """Quote a text on one line with at most 60 characters."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
