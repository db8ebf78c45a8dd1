"""Records read in chunks equal those of the complete file for every chunk boundary."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sca.data.json_stream import LIST_START, iter_list_elements, iter_members
from sca.data.record_index import LineIndex, group_indices_by_owner, index_json_lists, read_jsonl_records

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@settings(deadline=None)
@given(
    st.dictionaries(st.text(), json_values, max_size=5) | st.lists(json_values, max_size=6),
    st.integers(1, 40),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.booleans(),
)
@pytest.mark.slow
def test_iter_members_reassembles_file_at_any_chunk_size(
    folder, content, chunk_bytes, indent, ascii_only, has_byte_order_mark
):
    path = folder / "file.json"
    encoded = json.dumps(content, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if not ascii_only and encoded != json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "replace"):
        return  # a lone surrogate, which no file can contain
    path.write_bytes(b"\xef\xbb\xbf" * has_byte_order_mark + encoded)
    reassembled = [] if isinstance(content, list) else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sca.data.json_stream.CHUNK_BYTES", chunk_bytes)
        for key, value, start, end in iter_members(path):
            target = (
                reassembled
                if key is None
                else reassembled.setdefault(key, [])
                if value is LIST_START
                else reassembled.get(key)
            )
            if value is LIST_START:
                continue
            assert json.loads(path.read_bytes()[start:end]) == value
            if isinstance(target, list):
                target.append(value)
            else:
                reassembled[key] = value
    assert reassembled == content


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers(), max_size=3), min_size=1, max_size=4), st.data())
def test_iter_list_elements_reports_truncated_file(folder, content, data):
    path = folder / "cut.json"
    encoded = json.dumps(content).encode()
    path.write_bytes(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    with pytest.raises(ValueError, match=r"cut\.json is not valid JSON: .* of \d+ bytes; copy or download it again"):
        list(iter_list_elements(path))


def test_index_json_lists_finds_records_by_id_and_groups_them_by_owner(folder):
    path = folder / "lists.json"
    images = [{"id": 7, "name": "ü"}, {"id": 3}, {"id": -5}]
    regions = [{"id": number, "image_id": owner} for number, owner in ((4, 3), (2, 7), (9, 3))]
    path.write_text(json.dumps({"regions": regions, "info": {}, "images": images, "left": [1]}), "utf-8")
    indexed_lists, kept_values = index_json_lists(
        path, {"images": ("id",), "regions": ("id", "image_id")}, ("left",), "lists"
    )
    assert kept_values == {"left": [1]}
    assert [indexed_lists["images"][number][0] for number in range(3)] == images
    assert indexed_lists["regions"][2] == (regions[2], f"{path}: regions[2] (id 9)")
    owners = indexed_lists["regions"].resolve_references("image_id", indexed_lists["images"], "the images")
    assert list(group_indices_by_owner(owners, 3)) == [(0, [1]), (1, [0, 2]), (2, [])]
    assert indexed_lists["images"].find_indices([3, 8, -5]).tolist() == [1, -1, 2]


def test_resolve_references_reports_region_of_unknown_image(folder):
    path = folder / "lost.json"
    path.write_text('{"images": [{"id": 1}], "regions": [{"id": 5, "image_id": 1}, {"id": 6, "image_id": 2}]}')
    indexed_lists, _ = index_json_lists(path, {"images": ("id",), "regions": ("id", "image_id")}, (), "lists")
    with pytest.raises(ValueError, match=r"regions\[1\] \(id 6\): image_id 2 is not among the images"):
        indexed_lists["regions"].resolve_references("image_id", indexed_lists["images"], "the images")


def test_line_index_rereads_records_by_line(folder):
    path = folder / "lines.jsonl"
    path.write_bytes('{"id": 3, "caption": "größer"}\n\n\ufeff{"id": 1}\r\n{"id": 2}'.encode())
    lines = LineIndex(path, str(path), ("id", "line"))
    for record, number, start, end in read_jsonl_records(path):
        lines.add_values((record["id"], number), start, end)
    assert [lines[number][0] for number in range(3)] == [{"id": 3, "caption": "größer"}, {"id": 1}, {"id": 2}]
    assert lines.describe_location(1) == f"{path}: line 3 (id 1)"
    assert np.asarray(lines.columns["line"]).tolist() == [1, 3, 4]
