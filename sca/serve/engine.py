"""One model for many clients: what they ask for at the same time is answered together.

    engine = Engine(captioner)
    ticket = engine.ask(Question(image, prompts), tell=print)
    ticket.cancel()

A thread of its own owns the model. In each turn it takes some regions of everybody who waits and asks for the same task
with the same settings, so that a long request does not keep short ones waiting; images seen lately keep their
features.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from PIL import Image
from sca_registry.contracts import Caption, Captioner, Prompt
from sca_registry.spec import Everything

from sca.everything import find_everything
from sca.mask_predictor import Encoded, Mask, MaskPredictor
from sca.masks import box_of

log = logging.getLogger("sca.serve")


class EngineError(Exception):
    """A question that got no answer; the message says why."""


class BusyError(EngineError):
    """Too much waits already."""


class LateError(EngineError):
    """The time that a question had is over."""


class NoRoomError(EngineError):
    """The answer does not fit into memory."""


class CannotError(EngineError, ValueError):
    """The model is not of the kind that could answer."""


class ClosedError(EngineError):
    """The engine answers no more."""


@dataclass(frozen=True)
class Question:
    """What is asked of one picture: its `prompts` as `sca.prompts.check` gives them, or all that is found with
    `everything`.

    generation: settings as `Predictor.predict` takes them. masks: whether they are wanted of `prompts`, too.
    candidates: whether all masks that a prompt may mean are wanted besides. seconds: how long the answer may take.
    """

    image: Image.Image
    prompts: Sequence[Prompt] = ()
    everything: Everything | None = None
    task: str = "caption"
    generation: Mapping[str, Any] = field(default_factory=dict)
    masks: bool = True
    candidates: bool = False
    seconds: float = math.inf


class Found(NamedTuple):
    """So many regions are to be captioned."""

    regions: int


class Searched(NamedTuple):
    """So many of all points have been looked at."""

    done: int
    points: int


class Candidates(NamedTuple):
    """All masks that a region may have, the best first."""

    region: int
    masks: list[Mask]


class Done(NamedTuple):
    """All regions are answered."""

    regions: int


Event = Found | Searched | Caption | Candidates | Done | EngineError


class Ticket:
    """A question that waits or is being answered. `tell` is called in the engine's thread: with `Found`, the captions
    as they are there, and at last `Done` or an `EngineError`; with `Searched` while everything is looked for.
    """

    def __init__(self, question: Question, tell: Callable[[Event], None]):
        self.question, self.tell = question, tell
        self.digest = _digest(question.image)
        self.prompts = list(question.prompts)
        self.masks: list[Mask] | None = None  # of what was found
        self.search = question.everything is not None
        self.answered = 0
        self.deadline = time.monotonic() + question.seconds
        self.cancelled = False

    @property
    def left(self) -> int:
        """Regions without an answer."""
        return len(self.prompts) - self.answered

    @property
    def kind(self) -> tuple[Any, ...]:
        """Tickets of one kind can be answered together."""
        asked = self.question
        return asked.task, tuple(sorted(asked.generation.items())), self.to_mask, asked.candidates

    @property
    def to_mask(self) -> bool:
        """Whether masks are still to be made."""
        return self.masks is None and self.question.masks

    def cancel(self) -> None:
        """Nothing more is computed or told."""
        self.cancelled = True


class Engine:
    """Answers questions with a captioner, in turns.

    regions: at most so many are captioned in a turn. images: at most so many are encoded together. cache: bytes of
    features that are kept. waiting: at most so many regions wait; who comes then is sent away (everything counts as
    one until it is found).
    """

    def __init__(
        self, captioner: Captioner, regions: int = 64, images: int = 8, cache: int = 512 * 2**20, waiting: int = 10_000
    ):
        self.captioner, self.regions, self.images, self.waiting = captioner, regions, images, waiting
        self.features = FeatureStore(cache)
        self.turns = self.answered = 0
        self._tickets: deque[Ticket] = deque()
        self._there = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sca-engine", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Regions that wait, or are being answered."""
        with self._there:
            return self._queued()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def finds(self) -> bool:
        """Whether the captioner can be asked for everything."""
        return isinstance(self.captioner, MaskPredictor) and self.captioner.model is not None

    def ask(self, question: Question, tell: Callable[[Event], None]) -> Ticket:
        """Puts a question in the queue. BusyError, ClosedError, CannotError."""
        if question.everything is not None and not self.finds:
            raise CannotError("this model finds no regions by itself: give prompts")
        ticket = Ticket(question, tell)
        with self._there:
            if self._closed:
                raise ClosedError("the server is going down")
            asked = len(ticket.prompts) + ticket.search
            if self._queued() + asked > self.waiting:
                raise BusyError(f"{self._queued()} regions wait, and at most {self.waiting} may: try again later")
            self._tickets.append(ticket)
            self._there.notify()
        return ticket

    def events(self, question: Question) -> Iterator[Event]:
        """What is told of a question, up to `Done`; an EngineError is raised. Whoever stops listening has left."""
        told: SimpleQueue[Event] = SimpleQueue()
        ticket = self.ask(question, told.put)
        try:
            while True:
                event = told.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.cancel()

    def close(self) -> None:
        """Ends after the turn that is being made; who waits is told."""
        with self._there:
            self._closed = True
            self._there.notify()
        self._thread.join()

    def _queued(self) -> int:
        return sum(ticket.left + ticket.search for ticket in self._tickets if not ticket.cancelled)

    def _work(self) -> None:
        while True:
            with self._there:
                self._there.wait_for(lambda: self._tickets or self._closed)
                if self._closed:
                    left, self._tickets = self._tickets, deque()
                    break
                turn = self._next()
            if turn:
                self._make(turn)
            with self._there:  # who has something left waits at the end, and others have their turn
                made = set(map(id, turn))
                unfinished = [each for each in turn if not each.cancelled and (each.left or each.search)]
                self._tickets = deque(each for each in self._tickets if id(each) not in made)
                self._tickets.extend(unfinished)
        for ticket in left:
            _tell(ticket, ClosedError("the server is going down"))

    def _next(self) -> list[Ticket]:
        """The tickets of the next turn. They stay in the queue, as what is being answered counts as waiting."""
        now = time.monotonic()
        for ticket in [each for each in self._tickets if each.cancelled or each.deadline < now]:
            self._tickets.remove(ticket)
            _tell(ticket, LateError(f"no answer in {ticket.question.seconds:g} s: ask for less, or later"))
        if not self._tickets:
            return []
        first = self._tickets[0]
        if first.search:
            return [first]
        return [each for each in self._tickets if not each.search and each.kind == first.kind][: self.regions]

    def _make(self, turn: list[Ticket]) -> None:
        self.turns += 1
        try:
            if turn[0].search:
                self._search(turn[0])
            else:
                self._answer(turn)
        except _Left:
            pass
        except Exception as error:  # whatever goes wrong with these, the others are to be answered
            if len(turn) > 1:
                for ticket in turn:
                    self._make([ticket])
                return
            (ticket,) = turn
            _tell(ticket, _told(error))
            ticket.cancel()

    def _search(self, ticket: Ticket) -> None:
        def progress(done: int, points: int) -> None:
            if ticket.cancelled:
                raise _Left
            if ticket.deadline < time.monotonic():
                raise LateError(f"not found in {ticket.question.seconds:g} s: ask for fewer points, or later")
            _tell(ticket, Searched(done, points))

        predictor = self.captioner
        predictor.image, predictor.encoded = ticket.question.image, self._encoded([ticket])
        ticket.masks, ticket.prompts = find_everything(predictor, ticket.question.everything, None, progress)
        ticket.search = False
        _tell(ticket, Found(len(ticket.prompts)))
        if not ticket.prompts:
            _tell(ticket, Done(0))

    def _answer(self, turn: list[Ticket]) -> None:
        share = max(1, self.regions // len(turn))
        requests = [ticket.prompts[ticket.answered : ticket.answered + share] for ticket in turn]
        task, settings = turn[0].question.task, turn[0].question.generation
        if hasattr(self.captioner, "answer"):
            answers = self.captioner.answer(self._encoded(turn), requests, task, masks=turn[0].to_mask, **settings)
        else:
            answers = [
                self.captioner.describe(ticket.question.image, request, task, **settings)
                for ticket, request in zip(turn, requests, strict=True)
            ]
        for ticket, captions in zip(turn, answers, strict=True):
            if not ticket.answered and ticket.masks is None:
                _tell(ticket, Found(len(ticket.prompts)))
            if ticket.question.candidates and captions and captions[0].mask is not None:
                self._candidates(ticket, len(captions))
            for caption in captions:
                known = {}
                if ticket.masks is not None:
                    code, iou = ticket.masks[ticket.answered]
                    known = {"mask": code, "box": box_of(code), "iou": iou}
                _tell(ticket, replace(caption, region=ticket.answered, **known))
                ticket.answered += 1
                self.answered += 1
            if not ticket.left:
                _tell(ticket, Done(ticket.answered))

    def _candidates(self, ticket: Ticket, count: int) -> None:
        """Tells the masks of the next regions."""
        predictor = self.captioner
        predictor.image, predictor.encoded = ticket.question.image, self._encoded([ticket])
        found = predictor.segment(ticket.prompts[ticket.answered : ticket.answered + count])
        for region, masks in enumerate(found, ticket.answered):
            _tell(ticket, Candidates(region, masks))

    def _encoded(self, turn: Sequence[Ticket]) -> Encoded:
        """The images of some tickets: those that are not kept are encoded together."""
        images = {ticket.digest: ticket.question.image for ticket in turn}
        kept = {digest: self.features.get(digest) for digest in images}
        missing = [digest for digest, encoded in kept.items() if encoded is None]
        for start in range(0, len(missing), self.images):
            some = missing[start : start + self.images]
            together = self.captioner.encode([images[digest] for digest in some])
            for place, digest in enumerate(some):
                kept[digest] = _one(together, place)
                self.features.put(digest, kept[digest])
        each = [kept[ticket.digest] for ticket in turn]
        if len(each) == 1:
            return each[0]
        images = [image for encoded in each for image in encoded.images]
        frames = [frame for encoded in each for frame in encoded.frames]
        features = None if each[0].features is None else torch.cat([encoded.features for encoded in each])
        return Encoded(images, features, frames)


class FeatureStore:
    """What an encoder has made of the images seen last, at most so many bytes of it with the pictures."""

    def __init__(self, limit: int):
        self.limit, self.held, self.hits, self.misses = limit, 0, 0, 0
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: str) -> Encoded | None:
        found = self._kept.get(digest)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(digest)
        return found

    def put(self, digest: str, encoded: Encoded) -> None:
        self._kept[digest] = encoded
        self.held += _size(encoded)
        while self.held > self.limit:
            self.held -= _size(self._kept.popitem(last=False)[1])


class _Left(Exception):
    """Nobody waits for it any more."""


def _tell(ticket: Ticket, event: Event) -> None:
    if not ticket.cancelled:
        ticket.tell(event)


def _told(error: Exception) -> EngineError:
    """What may be said of an error; a defect is for the log."""
    if isinstance(error, EngineError):
        return error
    if isinstance(error, ValueError):  # what the library raises for what was asked
        return CannotError(str(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return NoRoomError("not enough memory: ask for fewer regions or beams")
    log.exception("a question could not be answered")
    return EngineError("the model failed; the server's log says how")


def _one(encoded: Encoded, place: int) -> Encoded:
    """One of several images, by itself in memory."""
    if encoded.features is None:
        return Encoded([encoded.images[place]], None, ())
    features = encoded.features[place : place + 1]
    return Encoded([encoded.images[place]], features.clone(), [encoded.frames[place]])


def _size(encoded: Encoded) -> int:
    (image,) = encoded.images
    pixels = 3 * image.width * image.height
    return pixels + (0 if encoded.features is None else encoded.features.nbytes)


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).hexdigest()
