"""Batch captioning: plain options, and errors as values among the results."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt

import sca
from sca.inference.batch import UNUSABLE_IMAGE, UNUSABLE_PROMPTS, BatchCaptioner, Failure, caption_requests
from sca.inference.caption_job import CaptionJob
from sca.output.captioned_image import CaptionedImage, ImageSize


@pytest.fixture
def image_paths(tmp_path):
    image_paths = [tmp_path / f"{name}.png" for name in "abcd"]
    for path in image_paths:
        Image.new("RGB", (64, 48), "navy").save(path)
    return image_paths


def caption_images(job, image_paths, **options):
    region_source = job.read_region_source()
    region_source.match_images(image_paths)
    return list(BatchCaptioner(job, region_source).iter_results(image_paths, **options))


def test_batch_captioner_yields_failures_among_captioned_images(image_paths):
    image_paths[1].write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(image_paths[2])
    results = caption_images(CaptionJob("sca-tiny", boxes=["20,20,40,40"], batch_size=2), image_paths)
    failure_by_path = {result.path: result for result in results if isinstance(result, Failure)}
    assert {path.name: (each.kind, each.is_entire_image) for path, each in failure_by_path.items()} == {
        "b.png": (UNUSABLE_IMAGE, True),
        "c.png": (UNUSABLE_PROMPTS, True),
    }
    captioned = [result for result in results if not isinstance(result, Failure)]
    assert [result.path.name for result in captioned] == ["a.png", "d.png"]
    assert all(len(result.captions) == 1 for result in captioned)


def test_batch_captioner_reports_prompts_outside_the_image_as_failures(image_paths, tmp_path):
    records = [{"image": "a.png", "box": [1, 1, 9, 9]}, {"image": "a.png", "box": [90, 90, 99, 99]}]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    failure, result = caption_images(CaptionJob("sca-tiny", prompts=str(tmp_path / "prompts.jsonl")), image_paths[:1])
    assert (failure.kind, failure.is_entire_image) == (UNUSABLE_PROMPTS, False)
    assert "prompts.jsonl, line 2" in failure.reason
    assert len(result.captions) == 1


@pytest.mark.parametrize("keep_images", [False, True])
def test_batch_captioner_repeats_captioned_images_and_opens_them_on_request(image_paths, keep_images):
    captioned_image = CaptionedImage(
        str(image_paths[0]), ImageSize(64, 48), [Caption("known", 0.5, None, None, None, Prompt(), 0)], None
    )
    job = CaptionJob("sca-tiny", boxes=["20,20,40,40"], batch_size=1)
    first_result, second_result = caption_images(
        job, image_paths[:2], captioned={str(image_paths[0]): captioned_image}, keep_images=keep_images
    )
    assert first_result.captions == captioned_image.captions
    assert isinstance(first_result.image, Image.Image) == keep_images
    assert second_result.captions[0].text != "known"


def test_caption_requests_skips_captioners_for_empty_requests(image_paths):
    class Teller:
        def caption(self, image, prompts, task="caption", **generation):
            assert prompts
            return [
                Caption("a caption", 0.5, prompt.box, None, None, prompt, region_id)
                for region_id, prompt in enumerate(prompts)
            ]

    images = [sca.open_image(path) for path in image_paths[:2]]
    batch_captions = caption_requests(Teller(), images, [[Prompt(box=(1, 1, 9, 9))], []], "caption")
    assert [[each.text for each in captions] for captions in batch_captions] == [["a caption"], []]


def test_caption_job_round_trips_through_json():
    job = CaptionJob("sca-tiny", boxes=["1,2,3,4"], generation_options={"num_beams": 2}, batch_size=3)
    assert CaptionJob(**json.loads(json.dumps(asdict(job)))).batch_size == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"task": "recognition", "generation_options": {"question": "what is it?"}}, "cannot be combined"),
    ],
)
def test_caption_job_rejects_invalid_values(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionJob("sca-tiny", boxes=["1,2,3,4"], **options)


def test_caption_job_rejects_a_task_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"unknown task 'poetry'\. Choose from: recognition, caption\."):
        CaptionJob("sca-tiny", boxes=["1,2,3,4"], task="poetry").load_captioner()


def test_caption_job_rejects_a_request_without_regions():
    with pytest.raises(ValueError, match=r"no regions to caption; pass boxes, points, .* or everything"):
        CaptionJob("sca-tiny")


@pytest.mark.parametrize(
    "sources",
    [{"boxes": ["1,2,3,4"], "everything": True}, {"prompts": "p.jsonl", "everything": True}]
    + [{name: ["1,2"], "prompts": "p.jsonl"} for name in ("boxes", "points", "masks", "regions")],
)
def test_caption_job_rejects_regions_from_two_sources(sources):
    with pytest.raises(ValueError, match=f"{' and '.join(sources)} are mutually exclusive; pass "):
        CaptionJob("sca-tiny", **sources)


@pytest.mark.slow
def test_shards_module_imports_transformers_before_forking():
    program = "import sys, sca.inference.shards; print('transformers' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "True\n"


def test_predictor_functions_reject_engines_and_other_objects():
    engine = sca.load_captioner("sca-tiny")
    with pytest.raises(ValueError, match=r"predictor is of type Engine; pass sca\.Predictor"):
        sca.caption_everything(engine)
    with pytest.raises(ValueError, match="model is of type object; pass a model"):
        sca.Predictor(object())
    with pytest.raises(ValueError, match=r"region_batch_size is an option of the captioner"):
        sca.Predictor(engine, region_batch_size=2)


def test_segment_without_a_segmenter_is_rejected():
    from sca.inference.engine import MaskEngine

    class Nothing(MaskEngine):
        caption_batch = caption_masks = None

    with pytest.raises(ValueError, match=r"the captioner has no segmenter; use encoder\+captioner"):
        Nothing(None).segment(Nothing(None).encode([Image.new("RGB", (9, 9))]), [[Prompt(box=(1, 1, 9, 9))]])
