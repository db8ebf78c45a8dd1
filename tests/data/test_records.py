"""Records that are read piece by piece are those of the whole file, wherever it is cut."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sca.data.json_stream import LIST_START, iter_list_elements, iter_members
from sca.data.record_index import LineIndex, group_indices_by_owner, index_json_lists, read_jsonl_records

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@settings(deadline=None)
@given(
    st.dictionaries(st.text(), values, max_size=5) | st.lists(values, max_size=6),
    st.integers(1, 40),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.booleans(),
)
@pytest.mark.slow
def test_pieces_together_are_the_whole(folder, content, chunk, indent, ascii_only, mark):
    path = folder / "file.json"
    written = json.dumps(content, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if not ascii_only and written != json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "replace"):
        return  # half a character, which no file can have
    path.write_bytes(b"\xef\xbb\xbf" * mark + written)
    whole = [] if isinstance(content, list) else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sca.data.json_stream.CHUNK_BYTES", chunk)
        for key, value, start, end in iter_members(path):
            target = whole if key is None else whole.setdefault(key, []) if value is LIST_START else whole.get(key)
            if value is LIST_START:
                continue
            assert json.loads(path.read_bytes()[start:end]) == value
            if isinstance(target, list):
                target.append(value)
            else:
                whole[key] = value
    assert whole == content


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers(), max_size=3), min_size=1, max_size=4), st.data())
def test_a_file_cut_anywhere_is_named(folder, content, data):
    path = folder / "cut.json"
    whole = json.dumps(content).encode()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"cut\.json is not valid JSON: .* of \d+ bytes; was it cut off"):
        list(iter_list_elements(path))


def test_records_are_found_by_their_ids_and_grouped_by_their_owners(folder):
    path = folder / "lists.json"
    images = [{"id": 7, "name": "ü"}, {"id": 3}, {"id": -5}]
    regions = [{"id": number, "image_id": owner} for number, owner in ((4, 3), (2, 7), (9, 3))]
    path.write_text(json.dumps({"regions": regions, "info": {}, "images": images, "left": [1]}), "utf-8")
    found, kept = index_json_lists(path, {"images": ("id",), "regions": ("id", "image_id")}, ("left",), "lists")
    assert kept == {"left": [1]}
    assert [found["images"][number][0] for number in range(3)] == images
    assert found["regions"][2] == (regions[2], f"{path}: regions[2] (id 9)")
    owners = found["regions"].resolve_references("image_id", found["images"], "the images")
    assert list(group_indices_by_owner(owners, 3)) == [(0, [1]), (1, [0, 2]), (2, [])]
    assert found["images"].find_indices([3, 8, -5]).tolist() == [1, -1, 2]


def test_a_region_of_no_image_is_named(folder):
    path = folder / "lost.json"
    path.write_text('{"images": [{"id": 1}], "regions": [{"id": 5, "image_id": 1}, {"id": 6, "image_id": 2}]}')
    found, _ = index_json_lists(path, {"images": ("id",), "regions": ("id", "image_id")}, (), "lists")
    with pytest.raises(ValueError, match=r"regions\[1\] \(id 6\): image_id 2 is not among the images"):
        found["regions"].resolve_references("image_id", found["images"], "the images")


def test_lines_are_read_again_as_they_were(folder):
    path = folder / "lines.jsonl"
    path.write_bytes('{"id": 3, "caption": "größer"}\n\n\ufeff{"id": 1}\r\n{"id": 2}'.encode())
    lines = LineIndex(path, str(path), ("id", "line"))
    for record, number, start, end in read_jsonl_records(path):
        lines.add_values((record["id"], number), start, end)
    assert [lines[number][0] for number in range(3)] == [{"id": 3, "caption": "größer"}, {"id": 1}, {"id": 2}]
    assert lines.describe_location(1) == f"{path}: line 3 (id 1)"
    assert np.asarray(lines.columns["line"]).tolist() == [1, 3, 4]
