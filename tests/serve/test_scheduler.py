"""Scheduler: concurrent requests are batched fairly and return the same captions as alone."""

import threading
import time
from itertools import pairwise

import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt
from sca_registry.spec import EverythingOptions

import sca
from sca.inference.automatic import caption_everything
from sca.inference.region_search import SearchProgress
from sca.inference.zoom_options import resolve_zoom
from sca.serve import scheduler as scheduler_module
from sca.serve.feature_cache import FeatureCache
from sca.serve.inference_requests import (
    CandidateMasks,
    CaptioningStarted,
    DeadlineExceededError,
    InferenceRequest,
    InsufficientMemoryError,
    QueueFullError,
    RequestDone,
    SchedulerClosedError,
    SchedulerError,
    UnsupportedRequestError,
)
from sca.serve.scheduler import RequestScheduler


class Listener:
    """Event callback that records events and waits for the last one."""

    def __init__(self):
        self.events, self.is_done = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, RequestDone | SchedulerError):
            self.is_done.set()

    @property
    def captions(self):
        assert self.is_done.wait(60)
        return [event for event in self.events if isinstance(event, Caption)]


class BlockingCaptioner:
    """Captioner that waits until it is released, and records the batch sizes."""

    def __init__(self, captioner):
        self.captioner, self.release, self.batch_sizes = captioner, threading.Event(), []
        self.num_encoded, self.is_busy = 0, threading.Event()

    def encode(self, images):
        self.num_encoded += len(images)
        return self.captioner.encode(images)

    def caption_batch(self, encoded, requests, task, **kwargs):
        self.is_busy.set()
        self.release.wait(60)
        self.batch_sizes.append([len(request) for request in requests])
        return self.captioner.caption_batch(encoded, requests, task, **kwargs)


@pytest.fixture
def blocking_captioner(captioner):
    blocking_captioner = BlockingCaptioner(captioner)
    yield blocking_captioner
    blocking_captioner.release.set()


def block_worker(scheduler, blocking_captioner, request):
    """Submit a request that blocks the worker; later requests wait in the queue."""
    listener = Listener()
    scheduler.submit(request, listener)
    assert blocking_captioner.is_busy.wait(60)
    return listener


def make_box_prompts(scene):
    return [Prompt(box=region.box) for region in scene.regions]


def to_tuples(captions):
    return [(each.text, each.region_id, each.mask, each.box) for each in captions]


def test_scheduler_batches_queued_requests_without_changing_captions(captioner, blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner, max_regions_per_turn=64)
    prompts = make_box_prompts(scene)
    first = block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, prompts))
    listeners = [Listener() for _ in range(5)]
    images = [scene.image, scene.image.transpose(0)]
    for number, listener in enumerate(listeners):
        scheduler.submit(InferenceRequest(images[number % 2], prompts[: number + 1]), listener)
    blocking_captioner.release.set()
    for number, listener in enumerate(listeners):
        assert to_tuples(listener.captions) == to_tuples(captioner.caption(images[number % 2], prompts[: number + 1]))
    assert to_tuples(first.captions) == to_tuples(captioner.caption(scene.image, prompts))
    assert blocking_captioner.batch_sizes[1:] == [[1, 2, 3, 4, min(5, len(prompts))]]
    assert blocking_captioner.num_encoded == 2, "each image is encoded once"
    scheduler.close()


def test_scheduler_completes_short_request_during_a_long_one(blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner, max_regions_per_turn=4)
    event_order, done_events = [], [threading.Event(), threading.Event()]

    def make_listener(index):
        def on_event(event):
            event_order.append(index)
            if isinstance(event, RequestDone):
                done_events[index].set()

        return on_event

    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene) * 10), make_listener(0))
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:2]), make_listener(1))
    blocking_captioner.release.set()
    assert all(each.wait(60) for each in done_events)
    assert len(event_order) - 1 - event_order[::-1].index(1) < len(event_order) / 2
    assert max(sum(each) for each in blocking_captioner.batch_sizes) <= 4
    scheduler.close()


@pytest.mark.slow
def test_scheduler_completes_short_requests_during_a_search(captioner, scene, monkeypatch):
    monkeypatch.setattr("sca.serve.scheduler.SEARCH_SECONDS", 0.0)
    scheduler, order = RequestScheduler(captioner), []
    search, options = Listener(), EverythingOptions(**{**vars(captioner.everything), "points_per_side": 32})
    scheduler.submit(
        InferenceRequest(scene.image, everything=options), lambda event: (order.append("search"), search(event))
    )
    for number in range(5):
        short = Listener()
        scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1]), short)
        assert short.captions
        order.append(number)
    assert not search.is_done.is_set()
    assert "search" in order[: order.index(3)], "the search continues between them"
    assert to_tuples(search.captions) == to_tuples(caption_without_scheduler(captioner, scene.image, options))
    scheduler.close()


def caption_without_scheduler(captioner, image, options):
    predictor = sca.Predictor(captioner)
    predictor.set_image(image)
    return caption_everything(predictor, options=options)


@pytest.mark.slow
def test_concurrent_searches_return_the_same_captions_as_alone(captioner, scene):
    scheduler = RequestScheduler(captioner)
    options = EverythingOptions(**{**vars(captioner.everything), "points_per_side": 24})
    images = [scene.image, scene.image.transpose(0), scene.image.transpose(1)]
    expected = [to_tuples(caption_without_scheduler(captioner, image, options)) for image in images]
    listeners = [Listener() for _ in images]
    for image, listener in zip(images, listeners, strict=True):
        scheduler.submit(InferenceRequest(image, everything=options), listener)
    assert [to_tuples(listener.captions) for listener in listeners] == expected
    scheduler.close()


def test_scheduler_rejects_search_above_max_found_regions(captioner, scene):
    scheduler, listener = RequestScheduler(captioner, max_found_regions=3), Listener()
    options = EverythingOptions(points_per_side=8, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0)
    scheduler.submit(InferenceRequest(scene.image, everything=options), listener)
    assert listener.captions == []
    assert "more than 3 regions were found" in str(listener.events[-1])
    scheduler.close()


@pytest.mark.slow
def test_scheduler_rejects_search_above_memory_limit(captioner, scene, monkeypatch):
    assert scheduler_module.MAX_CONCURRENT_SEARCHES * scheduler_module.SEARCH_BYTES <= 512 * 2**20
    monkeypatch.setattr(scheduler_module, "SEARCH_BYTES", 2**16)
    scheduler, listener = RequestScheduler(captioner), Listener()
    scheduler.submit(
        InferenceRequest(
            scene.image,
            everything=EverythingOptions(points_per_side=16, pred_iou_thresh=0.0, stability_score_thresh=0.0),
        ),
        listener,
    )
    assert listener.captions == []
    assert "too many masks pass the filters" in str(listener.events[-1])
    scheduler.close()


def test_memory_release_does_not_block_the_scheduler(captioner, scene, monkeypatch):
    is_releasing, proceed = threading.Event(), threading.Event()
    monkeypatch.setattr(scheduler_module, "release_memory", lambda: is_releasing.set() or proceed.wait(60))
    scheduler, listener = RequestScheduler(captioner), Listener()
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1]), listener)
    assert listener.captions
    assert is_releasing.wait(30)
    reader = threading.Thread(target=lambda: scheduler.num_queued_regions, daemon=True)
    reader.start()
    reader.join(5)
    was_blocked = reader.is_alive()
    proceed.set()
    assert not was_blocked
    scheduler.close()


def test_scheduler_alternates_new_and_served_requests_and_clients(blocking_captioner, scene):
    """Requests have different options, so that each turn has one request."""
    scheduler, order = RequestScheduler(blocking_captioner, max_regions_per_turn=1), []
    prompts = make_box_prompts(scene)[:1]

    def submit(name, client_id, max_new_tokens, count=1):
        request = InferenceRequest(
            scene.image, prompts * count, generation={"max_new_tokens": max_new_tokens}, client_id=client_id
        )
        scheduler.submit(request, lambda event: order.append(name) if isinstance(event, Caption) else None)

    block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, prompts))
    submit("long", "heavy", 4, count=4)
    for number in range(3):
        submit(f"heavy {number}", "heavy", 5 + number)
    submit("light", "light", 9)
    blocking_captioner.release.set()
    deadline = time.monotonic() + 60
    while scheduler.num_queued_regions and time.monotonic() < deadline:
        time.sleep(0.01)
    assert order[:3] == ["long", "long", "light"], "after one new request of the other client"
    new_positions, long_positions = [
        [position for position, name in enumerate(order) if (name == "long") is is_long] for is_long in (False, True)
    ]
    assert all(later - earlier <= 2 for earlier, later in pairwise(new_positions[1:]))
    assert long_positions[1] < new_positions[-1], "requests that had a turn continue in between"
    scheduler.close()


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, [8]), ({"generation": {"num_beams": 4}}, [2] * 4), ({"generation": {"max_new_tokens": 80}}, [2] * 4)],
)
def test_scheduler_captions_fewer_costly_regions_per_turn(blocking_captioner, scene, options, sizes):
    scheduler, listener = RequestScheduler(blocking_captioner, max_regions_per_turn=8), Listener()
    blocking_captioner.release.set()
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1] * 8, **options), listener)
    assert len(listener.captions) == 8
    assert [sum(each) for each in blocking_captioner.batch_sizes] == sizes
    scheduler.close()


def test_scheduler_shortens_turns_for_points_and_large_masks(blocking_captioner, scene):
    scheduler, listeners = RequestScheduler(blocking_captioner, max_regions_per_turn=8), [Listener(), Listener()]
    blocking_captioner.release.set()
    many_points = Prompt(points=((3.0, 3.0, 1),) * 256)
    scheduler.submit(InferenceRequest(scene.image, [many_points] * 3), listeners[0])
    assert len(listeners[0].captions) == 3
    large_image = scene.image.resize((4096, 4096))
    scheduler.submit(
        InferenceRequest(large_image, [Prompt(box=(0.0, 0.0, 9.0, 9.0))] * 4, return_masks=True), listeners[1]
    )
    assert len(listeners[1].captions) == 4
    assert [sum(each) for each in blocking_captioner.batch_sizes] == [1, 1, 1, 1, 1, 1, 1]
    scheduler.close()


def test_long_requests_leave_room_in_the_queue(blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner, max_queue=200)
    block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, make_box_prompts(scene)[:1]))
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1] * 140), Listener())
    with pytest.raises(QueueFullError):
        scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1] * 65), Listener())
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1] * 50), Listener())
    blocking_captioner.release.set()
    scheduler.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_worker_crash_fails_queued_and_later_requests(blocking_captioner, scene, caplog):
    def raise_system_exit(*_, **__):
        blocking_captioner.is_busy.set()
        blocking_captioner.release.wait(60)
        raise SystemExit

    blocking_captioner.caption_batch = raise_system_exit
    scheduler = RequestScheduler(blocking_captioner)
    listeners = [
        block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, make_box_prompts(scene))),
        Listener(),
    ]
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene), task="recognition"), listeners[1])
    blocking_captioner.release.set()
    for listener in listeners:
        assert listener.captions == []
        assert isinstance(listener.events[-1], SchedulerClosedError)
        assert "the worker thread of the model has crashed; restart the server" in str(listener.events[-1])
    assert (scheduler.accepts_requests, scheduler.state) == (False, "down")
    with pytest.raises(SchedulerClosedError, match="restart the server"):
        scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)), Listener())
    assert "SystemExit" in caplog.text
    scheduler.close()


def test_draining_scheduler_completes_queued_requests_and_rejects_new_ones(blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner)
    listeners = [
        block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, make_box_prompts(scene)[:1])),
        Listener(),
    ]
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:2], task="recognition"), listeners[1])
    scheduler.drain(30)
    assert scheduler.state == "draining"
    with pytest.raises(SchedulerClosedError, match="shutting down"):
        scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)), Listener())
    blocking_captioner.release.set()
    assert [len(listener.captions) for listener in listeners] == [1, 2]
    scheduler.close()


def test_scheduler_does_not_batch_different_tasks(captioner, blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner)
    prompts = make_box_prompts(scene)
    listeners = {task: Listener() for task in ("caption", "recognition")}
    block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, prompts[:1]))
    for task, listener in listeners.items():
        scheduler.submit(InferenceRequest(scene.image, prompts, task=task), listener)
    blocking_captioner.release.set()
    for task, listener in listeners.items():
        assert to_tuples(listener.captions) == to_tuples(captioner.caption(scene.image, prompts, task))
    scheduler.close()


@pytest.mark.slow
def test_everything_request_returns_the_same_captions_as_without_scheduler(captioner, scheduler, scene):
    listener, options = Listener(), EverythingOptions(**{**vars(captioner.everything), "points_per_side": 12})
    scheduler.submit(InferenceRequest(scene.image, everything=options), listener)
    captions = listener.captions
    assert to_tuples(captions) == to_tuples(caption_without_scheduler(captioner, scene.image, options))
    event_types = [type(event) for event in listener.events]
    assert event_types[0] is SearchProgress
    assert listener.events[event_types.index(CaptioningStarted)] == (len(captions),)
    assert listener.events[-1] == (len(captions),)


def test_scheduler_skips_cancelled_requests(blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner)
    block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, make_box_prompts(scene)[:1]))
    cancelled = Listener()
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)), cancelled).cancel()
    last = Listener()
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:2]), last)
    blocking_captioner.release.set()
    assert len(last.captions) == 2
    assert sum(map(sum, blocking_captioner.batch_sizes)) == 3
    assert cancelled.events == []
    assert scheduler.num_queued_regions == 0
    scheduler.close()


def test_scheduler_rejects_requests_above_max_queue_and_after_their_deadline(blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner, max_queue=10)
    late = Listener()
    first = block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, make_box_prompts(scene)[:1] * 8))
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:2], timeout=0.01), late)
    with pytest.raises(QueueFullError, match=r"the queue is full \(10 of 10 regions\)"):
        scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1]), Listener())
    time.sleep(0.1)
    blocking_captioner.release.set()
    assert late.captions == []
    assert isinstance(late.events[-1], DeadlineExceededError)
    assert len(first.captions) == 8
    scheduler.close()


def test_failed_request_does_not_fail_others_in_its_turn(captioner, blocking_captioner, scene, caplog):
    def caption_or_fail(encoded, requests, task, **kwargs):
        blocking_captioner.is_busy.set()
        blocking_captioner.release.wait(60)
        if any(prompt.points for request in requests for prompt in request):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        if any(len(request) == 3 for request in requests):
            raise RuntimeError("a defect")
        if any(len(request) == 2 for request in requests):
            raise ValueError("unsupported")
        return captioner.caption_batch(encoded, requests, task, **kwargs)

    blocking_captioner.caption_batch = caption_or_fail
    scheduler = RequestScheduler(blocking_captioner)
    one_prompt = make_box_prompts(scene)[:1]
    listeners = [
        block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, one_prompt)),
        *(Listener() for _ in range(4)),
    ]
    for listener, prompts in zip(
        listeners[1:], (one_prompt, [Prompt(points=((3, 3, 1),))], one_prompt * 3, one_prompt * 2), strict=True
    ):
        scheduler.submit(InferenceRequest(scene.image, prompts), listener)
    blocking_captioner.release.set()
    assert [len(listener.captions) for listener in listeners] == [1, 1, 0, 0, 0]
    event_types = [type(listener.events[-1]) for listener in listeners]
    assert event_types == [RequestDone, RequestDone, InsufficientMemoryError, SchedulerError, UnsupportedRequestError]
    assert "a defect" not in str(listeners[3].events[-1])
    assert "a defect" in caplog.text
    scheduler.close()


def test_closed_scheduler_fails_queued_requests_and_rejects_new_ones(blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner)
    listeners = [
        block_worker(scheduler, blocking_captioner, InferenceRequest(scene.image, make_box_prompts(scene)[:1])),
        Listener(),
    ]
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1], task="recognition"), listeners[1])
    close_thread = threading.Thread(target=scheduler.close)
    close_thread.start()
    blocking_captioner.release.set()
    close_thread.join()
    assert len(listeners[0].captions) == 1
    assert isinstance(listeners[1].events[-1], SchedulerClosedError)
    with pytest.raises(SchedulerClosedError):
        scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)), Listener())
    assert not scheduler.accepts_requests


def test_feature_cache_evicts_least_recently_used_images(captioner, scene):
    encoded = captioner.encode([scene.image])
    size = encoded.features.nbytes
    cache = FeatureCache(2 * size + 1)
    for name in "abc":
        cache.put(name, encoded)
    assert cache.get("a") is None
    assert cache.get("b") is encoded
    cache.put("d", encoded)
    assert cache.get("c") is None, "the least recently used one"
    assert cache.get("b") is encoded
    assert cache.cached_bytes == 2 * size
    FeatureCache(0).put("a", encoded)


def test_feature_cache_of_scheduler_contains_no_images(captioner, scene):
    scheduler, listener = RequestScheduler(captioner), Listener()
    scheduler.submit(InferenceRequest(scene.image, make_box_prompts(scene)[:1]), listener)
    assert listener.captions
    (cached,) = scheduler.feature_cache._encoded_by_digest.values()
    assert cached.images == ()
    scheduler.close()


def test_scheduler_rejects_everything_request_for_unsupported_captioner(blocking_captioner, scene):
    scheduler = RequestScheduler(blocking_captioner)
    with pytest.raises(UnsupportedRequestError, match="send prompts"):
        scheduler.submit(InferenceRequest(scene.image, everything=EverythingOptions()), Listener())
    scheduler.close()


@pytest.fixture(scope="module")
def mosaic(scene):
    """An image of 4 x 4 scenes, whose regions cover few cells."""
    image = Image.new("RGB", (4 * scene.image.width, 4 * scene.image.height))
    for index in range(16):
        image.paste(scene.image, (index % 4 * scene.image.width, index // 4 * scene.image.height))
    return image


def test_scheduler_zooms_as_the_predictor_does_and_caches_crops(captioner, mosaic, scene):
    scheduler, prompts = RequestScheduler(captioner, max_regions_per_turn=2), make_box_prompts(scene)
    request = InferenceRequest(mosaic, prompts, zoom=resolve_zoom(captioner, 8), return_candidates=True)
    predictor = sca.Predictor(captioner)
    predictor.set_image(mosaic)
    expected, first_events = predictor.predict(prompts, zoom=8), list(scheduler.iter_events(request))
    captions = [event for event in first_events if isinstance(event, Caption)]
    assert to_tuples(captions) == to_tuples(expected)
    assert to_tuples(captions) != to_tuples(captioner.caption(mosaic, prompts))
    candidates = [event.masks for event in first_events if isinstance(event, CandidateMasks)]
    expected_candidates = predictor.segment(prompts, zoom=8)
    assert [[mask.rle for mask in masks] for masks in candidates] == [
        [mask.rle for mask in masks] for masks in expected_candidates
    ]
    num_encoded = scheduler.feature_cache.misses
    assert list(scheduler.iter_events(request)) == first_events
    assert scheduler.feature_cache.misses == num_encoded > 1
    unzoomed = [
        event for event in scheduler.iter_events(InferenceRequest(mosaic, prompts)) if isinstance(event, Caption)
    ]
    assert to_tuples(unzoomed) == to_tuples(captioner.caption(mosaic, prompts))
    scheduler.close()


@pytest.mark.slow
def test_scheduler_zooms_into_found_regions_as_everything_mode_does(captioner, mosaic):
    scheduler = RequestScheduler(captioner, max_regions_per_turn=4)
    options = EverythingOptions(points_per_side=8, pred_iou_thresh=0.3, stability_score_thresh=0.3)
    request = InferenceRequest(mosaic, everything=options, max_regions=6, zoom=resolve_zoom(captioner, 8))
    captions = [event for event in scheduler.iter_events(request) if isinstance(event, Caption)]
    predictor = sca.Predictor(captioner)
    predictor.set_image(mosaic)
    assert to_tuples(captions) == to_tuples(caption_everything(predictor, options=options, max_regions=6, zoom=8))
    assert to_tuples(captions) != to_tuples(caption_everything(predictor, options=options, max_regions=6))
    assert captions
    scheduler.close()
