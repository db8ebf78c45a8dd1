"""Region parser: regions in chat text are parsed in common notations, or rejected; none is ignored."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sca.io.errors import InputError
from sca.serve.region_parser import find_region, remove_region

BOX = (370.0, 434.0, 448.0, 512.0)
BOXES = [
    "box=370,434,448,512",
    "box=[370,434,448,512]",
    "box: 370,434,448,512",
    "Box=370,434,448,512",
    "Box: 370, 434, 448, 512",
    "box = (370, 434, 448, 512)",
    "box 370 434 448 512",
    "box=370;434;448;512;",
    "box=|370|434|448|512|",
    "box=[ 370.0 , 434. , 4.48e2 , 512 ]",
    "box=370px,434px,448px,512px",
    "box: 370 px, 434 px, 448 px, 512 px",
    "box：［３７０，４３４，４４８，５１２］",
    "What is at box=370,434,448,512?",
    "What is at box=370,434,448,512.",
    "box=370,434,448,512 in 2 words",
    '{"bbox_2d": [370, 434, 448, 512]}',
    '```json\n[{"bbox_2d": [370, 434, 448, 512], "label": "dog"}]\n```',
    '"box": "370,434,448,512"',
    "'box': [370, 434, 448, 512]",
    "bbox_xyxy: [370,434,448,512]",
    "bounding box: [370, 434, 448, 512]",
    "bounding box coordinates: 370, 434, 448, 512",
    "boundingBox: {370,434,448,512}",
    "The bounding box is (370,434)-(448,512)",
    "box:\n  370\n  434\n  448\n  512",
    "Region: 370,434,448,512",
    "ROI=370,434,448,512",
    '<area shape="rect" coords="370,434,448,512">',
    "<box>370,434,448,512</box>",
    "<box>[[370,434,448,512]]</box>",
    "<box>(370,434),(448,512)</box>",
    "<|box_start|>(370,434),(448,512)<|box_end|>",
    "<bbox>370 434 448 512</bbox>",
    "[370, 434, 448, 512]",
    "(370, 434, 448, 512)",
    "[370. 434. 448. 512.]",
    "What is this?\n370, 434, 448, 512\nIn 2 words.",
    "cx=409 cy=473 w=78 h=78",
    '{"x_center": 409, "y_center": 473, "width": 78, "height": 78}',
    "box=370/434/448/512",
    "x1, y1, x2, y2: 370, 434, 448, 512",
    "from 370,434 to 448,512",
    "box=370,434,448,512 (x1, y1, x2, y2)",
    "box=370,434,448,512 of an image in the COCO dataset",
    '{"x": 370, "y": 434, "width": 78, "height": 78, "format": "xywh"}',
    "[[370, 434], [448, 512]]",
    "from (370,434) to (448,512)",
    "1. [370, 434, 448, 512]",
    "describe 2 things in [370, 434, 448, 512], 3 words each",
    "370,434,448,512",
    "370 434 448 512",
    "x1=370, y1=434, x2=448 and y2=512",
    '{"x1": 370, "y1": 434, "x2": 448, "y2": 512}',
    "xmin: 370 ymin: 434 xmax: 448 ymax: 512",
    "left=370, top=434, right=448, bottom=512",
    '{"x": 370, "y": 434, "width": 78, "height": 78}',
    '{"left": 370, "top": 434, "width": 78, "height": 78}',
    '<rect x="370" y="434" width="78" height="78"/>',
    "x1 370 y1 434 x2 448 y2 512",
    "left 370, top 434, right 448, bottom 512",
    "- x1: 370\n- y1: 434\n- x2: 448\n- y2: 512",
    '{\\"bbox_2d\\": [\\n370,\\n434,\\n448,\\n512]}',
    "| 370 | 434 | 448 | 512 |",
    "**370**, **434**, **448**, **512**",
    "{<370><434><448><512>}",
    "<|begin_of_box|>[[370,434,448,512]]<|end_of_box|>",
    "<|det|>[[370, 434, 448, 512]]<|/det|>",
    "Box370,434,448,512",
    "BBOX(370,434,448,512)",
    "box: 370 434, 448 512",
    "(xmin, ymin, xmax, ymax) = (370, 434, 448, 512)",
    "box1=370,434,448,512",
    "[x1, y1, x2, y2] = [370, 434, 448, 512]",
    "the box [370,434,448,512] of the 512 x 512 image, size (512, 512)",
    "boxes are box=x1,y1,x2,y2; describe box=370,434,448,512",
]
POINTS = {
    "point=10,20": [(10, 20, 1)],
    "point=10,20,0;point=3,4": [(10, 20, 0), (3, 4, 1)],
    "Point: (10, 20)": [(10, 20, 1)],
    "point=(10,20),0": [(10, 20, 0)],
    "points=[[10,20,1],[3,4,0]]": [(10, 20, 1), (3, 4, 0)],
    "points (10,20) and (3,4)": [(10, 20, 1), (3, 4, 1)],
    "<point>10 20</point>": [(10, 20, 1)],
    '{"point_2d": [10, 20]}': [(10, 20, 1)],
    '<point x="10" y="20" alt="dog">dog</point>': [(10, 20, 1)],
    '{"point_coords": [[10, 20]]}': [(10, 20, 1)],
    "x=10, y=20": [(10, 20, 1)],
    "click (10, 20)": [(10, 20, 1)],
    "1 point: 10, 20": [(10, 20, 1)],
    "at most 2 points: (10, 20), (3, 4)": [(10, 20, 1), (3, 4, 1)],
}
REJECTED = {
    "box=1,2,3": "has 3 numbers instead of 4; write box=x1,y1,x2,y2",
    "box=1": "has 1 number instead",
    "box=1,2,3,4,5": "has 5 numbers",
    "box=1,2,3,4 box=5,6,7,8": "more than one box; send one request per box",
    "box=1,2,3,4 and [5,6,7,8]": "more than one box; send one request per box",
    "[[1,2,3,4],[5,6,7,8]]": "has 8 numbers",
    "box=1,2,3,4 but not point=3,4": "2 regions",
    "point=1,2 versus point=3,4": "2 regions",
    "box_2d: [1,2,3,4]": "is not a box x1,y1,x2,y2",
    "xywh=1,2,3,4": "is not a box x1,y1,x2,y2",
    "[x, y, w, h] = [1,2,3,4]": "is not a box x1,y1,x2,y2",
    "[y1, x1, y2, x2] = [1,2,3,4]": "is not a box x1,y1,x2,y2",
    "polygon: 1,2,3,4,5,6": "is not a box x1,y1,x2,y2",
    "<loc_12><loc_13><loc_14><loc_15>": "cannot parse",
    "img[434:512, 370:448]": "cannot parse",
    "448x512+370+434": "cannot parse",
    '<points x1="1" y1="2" x2="3" y2="4">': "cannot parse",
    "x: 370-448, y: 434-512": "cannot parse",
    '{"topLeft": {"x": 370, "y": 434}, "bottomRight": {"x": 448, "y": 512}}': "2 regions",
    "left 370 and then top 434 as well as right 448": "cannot parse",
    f"box={'1,' * 3000}2": "contains 3,001 numbers; shorten it to at most 2,048",
    "(xmin, xmax, ymin, ymax) = (1, 2, 3, 4)": "is not a box x1,y1,x2,y2",
    "top, left, bottom, right: 1, 2, 3, 4": "is not a box x1,y1,x2,y2",
    "mask=a.png": "cannot parse",
    "box=10%,20%,30%,40%": "'10%' is not in pixels",
    "(10, 20)": "has 2 numbers",
    "10,20": "has 2 numbers",
    "What is at (10, 20)?": "has 2 numbers",
    "What is at 10, 20?": "has 2 numbers",
    "coordinates: 10, 20": "has 2 numbers",
    "[0.1, 0.2]": "has 2 numbers",
    "1,2,3,4,5,6": "has 6 numbers",
    "top-left (370,434), bottom-right (448,512)": "has 2 numbers",
    "box=10x20x30x40": "cannot parse",
    "box=a,2,3,4": "has 3 numbers",
    "box=nan,1,2,3": "",
    "box: 370-434-448-512": "",
    "box=1e999,2,3,4": "not a finite number",
    "point=1": "",
    "point=1,2,3,4": "is not a point x,y",
    "point=1,2,7": "must be 1 or 0",
    "x1=3, y1=4, x2=9": "cannot parse",
    "x=5 and further down y=6": "cannot parse",
    "from x=10,y=20 to x=30,y=40": "cannot parse",
    "between x=10 and x=30, y=20 and y=40": "cannot parse",
    "x=10 x=30": "cannot parse",
    "bbox (10,20,30,40) in x, y, width, height": "the order 'x, y, width, height' instead of x1,y1,x2,y2",
    "bbox (10,20,30,40) as left, top, width and height": "instead of x1,y1,x2,y2",
    "bbox=[10,20,30,40], format: xywh": "the order 'xywh' instead of x1,y1,x2,y2",
    '{"bbox":[10,20,30,40],"bbox_mode":"BoxMode.XYWH_ABS"}': "instead of x1,y1,x2,y2",
    "box [10,20,30,40] (x,y,w,h)": "instead of x1,y1,x2,y2",
    "box [10,20,30,40] (y1, x1, y2, x2)": "instead of x1,y1,x2,y2",
    "box [10,20,30,40] (xmin, xmax, ymin, ymax)": "instead of x1,y1,x2,y2",
    "box=[10,20,30,40] in COCO format": "instead of x1,y1,x2,y2",
    "box=[10,20,30,40], format=yolo": "instead of x1,y1,x2,y2",
    "COCO bbox [10,20,30,40]": "instead of x1,y1,x2,y2",
    "bounding box in xywh format [10,20,30,40]": "instead of x1,y1,x2,y2",
    "[10,20,30,40] cxcywh": "instead of x1,y1,x2,y2",
    "[10,20,30,40], ltwh": "instead of x1,y1,x2,y2",
    "[10,20,30,40], yxyx": "instead of x1,y1,x2,y2",
    "rows 20 to 40, cols 10 to 30": "cannot parse",
    "columns 10-30 and rows 20-40": "cannot parse",
    "x from 10 to 30, y from 20 to 40": "cannot parse",
    "box from x 10 to 30 and y 20 to 40": "cannot parse",
    "box 1-2-3-4": "cannot parse",
    "pos: 10 20": "has 2 numbers",
    "xy=10,20": "has 2 numbers",
    "center: 10 20": "cannot parse",
    "area: 10-20-30-40": "cannot parse",
    "box 1.5-2.5-3.5-4.5": "cannot parse",
    "10,20 - 30,40": "cannot parse",
    "What is at 370,434-448,512?": "cannot parse",
    "2 points: 1, 2, 3, 4": "is not a point x,y",
}
NO_REGION = [
    "",
    "What is this?",
    "Describe it in 2 or 3 words",
    "In 2023, 4 cars parked here",
    "a box of 3 things, and box 3",
    "1. caption 2. more",
    "It is 10:30 on 2024-01-02",
    "version 1.2.3 at 127.0.0.1",
    "use at most 20 words, 1-2 sentences",
    "the image is 512 x 512, its size (512, 512), width: 512, height: 512",
    "1,234 people",
    "write box=x1,y1,x2,y2 for a box",
    "3D model, 2 of them, the 2nd and 3rd",
    '{"temperature": 21}',
    "at 10 o'clock",
    "x = 5",
    "on the left 2 dogs, on the right 3 cats",
    "the top 10",
    "Call me at 555-123-4567",
    "Which of the classes 1, 2, 3, 4, 5 is it?",
    "$1,200, $3,400, 5,600",
    "12/05/20/24",
    "Taken at 12/05/20/24",
    "rgba(255, 0, 0, 1)",
    "Is it rgb(255, 0, 0)?",
    "[1][2][3][4] citation",
    "Give at most 3 points: 10, 20 words",
    "Answer in bullet points: 3 at most",
    "Answer in bullet points: 10, 20 words",
    "points: 3",
    "1,200 to 3,400 people",
    "10,000 to 20,000 people, 5,000-6,000 dogs",
    "in the center 2, 3 dogs",
    "box: 2 sentences",
    "points: 2-3 sentences",
    "box: 2-3 sentences",
    "Steps:\n1\n2\n3\n4",
    "a 2 x 3 to 4 grid",
    "rows 2 to 4 of the table",
]


@pytest.mark.parametrize("text", BOXES)
def test_find_region_parses_box_notations(text):
    assert find_region(text) == (BOX, ())


@pytest.mark.parametrize("text", POINTS)
def test_find_region_parses_points(text):
    assert find_region(text) == (None, tuple(POINTS[text]))


def test_find_region_combines_box_and_points():
    assert find_region("box=1,2,3,4;point=2,3;point=1,2,0") == ((1, 2, 3, 4), ((2, 3, 1), (1, 2, 0)))


@pytest.mark.parametrize("text", REJECTED)
def test_find_region_rejects_invalid_coordinates(text):
    with pytest.raises(InputError) as raised:
        find_region(text)
    assert REJECTED[text] in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", NO_REGION)
def test_find_region_ignores_other_numbers(text):
    assert find_region(text) is None


@pytest.mark.parametrize("text", ["What is 10,20,30,40?", "Which of the classes 1, 2, 3, 4 is it?"])
def test_find_region_rejects_ambiguous_numbers(text):
    with pytest.raises(InputError, match="are a region; if so, write box=x1,y1,x2,y2"):
        find_region(text)
    assert find_region(text, reject_ambiguous=False) is None


WORDS = st.sampled_from(
    ["what is", "the dog", "please", "in 2 words", "at", "color?", "\n", "it's", "(here)", "é", "-"]
)


@given(st.lists(WORDS, max_size=4), st.sampled_from(BOXES), st.lists(WORDS, max_size=4))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_find_region_finds_box_in_any_sentence(before, box, after):
    try:
        region = find_region(" ".join([*before, box, *after]))
    except InputError:
        return
    assert region == (BOX, ())


@given(st.text("box=point:[](){}<>|,;. 0123456789-+%exy\"'\n", max_size=60))
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_find_region_raises_only_input_errors(text):
    with suppress(InputError):
        find_region(text)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What color is box=10,20,30,40?", "What color is it?"),
        ("box=10,20,30,40: what color is it?", "what color is it?"),
        ("what color is it?\nbox=[10, 12, 60, 70]", "what color is it?"),
        ("  what  color is it ", "what color is it"),
        ("what is in box 10,20,30,40?", "what is in it?"),
        ("is x1=1,y1=2,x2=30,y2=40 red?", "is it red?"),
        ('{"box": [10,20,30,40]} what size is it?', "what size is it?"),
        ("Describe the region [10, 20, 30, 40].", "Describe it"),
        ("what color is box10,20,30,40?", "what color is it?"),
        ("what is in the box [10,20,30,40]?", "what is in it?"),
        ("what color is the car at 10,20,30,40?", "what color is the car?"),
        ("What color is <box>10,20,30,40</box>?", "What color is it?"),
        ("What color is the object in region (10, 20, 30, 40)?", "What color is the object?"),
        ("what color is the object with bbox_2d: [10,20,30,40]?", "what color is the object?"),
        ("What Größe has box=1,2,30,40?", "what grösse has it?"),
        ("box=10,20,30,40", ""),
    ],
)
def test_remove_region_leaves_the_question(text, question):
    assert remove_region(text) == question


def test_remove_region_is_linear_in_the_length_of_the_text():
    for text in ("(" * 4000, " " * 4000, "box=" * 1000, "in the box " * 300):
        assert remove_region(f"{text} [10,20,30,40] what color?").endswith("what color?")
