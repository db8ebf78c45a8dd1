"""Many images are captioned from plain options; what fails is a value among the results."""

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
def paths(tmp_path):
    found = [tmp_path / f"{name}.png" for name in "abcd"]
    for path in found:
        Image.new("RGB", (64, 48), "navy").save(path)
    return found


def caption(job, paths, **options):
    region_source = job.read_region_source()
    region_source.match_images(paths)
    return list(BatchCaptioner(job, region_source).caption_images(paths, **options))


def test_failures_are_yielded_between_the_captions_of_the_others(paths):
    paths[1].write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(paths[2])
    results = caption(CaptionJob("sca-tiny", boxes=["20,20,40,40"], batch_size=2), paths)
    failed = {result.path: result for result in results if isinstance(result, Failure)}
    assert {path.name: (each.kind, each.is_entire_image) for path, each in failed.items()} == {
        "b.png": (UNUSABLE_IMAGE, True),
        "c.png": (UNUSABLE_PROMPTS, True),
    }
    captioned = [result for result in results if not isinstance(result, Failure)]
    assert [result.path.name for result in captioned] == ["a.png", "d.png"]
    assert all(len(result.captions) == 1 for result in captioned)


def test_regions_of_a_file_that_do_not_fit_are_failures_of_their_image(paths, tmp_path):
    lines = [{"image": "a.png", "box": [1, 1, 9, 9]}, {"image": "a.png", "box": [90, 90, 99, 99]}]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    failure, result = caption(CaptionJob("sca-tiny", prompts=str(tmp_path / "prompts.jsonl")), paths[:1])
    assert (failure.kind, failure.is_entire_image) == (UNUSABLE_PROMPTS, False)
    assert "prompts.jsonl, line 2" in failure.reason
    assert len(result.captions) == 1


@pytest.mark.parametrize("keep_images", [False, True])
def test_images_that_are_done_are_repeated_and_opened_only_if_wanted(paths, keep_images):
    known = CaptionedImage(
        str(paths[0]), ImageSize(64, 48), [Caption("known", 0.5, None, None, None, Prompt(), 0)], None
    )
    job = CaptionJob("sca-tiny", boxes=["20,20,40,40"], batch_size=1)
    first, second = caption(job, paths[:2], captioned={str(paths[0]): known}, keep_images=keep_images)
    assert first.captions == known.captions
    assert isinstance(first.image, Image.Image) == keep_images
    assert second.captions[0].text != "known"


def test_captioners_that_only_describe_are_not_called_for_an_empty_request(paths):
    class Teller:
        def caption(self, image, prompts, task="caption", **generation):
            assert prompts
            return [Caption("told", 0.5, prompt.box, None, None, prompt, place) for place, prompt in enumerate(prompts)]

    images = [sca.open_image(path) for path in paths[:2]]
    answers = caption_requests(Teller(), images, [[Prompt(box=(1, 1, 9, 9))], []], "caption")
    assert [[each.text for each in captions] for captions in answers] == [["told"], []]


def test_job_is_plain_values_that_any_process_can_receive():
    job = CaptionJob("sca-tiny", boxes=["1,2,3,4"], generation_options={"num_beams": 2}, batch_size=3)
    assert CaptionJob(**json.loads(json.dumps(asdict(job)))).batch_size == 3


@pytest.mark.parametrize(
    ("options", "message"), [({"batch_size": 0}, "batch_size is 0"), ({"task": "poetry"}, "unknown task")]
)
def test_job_refuses_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionJob("sca-tiny", boxes=["1,2,3,4"], **options)


def test_job_refuses_a_request_without_regions():
    with pytest.raises(ValueError, match=r"no regions to caption; give boxes, points, .* or everything"):
        CaptionJob("sca-tiny")


@pytest.mark.parametrize(
    "sources",
    [{"boxes": ["1,2,3,4"], "everything": True}, {"prompts": "p.jsonl", "everything": True}]
    + [{name: ["1,2"], "prompts": "p.jsonl"} for name in ("boxes", "points", "masks", "regions")],
)
def test_job_refuses_regions_from_two_sources(sources):
    with pytest.raises(ValueError, match=f"{' and '.join(sources)} exclude each other; give "):
        CaptionJob("sca-tiny", **sources)


@pytest.mark.slow
def test_shards_are_forked_from_a_process_that_has_imported_the_models():
    program = "import sys, sca.inference.shards; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_engines_and_other_objects_in_place_of_a_predictor_are_refused():
    engine = sca.load_captioner("sca-tiny")
    with pytest.raises(ValueError, match=r"predictor is of type Engine; give sca\.Predictor"):
        sca.caption_everything(engine)
    with pytest.raises(ValueError, match="model is of type object; give a model"):
        sca.Predictor(object())
    with pytest.raises(ValueError, match=r"region_batch_size is an option of the captioner"):
        sca.Predictor(engine, region_batch_size=2)


def test_segmenting_without_a_segmenter_is_refused():
    from sca.inference.engine import MaskEngine

    class Nothing(MaskEngine):
        caption_batch = caption_masks = None

    with pytest.raises(ValueError, match=r"the captioner has no segmenter; use encoder\+captioner"):
        Nothing(None).segment(Nothing(None).encode([Image.new("RGB", (9, 9))]), [[Prompt(box=(1, 1, 9, 9))]])
