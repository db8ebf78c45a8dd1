"""Who asks at the same time is answered together, by the same words as alone."""

import threading
import time
from itertools import pairwise

import pytest
from sca_registry.contracts import Caption, Prompt
from sca_registry.spec import EverythingOptions

import sca
from sca.inference.automatic import SearchProgress, caption_everything
from sca.serve import scheduler as module
from sca.serve.feature_store import FeatureStore
from sca.serve.scheduler import RequestScheduler
from sca.serve.tickets import (
    DeadlineExceededError,
    InferenceRequest,
    InsufficientMemoryError,
    QueueFullError,
    RegionsFound,
    RequestDone,
    SchedulerClosedError,
    SchedulerError,
    UnsupportedRequestError,
)


class Listener:
    """What a ticket tells, and a wait for its end."""

    def __init__(self):
        self.events, self.ended = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, RequestDone | SchedulerError):
            self.ended.set()

    @property
    def captions(self):
        assert self.ended.wait(60)
        return [event for event in self.events if isinstance(event, Caption)]


class Held:
    """A captioner that waits until it is let go, and counts what it is asked."""

    def __init__(self, captioner):
        self.captioner, self.go, self.asked = captioner, threading.Event(), []
        self.encoded, self.busy = 0, threading.Event()

    def encode(self, images):
        self.encoded += len(images)
        return self.captioner.encode(images)

    def caption_batch(self, encoded, requests, task, **settings):
        self.busy.set()
        self.go.wait(60)
        self.asked.append([len(request) for request in requests])
        return self.captioner.caption_batch(encoded, requests, task, **settings)


@pytest.fixture
def held(tiny):
    held = Held(tiny)
    yield held
    held.go.set()


def occupy(scheduler, held, question):
    """A question that is being answered; what is asked from now on waits."""
    listener = Listener()
    scheduler.submit(question, listener)
    assert held.busy.wait(60)
    return listener


def boxes(scene):
    return [Prompt(box=region.box) for region in scene.regions]


def told(captions):
    return [(each.text, each.region_id, each.mask, each.box) for each in captions]


def test_questions_that_wait_together_are_answered_together_as_if_each_was_alone(tiny, held, scene):
    scheduler = RequestScheduler(held, max_regions_per_turn=64)
    prompts = boxes(scene)
    first = occupy(scheduler, held, InferenceRequest(scene.image, prompts))
    listeners = [Listener() for _ in range(5)]
    pictures = [scene.image, scene.image.transpose(0)]
    for number, listener in enumerate(listeners):
        scheduler.submit(InferenceRequest(pictures[number % 2], prompts[: number + 1]), listener)
    held.go.set()
    for number, listener in enumerate(listeners):
        assert told(listener.captions) == told(tiny.caption(pictures[number % 2], prompts[: number + 1]))
    assert told(first.captions) == told(tiny.caption(scene.image, prompts))
    assert held.asked[1:] == [[1, 2, 3, 4, min(5, len(prompts))]]
    assert held.encoded == 2, "each picture once"
    scheduler.close()


def test_a_long_question_does_not_keep_a_short_one_waiting(held, scene):
    scheduler = RequestScheduler(held, max_regions_per_turn=4)
    order, ended = [], [threading.Event(), threading.Event()]

    def listen(number):
        def tell(event):
            order.append(number)
            if isinstance(event, RequestDone):
                ended[number].set()

        return tell

    scheduler.submit(InferenceRequest(scene.image, boxes(scene) * 10), listen(0))
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:2]), listen(1))
    held.go.set()
    assert all(each.wait(60) for each in ended)
    assert len(order) - 1 - order[::-1].index(1) < len(order) / 2
    assert max(sum(each) for each in held.asked) <= 4
    scheduler.close()


@pytest.mark.slow
def test_a_search_for_everything_does_not_keep_short_questions_waiting(tiny, scene, monkeypatch):
    monkeypatch.setattr("sca.serve.scheduler.SEARCH_SECONDS", 0.0)
    scheduler, order = RequestScheduler(tiny), []
    search, options = Listener(), EverythingOptions(**{**vars(tiny.everything), "points_per_side": 32})
    scheduler.submit(
        InferenceRequest(scene.image, everything=options), lambda event: (order.append("search"), search(event))
    )
    for number in range(5):
        short = Listener()
        scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1]), short)
        assert short.captions
        order.append(number)
    assert not search.ended.is_set()
    assert "search" in order[: order.index(3)], "it goes on meanwhile"
    assert told(search.captions) == told(alone(tiny, scene.image, options))
    scheduler.close()


def alone(captioner, image, options):
    predictor = sca.Predictor(captioner)
    predictor.set_image(image)
    return caption_everything(predictor, options=options)


@pytest.mark.slow
def test_searches_take_turns_and_each_is_as_if_alone(tiny, scene):
    scheduler = RequestScheduler(tiny)
    options = EverythingOptions(**{**vars(tiny.everything), "points_per_side": 24})
    images = [scene.image, scene.image.transpose(0), scene.image.transpose(1)]
    expected = [told(alone(tiny, image, options)) for image in images]
    listeners = [Listener() for _ in images]
    for image, listener in zip(images, listeners, strict=True):
        scheduler.submit(InferenceRequest(image, everything=options), listener)
    assert [told(listener.captions) for listener in listeners] == expected
    scheduler.close()


def test_a_search_that_finds_too_much_is_refused(tiny, scene):
    scheduler, listener = RequestScheduler(tiny, max_found_regions=3), Listener()
    options = EverythingOptions(points_per_side=8, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0)
    scheduler.submit(InferenceRequest(scene.image, everything=options), listener)
    assert listener.captions == []
    assert "more than 3 regions were found" in str(listener.events[-1])
    scheduler.close()


def test_a_search_with_too_many_masks_is_refused(tiny, scene, monkeypatch):
    assert module.MAX_CONCURRENT_SEARCHES * module.SEARCH_BYTES <= 512 * 2**20
    monkeypatch.setattr(module, "SEARCH_BYTES", 2**16)
    scheduler, listener = RequestScheduler(tiny), Listener()
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


def test_releasing_memory_does_not_block_the_scheduler(tiny, scene, monkeypatch):
    releasing, go = threading.Event(), threading.Event()
    monkeypatch.setattr(module, "release_memory", lambda: releasing.set() or go.wait(60))
    scheduler, listener = RequestScheduler(tiny), Listener()
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1]), listener)
    assert listener.captions
    assert releasing.wait(30)
    looking = threading.Thread(target=lambda: scheduler.num_queued, daemon=True)
    looking.start()
    looking.join(5)
    waited = looking.is_alive()
    go.set()
    assert not waited
    scheduler.close()


def test_who_has_had_no_turn_alternates_with_others_and_clients_take_turns(held, scene):
    """Each question has a kind of its own, so that each turn is of one."""
    scheduler, order = RequestScheduler(held, max_regions_per_turn=1), []
    prompts = boxes(scene)[:1]

    def ask(name, client, words, count=1):
        question = InferenceRequest(
            scene.image, prompts * count, generation={"max_new_tokens": words}, client_id=client
        )
        scheduler.submit(question, lambda event: order.append(name) if isinstance(event, Caption) else None)

    occupy(scheduler, held, InferenceRequest(scene.image, prompts))
    ask("long", "heavy", 4, count=4)
    for number in range(3):
        ask(f"heavy {number}", "heavy", 5 + number)
    ask("light", "light", 9)
    held.go.set()
    deadline = time.monotonic() + 60
    while scheduler.num_queued and time.monotonic() < deadline:
        time.sleep(0.01)
    assert order[:3] == ["long", "long", "light"], "after one new question of the other client"
    news, longs = [[place for place, name in enumerate(order) if (name == "long") is kind] for kind in (False, True)]
    assert all(later - before <= 2 for before, later in pairwise(news[1:]))
    assert longs[1] < news[-1], "who has had a turn goes on meanwhile"
    scheduler.close()


@pytest.mark.parametrize(
    ("more", "sizes"),
    [({}, [8]), ({"generation": {"num_beams": 4}}, [2] * 4), ({"generation": {"max_new_tokens": 80}}, [2] * 4)],
)
def test_regions_that_cost_more_are_fewer_in_a_turn(held, scene, more, sizes):
    scheduler, listener = RequestScheduler(held, max_regions_per_turn=8), Listener()
    held.go.set()
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1] * 8, **more), listener)
    assert len(listener.captions) == 8
    assert [sum(each) for each in held.asked] == sizes
    scheduler.close()


def test_points_and_large_masks_make_a_turn_shorter(held, scene):
    scheduler, listeners = RequestScheduler(held, max_regions_per_turn=8), [Listener(), Listener()]
    held.go.set()
    many = Prompt(points=((3.0, 3.0, 1),) * 256)
    scheduler.submit(InferenceRequest(scene.image, [many] * 3), listeners[0])
    assert len(listeners[0].captions) == 3
    large = scene.image.resize((4096, 4096))
    scheduler.submit(InferenceRequest(large, [Prompt(box=(0.0, 0.0, 9.0, 9.0))] * 4, return_masks=True), listeners[1])
    assert len(listeners[1].captions) == 4
    assert [sum(each) for each in held.asked] == [1, 1, 1, 1, 1, 1, 1]
    scheduler.close()


def test_long_questions_leave_room_in_the_queue(held, scene):
    scheduler = RequestScheduler(held, max_queue=200)
    occupy(scheduler, held, InferenceRequest(scene.image, boxes(scene)[:1]))
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1] * 140), Listener())
    with pytest.raises(QueueFullError):
        scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1] * 65), Listener())
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1] * 50), Listener())
    held.go.set()
    scheduler.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_worker_dies_who_waits_is_told_and_nobody_is_let_in(held, scene, caplog):
    def answer(*_, **__):
        held.busy.set()
        held.go.wait(60)
        raise SystemExit

    held.caption_batch = answer
    scheduler = RequestScheduler(held)
    listeners = [occupy(scheduler, held, InferenceRequest(scene.image, boxes(scene))), Listener()]
    scheduler.submit(InferenceRequest(scene.image, boxes(scene), task="recognition"), listeners[1])
    held.go.set()
    for listener in listeners:
        assert listener.captions == []
        assert isinstance(listener.events[-1], SchedulerClosedError)
        assert "the model has stopped working; restart the server" in str(listener.events[-1])
    assert (scheduler.accepts_requests, scheduler.state) == (False, "down")
    with pytest.raises(SchedulerClosedError, match="restart the server"):
        scheduler.submit(InferenceRequest(scene.image, boxes(scene)), Listener())
    assert "SystemExit" in caplog.text
    scheduler.close()


def test_a_draining_scheduler_answers_who_waits_and_takes_no_more(held, scene):
    scheduler = RequestScheduler(held)
    listeners = [occupy(scheduler, held, InferenceRequest(scene.image, boxes(scene)[:1])), Listener()]
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:2], task="recognition"), listeners[1])
    scheduler.drain(30)
    assert scheduler.state == "draining"
    with pytest.raises(SchedulerClosedError, match="shutting down"):
        scheduler.submit(InferenceRequest(scene.image, boxes(scene)), Listener())
    held.go.set()
    assert [len(listener.captions) for listener in listeners] == [1, 2]
    scheduler.close()


def test_settings_that_differ_are_not_mixed(tiny, held, scene):
    scheduler = RequestScheduler(held)
    prompts = boxes(scene)
    listeners = {task: Listener() for task in ("caption", "recognition")}
    occupy(scheduler, held, InferenceRequest(scene.image, prompts[:1]))
    for task, listener in listeners.items():
        scheduler.submit(InferenceRequest(scene.image, prompts, task=task), listener)
    held.go.set()
    for task, listener in listeners.items():
        assert told(listener.captions) == told(tiny.caption(scene.image, prompts, task))
    scheduler.close()


def test_everything_is_found_and_captioned_as_without_a_server(tiny, scheduler, scene):
    listener, options = Listener(), EverythingOptions(**{**vars(tiny.everything), "points_per_side": 12})
    scheduler.submit(InferenceRequest(scene.image, everything=options), listener)
    captions = listener.captions
    assert told(captions) == told(alone(tiny, scene.image, options))
    kinds = [type(event) for event in listener.events]
    assert kinds[0] is SearchProgress
    assert listener.events[kinds.index(RegionsFound)] == (len(captions),)
    assert listener.events[-1] == (len(captions),)


def test_nothing_is_computed_for_who_has_left(held, scene):
    scheduler = RequestScheduler(held)
    occupy(scheduler, held, InferenceRequest(scene.image, boxes(scene)[:1]))
    left = Listener()
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)), left).cancel()
    last = Listener()
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:2]), last)
    held.go.set()
    assert len(last.captions) == 2
    assert sum(map(sum, held.asked)) == 3
    assert left.events == []
    assert scheduler.num_queued == 0
    scheduler.close()


def test_too_many_are_sent_away_and_late_ones_told(held, scene):
    scheduler = RequestScheduler(held, max_queue=10)
    late = Listener()
    first = occupy(scheduler, held, InferenceRequest(scene.image, boxes(scene)[:1] * 8))
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:2], timeout=0.01), late)
    with pytest.raises(QueueFullError, match="10 regions wait, and at most 10 may"):
        scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1]), Listener())
    time.sleep(0.1)
    held.go.set()
    assert late.captions == []
    assert isinstance(late.events[-1], DeadlineExceededError)
    assert len(first.captions) == 8
    scheduler.close()


def test_what_fails_by_itself_does_not_keep_others_from_an_answer(tiny, held, scene, caplog):
    def answer(encoded, requests, task, **settings):
        held.busy.set()
        held.go.wait(60)
        if any(prompt.points for request in requests for prompt in request):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        if any(len(request) == 3 for request in requests):
            raise RuntimeError("a defect")
        if any(len(request) == 2 for request in requests):
            raise ValueError("it cannot be said")
        return tiny.caption_batch(encoded, requests, task, **settings)

    held.caption_batch = answer
    scheduler = RequestScheduler(held)
    one = boxes(scene)[:1]
    listeners = [occupy(scheduler, held, InferenceRequest(scene.image, one)), *(Listener() for _ in range(4))]
    for listener, prompts in zip(listeners[1:], (one, [Prompt(points=((3, 3, 1),))], one * 3, one * 2), strict=True):
        scheduler.submit(InferenceRequest(scene.image, prompts), listener)
    held.go.set()
    assert [len(listener.captions) for listener in listeners] == [1, 1, 0, 0, 0]
    kinds = [type(listener.events[-1]) for listener in listeners]
    assert kinds == [RequestDone, RequestDone, InsufficientMemoryError, SchedulerError, UnsupportedRequestError]
    assert "a defect" not in str(listeners[3].events[-1])
    assert "a defect" in caplog.text
    scheduler.close()


def test_a_closed_scheduler_tells_who_waits_and_takes_no_more(held, scene):
    scheduler = RequestScheduler(held)
    listeners = [occupy(scheduler, held, InferenceRequest(scene.image, boxes(scene)[:1])), Listener()]
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1], task="recognition"), listeners[1])
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    held.go.set()
    closing.join()
    assert len(listeners[0].captions) == 1
    assert isinstance(listeners[1].events[-1], SchedulerClosedError)
    with pytest.raises(SchedulerClosedError):
        scheduler.submit(InferenceRequest(scene.image, boxes(scene)), Listener())
    assert not scheduler.accepts_requests


def test_kept_features_are_bounded(tiny, scene):
    encoded = tiny.encode([scene.image])
    size = encoded.features.nbytes
    store = FeatureStore(2 * size + 1)
    for name in "abc":
        store.put(name, encoded)
    assert store.get("a") is None
    assert store.get("b") is encoded
    store.put("d", encoded)
    assert store.get("c") is None, "the one that was not asked for"
    assert store.get("b") is encoded
    assert store.stored_bytes == 2 * size
    FeatureStore(0).put("a", encoded)


def test_a_scheduler_keeps_no_images(tiny, scene):
    scheduler, listener = RequestScheduler(tiny), Listener()
    scheduler.submit(InferenceRequest(scene.image, boxes(scene)[:1]), listener)
    assert listener.captions
    (kept,) = scheduler.feature_store._encoded_by_digest.values()
    assert kept.images == ()
    scheduler.close()


def test_what_regions_are_not_found_by_cannot_be_asked_for_everything(held, scene):
    scheduler = RequestScheduler(held)
    with pytest.raises(UnsupportedRequestError, match="give prompts"):
        scheduler.submit(InferenceRequest(scene.image, everything=EverythingOptions()), Listener())
    scheduler.close()
