"""Benchmarks of region names and captions in their publishers' layouts: Osprey's names, Ref-L4 and GLaMM's files."""

import json
import re

import pytest
from judged_benchmarks import SIZE, make_mask, write_images
from sca_registry.contracts import Caption

import sca
from sca.data.glamm_regions import GlammRegions
from sca.data.lmms_eval import LmmsEvalRegions
from sca.data.osprey_names import OspreyNames
from sca.data.ref_l4 import RefL4
from sca.evaluation.protocol import read_protocol
from sca.io.errors import InputError

pytest.importorskip("datasets", reason="requires the extra data")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")
WIDTH, HEIGHT = SIZE
DEFAULT_BOX = (0.0, 0.0, 4.0, 4.0)


class ConstantCaptioner:
    """Captioner whose text is the same for every region."""

    def __init__(self, text):
        self.text = text

    def caption(self, image, prompts, task="caption"):
        return [Caption(self.text, 1.0, DEFAULT_BOX, None, None, prompt, n) for n, prompt in enumerate(prompts)]


def evaluate_protocol(name, run_name, metrics, metric_options=None, model="sca-tiny", **dataset_options):
    """Evaluate a model with a run of a protocol on files written by a test, and return the report."""
    (run,) = [run for run in read_protocol(name).runs if run.name == run_name]
    dataset = {"name": run.dataset, **run.dataset_options, **dataset_options}
    options = {"prompting": run.prompting, "metrics": metrics, "metric_options": metric_options}
    return sca.evaluate(model, dataset, run.split, **options)


# --- Osprey


@pytest.fixture
def write_names(tmp_path):
    """Function that writes the names of PACO, with polygons and RLE, and images in the folders of COCO."""

    def write(**changes):
        write_images(tmp_path / "coco/train2017", 2)
        (tmp_path / "coco/val2017").mkdir()
        (tmp_path / "coco/train2017/1.png").rename(tmp_path / "coco/val2017/1.png")
        records = [
            {
                "file_name": f"{n}.png",
                "height": HEIGHT,
                "width": WIDTH,
                "categories": ["car:wheel", "traffic_light"],
                "annotations": [
                    {"segmentation": [[4, 4, 20, 4, 20, 16, 4, 16]]},
                    {"segmentation": make_mask(24, 8, 40, 28)},
                ],
            }
            for n in range(2)
        ]
        records[0] |= changes
        (tmp_path / "paco_val_1k_category.json").write_text(json.dumps(records))
        return {"root": tmp_path, "collection": "paco", "image_root": tmp_path / "coco"}

    return write


def test_osprey_names_reads_masks_and_names_of_both_image_folders(write_names):
    dataset = OspreyNames("val", **write_names())
    assert not dataset.skipped
    regions = [[(region.id, region.name) for region in sample.regions] for sample in dataset]
    assert regions == [[(0, "car wheel"), (1, "traffic light")], [(2, "car wheel"), (3, "traffic light")]]
    first, second = dataset[0].regions
    assert (first.mask, second.mask) == (make_mask(4, 4, 20, 16), make_mask(24, 8, 40, 28))


def test_paco_names_scores_the_predicted_names_of_masks(write_names):
    model = ConstantCaptioner("car wheel")  # the name of every second region
    report = evaluate_protocol("paco-names", "paco-val", ["name-iou"], model=model, **write_names())
    assert report.scores["name-iou"] == 0.5
    assert {record["task"] for record in report.records} == {"recognition"}
    assert all(record["prompt"].keys() == {"mask"} for record in report.records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ["car"]}, "has 1 categories and 2 annotations"),
        ({"categories": ["car", 3]}, r"categories\[1\] is 3; expected a string"),
        ({"annotations": [{}, {}]}, "no 'segmentation'"),
        ({"file_name": "9.png"}, r"image missing: 1, such as 9\.png"),
    ],
)
def test_osprey_names_rejects_invalid_records(write_names, changes, message):
    with pytest.raises(InputError, match=message):
        OspreyNames("val", **write_names(**changes))


def test_osprey_names_reports_missing_files_and_splits(tmp_path):
    with pytest.raises(InputError, match=r"lvis_val_1k_category\.json does not exist; set root"):
        OspreyNames("val", tmp_path)
    with pytest.raises(InputError, match="no split 'test'; use val"):
        OspreyNames("test", tmp_path)


# --- Ref-L4


@pytest.fixture
def write_ref_l4(tmp_path):
    """Function that writes three descriptions of two boxes on one image, and one on another."""

    def write(without=(), **changes):
        write_images(tmp_path / "images", 2)
        boxes = [("o365_1", [4.0, 4.0, 16.0, 12.0], 0), ("o365_2", [24.0, 8.0, 16.0, 20.0], 0)]
        boxes += [boxes[0], ("refcoco_7", [4.0, 4.0, 16.0, 12.0], 1)]
        rows = [
            {
                **{"id": f"{7 + n:06}", "caption": f"description {n}", "bbox": box, "bbox_area": box[2] * box[3]},
                **{"bbox_id": bbox_id, "ori_category_id": "o365_5", "image_id": f"o365_{image}", "split": "val"},
                **{"height": HEIGHT, "width": WIDTH, "file_name": f"{image}.png", "is_rewrite": n == 2},
            }
            for n, (bbox_id, box, image) in enumerate(boxes)
        ]
        rows[2] |= changes
        table = pyarrow.Table.from_pylist([{k: v for k, v in row.items() if k not in without} for row in rows])
        parquet.write_table(table, tmp_path / "ref-l4-val.parquet")
        return tmp_path

    return write


def test_ref_l4_joins_the_descriptions_of_a_box(write_ref_l4):
    first, second = RefL4("val", write_ref_l4())
    assert [(region.id, region.box, region.phrases) for region in first.regions] == [
        (7, (4, 4, 20, 16), ("description 0", "description 2")),
        (8, (24, 8, 40, 28), ("description 1",)),
    ]
    assert [region.id for region in second.regions] == [10]


def test_ref_l4_protocol_scores_captions_against_all_descriptions(write_ref_l4):
    model = ConstantCaptioner("description 2")  # the second description of one region, and half of the others
    options = {"tokenizer": "plain"}
    report = evaluate_protocol("ref-l4", "val", ["rouge-l"], options, model=model, root=write_ref_l4())
    assert [len(record["truth"]["phrases"]) for record in report.records] == [2, 1, 1]
    assert report.scores["rouge-l"] == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_ref_l4_rejects_inconsistent_files(write_ref_l4, tmp_path):
    with pytest.raises(InputError, match=r"ref-l4-test\.parquet does not exist; set root"):
        RefL4("test", tmp_path)
    with pytest.raises(InputError, match="bbox_id o365_1 has several boxes"):
        RefL4("val", write_ref_l4(bbox=[0.0, 0.0, 4.0, 4.0]))


def test_ref_l4_rejects_files_of_other_formats(write_ref_l4):
    folder = write_ref_l4(without=("bbox_id",))
    with pytest.raises(InputError, match="has no column bbox_id; it has: id, caption"):
        RefL4("val", folder)
    (folder / "ref-l4-val.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="is not a Parquet file"):
        RefL4("val", folder)


# --- GLaMM


@pytest.fixture
def write_glamm(tmp_path):
    """Function that writes two regions of one image file, the first one with two captions."""

    def write(**changes):
        write_images(tmp_path / "visual_genome/images", 1)
        boxes = {1: [4, 4, 16, 12], 2: [24, 8, 16, 20]}
        annotations = [{"id": n, "image_id": n, "bbox": box, "caption": f"region {n}"} for n, box in boxes.items()]
        annotations.append({"id": 3, "image_id": 1, "bbox": boxes[1], "caption": "another caption"})
        annotations[1] |= changes
        images = [{"id": n, "file_name": "0.png", "width": WIDTH, "height": HEIGHT} for n in boxes]
        content = {"images": images, "annotations": annotations}
        (tmp_path / "visual_genome/test_caption.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_glamm_regions_are_image_records_with_all_their_captions(write_glamm):
    first, second = GlammRegions("test", write_glamm(), "visual-genome")
    assert [(region.id, region.box, region.phrases) for region in first.regions] == [
        (1, (4, 4, 20, 16), ("region 1", "another caption"))
    ]
    assert [(region.id, region.phrases) for region in second.regions] == [(2, ("region 2",))]


@pytest.mark.slow
def test_glamm_protocol_scores_captions_against_those_of_the_image_record(write_glamm):
    report = evaluate_protocol("glamm-regions", "visual-genome-test", ["cider"], root=write_glamm())
    assert [len(record["truth"]["phrases"]) for record in report.records] == [2, 1]
    assert (report.run["dataset"], report.run["split"]) == ("glamm-regions", "test")


def test_glamm_regions_reports_unusable_records_and_splits(write_glamm):
    root = write_glamm(id=4)
    with pytest.raises(InputError, match=r"unusable image: 1, such as .*image 2 has no annotation with its id"):
        GlammRegions("test", root, "visual-genome")
    assert len(GlammRegions("test", root, "visual-genome", max_bad_records=1)) == 1
    with pytest.raises(InputError, match="refcocog has no split 'test' in the files of GLaMM; use val"):
        GlammRegions("test", ".")


# --- lmms-eval


@pytest.fixture
def write_lmms_eval(tmp_path):
    """Function that writes five rows in two files, in row groups of two rows."""

    def write(without=(), **changes):
        write_images(tmp_path / "images", 5)
        (tmp_path / "data").mkdir()
        rows = [
            {
                "question_id": str(100 + n),
                "image": {"bytes": (tmp_path / f"images/{n}.png").read_bytes(), "path": f"{n}.png"},
                "question": "Describe the region.",
                "answer": [f"region {n}", f"expression {n}"],
                "segmentation": [4.0, 4.0, 20.0, 4.0, 20.0, 16.0],
                "bbox": [4.0, 4.0, 16.0, 12.0],
                "iscrowd": 0,
                "file_name": f"{n}.jpg",
            }
            for n in range(5)
        ]
        rows[4] |= changes
        rows = [{key: value for key, value in row.items() if key not in without} for row in rows]
        for number, part in enumerate((rows[:3], rows[3:])):
            path = tmp_path / f"data/val-{number:05}-of-00002.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(part), path, row_group_size=2)
        return tmp_path

    return write


def test_lmms_eval_reads_embedded_images_boxes_and_expressions(write_lmms_eval):
    dataset = LmmsEvalRegions("val", write_lmms_eval())
    assert not dataset.skipped
    assert len(dataset) == 5
    for index in (3, 0, 1, 4, 2):
        sample = dataset[index]
        assert sample.image.getpixel((47, 31)) == (40 * index, 90, 160)
        assert [(region.id, region.box, region.phrases) for region in sample.regions] == [
            (index, (4, 4, 20, 16), (f"region {index}", f"expression {index}"))
        ]


@pytest.mark.slow
def test_lmms_eval_protocol_scores_captions_against_all_expressions(write_lmms_eval):
    root = write_lmms_eval()
    report = evaluate_protocol("lmms-eval-refcocog", "refcocog-bbox-val", ["cider"], root=root)
    assert len(report.records) == 5
    assert all(len(record["truth"]["phrases"]) == 2 for record in report.records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"bytes": None, "path": "4.png"}}, "row 2: the image has no bytes"),
        ({"image": {"bytes": b"no image", "path": "4.png"}}, "row 2 is not a readable image"),
        ({"bbox": [1.0, 2.0]}, r"row 2, 'bbox' is \[1\.0, 2\.0\]; expected 4 numbers"),
        ({"bbox": [4.0, 4.0, -1.0, 12.0]}, "row 2, 'bbox' has width -1.0"),
    ],
)
def test_lmms_eval_rejects_unusable_rows(write_lmms_eval, changes, message):
    with pytest.raises(InputError, match=message):
        LmmsEvalRegions("val", write_lmms_eval(**changes))


@pytest.mark.parametrize("split", ["/val", "*", "va[l]", "../data/val", "data/val"])
def test_lmms_eval_reads_a_split_as_a_name(write_lmms_eval, split):
    root = write_lmms_eval()
    with pytest.raises(InputError, match=rf"no {re.escape(split)}-\*\.parquet in"):
        LmmsEvalRegions(split, root)


def test_lmms_eval_reports_missing_files_and_columns(write_lmms_eval, tmp_path):
    with pytest.raises(InputError, match=r"no test-\*\.parquet in"):
        LmmsEvalRegions("test", tmp_path)
    with pytest.raises(InputError, match="has no column bbox; it has: question_id"):
        LmmsEvalRegions("val", write_lmms_eval(without=("bbox",)))


@pytest.mark.parametrize(("stop", "subject"), [(260, ", row group 1"), (-8, "")])  # damaged pages or footer
def test_damaged_parquet_files_are_reported(write_lmms_eval, stop, subject):
    root = write_lmms_eval()
    dataset = LmmsEvalRegions("val", root)
    path = root / "data/val-00000-of-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:200] + b"\xff" * len(content[200:stop]) + content[stop:])
    message = rf"00002\.parquet{subject} is damaged \(.*\); copy or download it again"
    with pytest.raises(InputError, match=message) as caught:
        LmmsEvalRegions("val", root)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        dataset[0]
