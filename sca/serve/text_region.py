"""The region that the text of a chat message contains, in the spellings that clients use.

A box is `box=10,20,30,40`, `Box: [10, 20, 30, 40]`, `"bbox_2d": [...]`, `<box>...</box>`, `(10,20),(30,40)`, four
numbers in brackets or in a line of their own, or `x1=10, y1=20, x2=30, y2=40`; a point is `point=10,20` or
`point=10,20,0`. Other coordinates, and boxes whose text names another order such as xywh, are errors: a region is never
ignored silently. Four numbers in a sentence, such as "the classes 1, 2, 3, 4", are not a region.
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
_SIZED = rf"(?<![\w.]){_NUMBER}(?:px|(?!\w)(?:\s?(?:px|pixels?)\b|\s?%)?+)"  # a number and its unit
_JOINT = r"(?:[\s,;|()\[\]{}<>/\"'`&*]|->|(?<=[)\]}])\s*+-\s*+(?=[(\[{])|\b(?:and|to)\b)"
_RUN = re.compile(rf"{_SIZED}(?:{_JOINT}++{_SIZED})*+")
_TOKEN = re.compile(rf"(?P<number>{_SIZED})|(?P<joint>{_JOINT}++)")
_KEYS = (
    r"[xy](?:_?(?:min|max|[0-2]))?|c_?[xy]|[xy]_?c(?:ent(?:er|re))?|cent(?:er|re)_?[xy]|left|top|right|bottom"
    r"|width|height|[wh]|label"
)
_NAMED = re.compile(rf"(?<![\w.])({_KEYS})[\"'`]?(\s*[:=]\s*|\s+(?:is\s+|at\s+)?)[\"'`]?({_SIZED})")
_BETWEEN_NAMED = re.compile(rf"(?:{_JOINT}|[-\N{{BULLET}}])*+")
_WORD = re.compile(r"[^\W\d][\w-]*")

_CONNECTING = {"a", "an", "are", "at", "by", "for", "from", "image", "in", "is", "of", "on", "the", "with"}
_PLACE = re.compile(
    r"at|xy|co-?ordinates?|coords?|pos(?:itions?)?|loc(?:ations?)?|regions?|areas?|crops?|windows?|zones?"
    r"|bounds|selections?"
)
_BOX = re.compile(r"(?:.*[_-])?(?:b?box(?:es)?|bounding-?box(?:es)?|rect(?:angle)?s?|rois?|xyxy|ltrb)(?:[_-].*|\d?d?)")
_POINT = re.compile(r"(?:.*[_-])?(?:(?:key)?points?|pts?|clicks?|pixels?)(?:[_-].*|\d?d?)")
_SIZE = re.compile(r"(?:.*[_-])?(?:sizes?|resolutions?|dimensions?|shapes?)")
_OTHER_ORDER = re.compile(  # names of numbers that are not x1, y1, x2, y2
    r"box_?2d|(?:.*[_-])?(?:xywh|cxcywh|ltwh|tlwh|yxyx)|h|height|x2|x_?max|right|(?:.*[_-])?(?:poly(?:gon)?|segmentation)s?"
)
_ORDER_NAMED_APART = re.compile(  # an order other than x1, y1, x2, y2, before or after the numbers of a box
    r"(?<![a-z\d])(?:c?xc?ywh|xyhw|ltwh|tlwh|yxyx|yxhw)(?![a-z])"
    r"|(?:\b(?:in|as|format|mode|order|style|type)\W{1,8}|\()(?:coco|yolo)(?:v?\d+)?\b"
    r"|\b(?:coco|yolo)(?:v?\d+)?[\s_-]+(?:format|style|order|convention|notation|b?box)"
    r"|(?<!\w)(?:(?:c_?|center_?)?x\W{1,3}(?:c_?|center_?)?y|x_?[01c]\W{1,3}y_?[01c]|x_?min\W{1,3}y_?min|left\W{1,3}top)"
    r"\W{1,3}(?:w(?:idth)?\W{1,3}(?:and\s)?h(?:eight)?|h(?:eight)?\W{1,3}(?:and\s)?w(?:idth)?)\b"
    r"|(?<!\w)(?:y\W{1,3}x\W{1,3}y\W{1,3}x|y_?(?:1\W{1,3}x_?1|0\W{1,3}x_?0|min\W{1,3}x_?min)"
    r"|x_?(?:1\W{1,3}x_?2|0\W{1,3}x_?1|min\W{1,3}x_?max)|top\s*,\s*left\s*,\s*bottom)\b"
)
_RANGE = (  # of the numbers of an axis, after its name
    rf"(?=[\s:=])\s*+(?:[:=]|from|between|in|is|of)?+\s*+{_NUMBER}\s*+(?:to|and|-|:|\.\.+|\N{{EN DASH}})\s*+{_NUMBER}"
)
_CORNER = rf"(?<![\w.,])(?!\d,\d{{3}}\b|\d+,0\d\d\b){_NUMBER}\s*,\s*{_NUMBER}"  # not 1,200 or 12,000
_UNREADABLE = re.compile(  # tokens for places, a mask, a slice of an array, a geometry of X11, ranges, numbers with "-"
    r"<(?:loc|patch_index|bin|coord|seg|[xy])_?\d+>|(?<!\w)mask\s*=\s*\S+"
    r"|[\[(]\s*\d+\s*:\s*\d+\s*,\s*\d+\s*:\s*\d+|(?<!\w)\d+(?:x\d+){3}|(?<!\w)\d+x\d+[-+]\d+[-+]\d+"
    rf"|(?<![\w.])(?<!\d )[xy]{_RANGE}|(?<!\w)rows?{_RANGE}\W{{1,3}}(?:and\s)?col(?:umn)?s?{_RANGE}"
    rf"|(?<!\w)col(?:umn)?s?{_RANGE}\W{{1,3}}(?:and\s)?rows?{_RANGE}"
    r"|(?<!\w)(?:b?box|rect(?:angle)?|roi|region|area|crop|selection|coord(?:inate)?s|xyxy)\W{0,4}"
    r"\d+(?:\.\d+)?(?:\s?[-\N{EN DASH}_:]\s?\d+(?:\.\d+)?){3}"
    rf"|{_CORNER}\s*[-\N{{EN DASH}}]\s*{_NUMBER}\s*,\s*{_NUMBER}"
    rf"|(?<!\w)cent(?:er|re)\s*[:=]\s*{_NUMBER}[\s,;]+{_NUMBER}"
)
_CORNERS = re.compile(rf"{_CORNER}(?:px)?\s+to\s+{_SIZED}\s*,\s*{_SIZED}")
_NO_REGION = re.compile(  # a color, bullet points, a number of things as in "box: 2 sentences"
    r"\b(?:rgb|hs[lv])a?\s?\([^()]{0,60}\)|\bcmyk\s?\([^()]{0,60}\)|\b(?:bullet|talking|main|selling)[\s-]?points?\b"
    r"|\b(?:b?box(?:es)?|points?)\s?:\s?\d+(?:\s?(?:-|or)\s?\d+)?\s(?!(?:px|pixels?|and|to|by|x|y)\b)(?=[^\W\d_])"
)
_ASCII_SIGNS = {0xFF01 + offset: 0x21 + offset for offset in range(94)}  # of full-width signs
_ASCII_SIGNS |= str.maketrans(
    "\N{MINUS SIGN}\N{LEFT BLACK LENTICULAR BRACKET}\N{RIGHT BLACK LENTICULAR BRACKET}", "-[]"
)
_GLUED = re.compile(r"(?<!\w)(b?box|point|region)(?=\d+\s*[,;])")  # to its first number
_ESCAPE = re.compile(r"\\[nrt\"']")  # of a text in JSON that is in JSON again
_ASSIGNED = re.compile(r"(?<!\w)(?:b?box(?:_2d)?|point(?:_2d)?)[\"'`]?\s*[:=][\s\"'`(\[{<|>]*([^\s\"'`)\]}>|]{1,40})")
MAX_NUMBERS = 2048  # of a text; a region has at most 256 points of 3 numbers
_TAIL = 60  # characters before numbers in which the word is that names them

_BOX_ORDERS = ([], ["x1", "y1", "x2", "y2"], ["x0", "y0", "x1", "y1"])  # names of the numbers of a box, if any
_WRITE_BOX = "write box=x1,y1,x2,y2 in pixels"
_WRITE_POINT = "write point=x,y in pixels"


class TextRegion(NamedTuple):
    """What a text points at: a box, points, or both."""

    box: Box | None
    points: tuple[Point, ...]


class _Mention(NamedTuple):
    """A box or some points, and where in the text they are."""

    start: int
    end: int
    box: Box | None
    points: tuple[Point, ...]


@dataclass
class _Run:
    """Numbers that belong together. groups: those in each pair of innermost brackets; empty without brackets."""

    start: int
    end: int
    numbers: list[str] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)

    def add(self, number: re.Match[str], is_inside: bool, is_new_group: bool) -> None:
        self.numbers.append(number[0])
        self.end = number.end()
        if is_inside:
            if is_new_group or not self.groups:
                self.groups.append([])
            self.groups[-1].append(number[0])


def find_region(text: str, refuse_bare: bool = True) -> TextRegion | None:
    """Find the region in a text.

    Args:
        text: What a person or a program wrote, in any case, with ASCII or full-width signs.
        refuse_bare: Refuse four numbers in a sentence that may be a box or anything else, such as "1,2,3,4".

    Returns:
        The region, in the pixels that the text states; None if nothing in the text looks like coordinates.

    Raises:
        InputError: If the text contains several regions, or what looks like coordinates and cannot be read.
    """
    text = text.translate(_ASCII_SIGNS).casefold()
    text = _GLUED.sub(r"\1 ", _ESCAPE.sub("  ", text))
    text = _NO_REGION.sub(lambda found: "_" * len(found[0]), text)
    count = len(re.findall(r"\d+", text))
    if count > MAX_NUMBERS:
        raise InputError(
            f"the text has {count:,} numbers, and {MAX_NUMBERS:,} are searched for a region; send less text"
        )
    if found := _UNREADABLE.search(text):
        raise InputError(f"the text {_show(found[0])} is not a region that can be read; {_WRITE_BOX}")
    named = list(_read_named(text))
    for mention in named:
        text = f"{text[: mention.start]}{' ' * (mention.end - mention.start)}{text[mention.end :]}"
    unnamed = list(_read_runs(text, refuse_bare))
    if any(mention.box for mention in unnamed) and (found := _ORDER_NAMED_APART.search(text)):
        raise InputError(f"the text has a box and {_show(found[0])}, which is not x1,y1,x2,y2; {_WRITE_BOX}")
    mentions = sorted([*named, *unnamed])
    _check_assigned(text, mentions)
    return _join(text, mentions)


def _join(text: str, mentions: Sequence[_Mention]) -> TextRegion | None:
    """One region of what stands side by side; InputError for several regions."""
    if not mentions:
        return None
    boxes = [each.box for each in mentions if each.box]
    if len(boxes) > 1:
        raise InputError("the text contains more than one box; send one request per box, or all to /v1/captions")
    for one, other in pairwise(mentions):
        if re.search(r"\w", text[one.end : other.start]):
            raise InputError(
                f"the text has {len(mentions)} regions and a request has one; send one request for each, or write "
                "box=x1,y1,x2,y2;point=x,y for the parts of one region"
            )
    return TextRegion(boxes[0] if boxes else None, tuple(point for each in mentions for point in each.points))


def _check_assigned(text: str, mentions: Sequence[_Mention]) -> None:
    """Refuse `box=` and `point=` whose value has digits and was not read; names alone, as in box=x1,y1, are words."""
    for found in _ASSIGNED.finditer(text):
        rest = re.sub(rf"(?<![^\W_])(?:{_KEYS})(?![^\W_])", "", found[1])
        if re.search(r"\d", rest) and not any(each.start <= found.start(1) < each.end for each in mentions):
            raise InputError(f"the text {_show(found[0])} is not a region that can be read; {_WRITE_BOX}")


# --- numbers with names ----------------------------------------------------------------------------------------------


def _read_named(text: str) -> Iterator[_Mention]:
    """Read `x1=10, y1=20, x2=30, y2=40`, `{"x": 10, "y": 20, "width": 5, "height": 5}` and `x=10, y=20`."""
    unread = []
    for group in _group_named(text):
        values = {_simplify(match[1]): match[3] for match in group}
        start, end = group[0].start(), group[-1].end()
        is_point = bool(re.fullmatch("points?", _find_name(text, start, 0)[0]))
        is_one = len(values) == len(group) and not (is_point and len(values) > 3)
        mention = _read_values(values, start, end) if is_one else None
        if mention is not None:
            yield mention
        else:
            unread += [match for match in group if _simplify(match[1]) not in ("w", "h", "label")]
    if len(unread) > 2 or sum(bool(match[2].strip(" isat\n\t")) for match in unread) > 1:
        raise InputError(f"the text {_show(' '.join(each[0] for each in unread))} is not a region; {_WRITE_BOX}")


def _group_named(text: str) -> Iterator[list[re.Match[str]]]:
    """Numbers with names that are next to each other."""
    group: list[re.Match[str]] = []
    for match in _NAMED.finditer(text):
        if group and _BETWEEN_NAMED.match(text, group[-1].end()).end() != match.start():  # type: ignore[union-attr]
            yield group
            group = []
        group.append(match)
    if group:
        yield group


def _simplify(key: str) -> str:
    """One name for each edge, of those that mean the same."""
    key = key.replace("_", "")
    edges = {"left": "x1", "xmin": "x1", "top": "y1", "ymin": "y1"}
    edges |= dict.fromkeys(("xc", "xcenter", "xcentre", "centerx", "centrex"), "cx")
    edges |= dict.fromkeys(("yc", "ycenter", "ycentre", "centery", "centrey"), "cy")
    edges |= {"right": "x2", "xmax": "x2", "bottom": "y2", "ymax": "y2", "width": "w", "height": "h"}
    return edges.get(key, key)


def _read_values(values: dict[str, str], start: int, end: int) -> _Mention | None:
    """A box or a point of named values; None for other names."""
    names = frozenset(values)
    if names == {"x", "y"} or names == {"x", "y", "label"}:
        return _Mention(start, end, None, (_to_point([values[name] for name in ("x", "y", "label") if name in names]),))
    if names == {"x0", "y0", "x1", "y1"}:
        return _Mention(start, end, _to_box([values[name] for name in ("x0", "y0", "x1", "y1")]), ())
    if names == {"x1", "y1", "x2", "y2"}:
        return _Mention(start, end, _to_box([values[name] for name in ("x1", "y1", "x2", "y2")]), ())
    for x, y in (("x", "y"), ("x1", "y1")):
        if names == {x, y, "w", "h"}:
            left, top, width, height = _to_box([values[name] for name in (x, y, "w", "h")])
            return _Mention(start, end, (left, top, left + width, top + height), ())
    if names == {"cx", "cy", "w", "h"}:
        x, y, width, height = _to_box([values[name] for name in ("cx", "cy", "w", "h")])
        return _Mention(start, end, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), ())
    return None


# --- numbers in a row ------------------------------------------------------------------------------------------------


def _read_runs(text: str, refuse_bare: bool) -> Iterator[_Mention]:
    end = 0
    for match in _RUN.finditer(text):
        for run in _split(text, match):
            mention = _read_run(text, run, end, refuse_bare)
            if mention is not None:
                yield mention
            end = run.end


def _split(text: str, match: re.Match[str]) -> Iterator[_Run]:
    """Runs of one kind: a number beside a bracket, or after a space where others have commas, is another thing."""
    opening = re.search(r"[\s([{\"'`<|]*$", text[max(0, match.start() - _TAIL) : match.start()])
    depth = len(re.findall(r"[([{]", opening[0])) if opening else 0
    run, has_commas, is_new_group = _Run(match.start(), match.start()), False, True
    for token in _TOKEN.finditer(text, match.start(), match.end()):
        if token["number"]:
            run.add(token, depth > 0, is_new_group)
            is_new_group = False
            continue
        joint = token[0]
        is_new_group = bool(re.search(r"[()\[\]{}]", joint))
        depth = max(0, depth - len(re.findall(r"[)\]}]", joint))) + len(re.findall(r"[([{]", joint))
        is_comma = bool(re.search(r"[,;|/]", joint))
        leaves = (depth > 0) != bool(run.groups) and not (is_comma and run.groups and _is_named(text, run.start))
        if leaves or (has_commas and not is_new_group and depth == 0 and joint.isspace()):
            yield run
            run, has_commas = _Run(token.end(), token.end()), False
        elif len(run.numbers) == 1:
            has_commas = is_comma
    yield run


def _is_named(text: str, start: int) -> bool:
    word, _ = _find_name(text, start, 0)
    return bool(_BOX.fullmatch(word) or _POINT.fullmatch(word))


def _find_name(text: str, start: int, end: int) -> tuple[str, int]:
    """The word that names the numbers at `start`, and its place; "" if there is none after `end`.

    Words such as "is" and "of" are skipped; "box" is preferred to "coordinates" in "box coordinates".
    """
    begin = max(end, start - _TAIL)
    found, place = "", start
    for match in reversed(list(_WORD.finditer(text, begin, start))):
        word = match[0].rstrip("-_")
        if _PLACE.fullmatch(word):
            found, place = found or word, match.start() if not found else place
        elif word not in _CONNECTING:
            hard = _BOX.fullmatch(word) or _POINT.fullmatch(word) or _OTHER_ORDER.fullmatch(word)
            if hard or (not found and _SIZE.fullmatch(word)):
                return word, match.start()
            break
    return found, place


def _read_run(text: str, run: _Run, end: int, refuse_bare: bool) -> _Mention | None:
    """A box or points; None for numbers that do not look like coordinates; InputError for those that do."""
    count = len(run.numbers)
    name, place = _find_name(text, run.start, end)
    is_assigned = bool(re.search(r"[:=]\W*$", text[max(place, run.start - _TAIL) : run.start]))
    is_point = bool(_POINT.fullmatch(name)) and not _OTHER_ORDER.fullmatch(name)
    is_box = bool(_BOX.fullmatch(name)) and not _OTHER_ORDER.fullmatch(name)
    if count == 1 and not (is_assigned and (is_point or is_box)):
        return None
    if count == 1 and name.endswith("s"):  # "points: 3"
        return None
    if _SIZE.fullmatch(name) and count < 4:
        return None
    if is_point and not run.groups and _counts_others(text[max(0, place - _TAIL) : place], count):
        return None
    is_bare = not (is_box or is_point or _OTHER_ORDER.fullmatch(name)) and _is_bare(text, run, name)
    if is_bare and not _is_alone(text, run):
        if refuse_bare and _may_be_box(text, run):
            raise InputError(
                f"the numbers {_show(text[run.start : run.end])} may be a region; if they are, {_WRITE_BOX}, and if "
                "not, spell them out"
            )
        return None
    order = _read_order(text[max(end, run.start - _TAIL) : run.start])
    if _OTHER_ORDER.fullmatch(name) or order not in _BOX_ORDERS:
        raise InputError(f"the text {_show(text[place : run.end])} is not x1,y1,x2,y2; {_WRITE_BOX}")
    if is_point:
        return _Mention(place, run.end, None, _to_points(text[place : run.end], run))
    if count == 4:
        return _Mention(place if is_box else run.start, run.end, _to_box(run.numbers), ())
    raise InputError(
        f"the text {_show(text[place : run.end])} has {_count(run)} and a box has 4; {_WRITE_BOX}, or "
        f"{_WRITE_POINT.removeprefix('write ')}"
    )


def _counts_others(text: str, count: int) -> bool:
    """Whether a text ends with a number, as of "3 points: 10, 20 words", of points that `count` numbers are not."""
    found = re.search(r"(?:^|[^\W\d_]\s+)(\d+)\s+(?:[^\W\d_]+\s+)?$", text)
    return found is not None and count != 2 * int(found[1])


def _may_be_box(text: str, run: _Run) -> bool:
    """Whether bare numbers are x1 y1 x2 y2 of a box with an area, and no amount of money."""
    numbers = re.split(r"[ \t,;|*]+", text[run.start : run.end])
    if text[: run.start].endswith(("$", "\N{EURO SIGN}", "\N{POUND SIGN}")) or len(numbers) != 4:
        return False
    if not all(re.fullmatch(r"\d+(?:\.\d+)?(?:px)?", number) for number in numbers):
        return False
    x1, y1, x2, y2 = (float(number.removesuffix("px")) for number in numbers)
    return x1 < x2 and y1 < y2


def _is_bare(text: str, run: _Run, name: str) -> bool:
    """Whether nothing marks numbers as coordinates: no name, no brackets around several of them, no "1,2 to 3,4"."""
    numbers = text[run.start : run.end]
    if name in ("", "at") and re.search(r"\d/\d", numbers):  # a date
        return True
    if name or _read_order(text[max(0, run.start - _TAIL) : run.start]) or _CORNERS.fullmatch(numbers):
        return False
    return max(map(len, run.groups), default=0) < 2


def _is_alone(text: str, run: _Run) -> bool:
    """Whether numbers are all there is in a text or, if they are four, in its line."""
    if re.search(r"\d/\d", text[run.start : run.end]):
        return False
    start, end = 0, len(text)
    if len(run.numbers) == 4 and "\n" not in text[run.start : run.end]:
        start = text.rfind("\n", 0, run.start) + 1
        end = text.find("\n", run.end) if "\n" in text[run.end :] else end
    return not re.search(r"\w", text[start : run.start] + text[run.end : end])


def _read_order(text: str) -> list[str]:
    """The last four words of a text if all of them name coordinates."""
    names = [match[0] for match in _WORD.finditer(text)][-4:]
    is_order = len(names) == 4 and all(re.fullmatch(_KEYS, name) for name in names)
    return [_simplify(name) for name in names] if is_order else []


def _count(run: _Run) -> str:
    return "1 number" if len(run.numbers) == 1 else f"{len(run.numbers)} numbers"


def _to_points(text: str, run: _Run) -> tuple[Point, ...]:
    """One point, or one of each pair of brackets."""
    if len(run.numbers) in (1, 2, 3) and len(run.groups) < 2:
        return (_to_point(run.numbers),)
    if run.groups and sum(map(len, run.groups)) == len(run.numbers) and {len(each) for each in run.groups} <= {2, 3}:
        return tuple(map(_to_point, run.groups))
    raise InputError(f"the text {_show(text)} is not x,y or [[x,y],[x,y]]; {_WRITE_POINT}")


def _to_point(numbers: Sequence[str]) -> Point:
    return parse_point(",".join(map(_without_unit, numbers)))


def _to_box(numbers: Sequence[str]) -> Box:
    return parse_box(",".join(map(_without_unit, numbers)))


def _without_unit(number: str) -> str:
    """The digits of a number in pixels; InputError for one in percent."""
    if number.endswith("%"):
        raise InputError(f"the coordinate {_show(number)} is not in pixels; {_WRITE_BOX}")
    return re.sub(r"\s?[a-z]+$", "", number)


def _show(text: str) -> str:
    """A part of a text on one line, not too long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
