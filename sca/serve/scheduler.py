"""One model for many clients: what they ask for at the same time is answered together.

    scheduler = RequestScheduler(captioner)
    ticket = scheduler.ask(Question(image, prompts), tell=print)
    ticket.cancel()

A thread of its own owns the model and works in short turns. A turn takes some regions of everybody who waits and asks
for the same task with the same settings, or looks for everything in one image for a moment. Who has not had a turn yet
and who has had one take turns, and so do clients, so that a long request does not keep short ones waiting. Images seen
lately keep their features.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Literal

import torch
from sca_registry.contracts import Captioner, Prompt
from sca_registry.spec import GENERATION

from sca.inference.automatic import search_everything
from sca.inference.batch import answer_requests
from sca.inference.engine import Encoded, MaskEngine
from sca.io.masks import box_of
from sca.serve.feature_store import FeatureStore
from sca.serve.memory import is_out_of_memory, release_memory
from sca.serve.tickets import (
    BusyError,
    Candidates,
    CannotError,
    ClosedError,
    Done,
    Event,
    Found,
    LateError,
    NoRoomError,
    Question,
    SchedulerError,
    Ticket,
)

log = logging.getLogger("sca.serve")

SEARCH_SECONDS = 0.1  # that one turn of a search may take
SEARCHES = 2  # for everything that run at a time; the others wait
SEARCH_BYTES = 512 * 2**20 // SEARCHES  # of candidate masks that one search may hold
SHORT = 64  # regions of a request that may use the whole queue; longer ones leave a quarter of it
CROWDED = 4  # how many times shorter turns are while somebody waits who has no part in them
POINTS = 32  # of a prompt that cost as much as a region
PIXELS = 2**22  # of a mask that cost as much as a region


class RequestScheduler:
    """Answers questions with a captioner, in turns.

    Args:
        captioner: The model.
        regions: Maximum regions captioned in a turn. Regions that cost more than usual (beams, tokens, points, large
            masks) count as several.
        images: Maximum images encoded together.
        cache: Bytes of features to keep.
        waiting: Maximum regions in the queue; a search for everything counts as one.
        max_found: Maximum regions that a search for everything may find.
    """

    def __init__(
        self,
        captioner: Captioner,
        regions: int = 64,
        images: int = 8,
        cache: int = 512 * 2**20,
        waiting: int = 10_000,
        max_found: int | None = None,
    ):
        self.captioner, self.regions, self.images, self.waiting = captioner, regions, images, waiting
        self.max_found = max_found
        self.features = FeatureStore(cache)
        self.turns = self.answered = 0
        self._tickets: deque[Ticket] = deque()
        self._turn: list[Ticket] = []  # that is being made
        self._after_new = False  # whether the last turn was of somebody who had not had one
        self._served: dict[str, int] = {}  # the last turn of each client who waits
        self._there = threading.Condition()
        self._draining = self._closed = self._dead = False
        self._thread = threading.Thread(target=self._work, name="sca-scheduler", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Regions that wait, or are being answered."""
        with self._there:
            return self._queued()

    @property
    def alive(self) -> bool:
        """Whether questions are taken."""
        return self.state == "ok"

    @property
    def state(self) -> Literal["ok", "draining", "down"]:
        if self._dead or self._closed:
            return "down"
        return "draining" if self._draining else "ok"

    @property
    def finds(self) -> bool:
        """Whether the captioner can be asked for everything."""
        return isinstance(self.captioner, MaskEngine) and self.captioner.model is not None

    def ask(self, question: Question, tell: Callable[[Event], None]) -> Ticket:
        """Puts a question in the queue. BusyError, ClosedError, CannotError."""
        if question.everything is not None and not self.finds:
            raise CannotError("this model finds no regions by itself: give prompts")
        ticket = Ticket(question, tell)
        with self._there:
            if self.state != "ok":
                raise self._refusal()
            asked, waiting = ticket.waiting, self._queued()
            if waiting + asked > (self.waiting if asked <= SHORT else self.waiting * 3 // 4):
                raise BusyError(f"{waiting} regions wait, and at most {self.waiting} may: try again later")
            self._tickets.append(ticket)
            self._there.notify_all()
        return ticket

    def events(self, question: Question) -> Iterator[Event]:
        """What is told of a question, up to `Done`; a SchedulerError is raised. Whoever stops listening has left."""
        told: SimpleQueue[Event] = SimpleQueue()
        ticket = self.ask(question, told.put)
        try:
            while True:
                event = told.get()
                if isinstance(event, SchedulerError):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.cancel()

    def drain(self, seconds: float) -> None:
        """Accept no more questions; those accepted are answered for at most `seconds`, then the scheduler is closed."""
        with self._there:
            self._draining = True
        closing = threading.Timer(seconds, self.close)
        closing.daemon = True
        closing.start()

    def close(self, seconds: float = 1.0) -> None:
        """Stop after the turn that is being made, and wait for it for at most `seconds`; all others get ClosedError."""
        with self._there:
            self._closed = True
            waiting = [ticket for ticket in self._tickets if not any(ticket is each for each in self._turn)]
            self._there.notify_all()
        for ticket in waiting:
            _end(ticket, self._refusal())
        self._thread.join(seconds)
        with self._there:
            left, self._tickets = self._tickets, deque()
        for ticket in left:
            _end(ticket, self._refusal())

    def _refusal(self) -> ClosedError:
        if self._dead:
            return ClosedError("the model has stopped working; restart the server")
        return ClosedError("the server is shutting down; try again later")

    def _queued(self) -> int:
        return sum(ticket.waiting for ticket in self._tickets)

    def _work(self) -> None:
        try:
            self._take_turns()
        except BaseException:  # also SystemExit: whoever waits would wait for ever
            log.critical("the model has stopped working; restart the server", exc_info=True)
            self._dead = True
        with self._there:
            left, self._tickets, self._turn = self._tickets, deque(), []
            self._closed = True
        for ticket in left:
            _end(ticket, self._refusal())

    def _take_turns(self) -> None:
        worked = False
        while True:
            with self._there:
                has_work = self._there.wait_for(lambda: self._tickets or self._closed, 1.0 if worked else None)
                if self._closed:
                    return
                self._turn = turn = self._next() if has_work else []
            if not has_work:
                worked = False
                release_memory()  # without the lock, for which /health and /metrics would wait
                continue
            if turn:
                self._make(turn)
                worked = True
            with self._there:  # who has something left waits at the end, and others have their turn
                made = set(map(id, turn))
                unfinished = [each for each in turn if not each.cancelled and (each.left or each.search)]
                self._tickets = deque(each for each in self._tickets if id(each) not in made)
                self._tickets.extend(unfinished)
                self._turn = []

    def _next(self) -> list[Ticket]:
        """The tickets of the next turn. They stay in the queue, as what is being answered counts as waiting."""
        now = time.monotonic()
        for ticket in [each for each in self._tickets if each.cancelled or each.deadline < now]:
            self._tickets.remove(ticket)
            _end(ticket, LateError(f"no answer in {ticket.question.seconds:g} s: ask for less, or later"))
        running = sum(each.steps is not None for each in self._tickets)
        ready = [each for each in self._tickets if not each.search or each.steps is not None or running < SEARCHES]
        if not ready:
            return []
        first = self._first(ready)
        if first.search:
            turn = [first]
        else:
            rank: Counter[str] = Counter()  # of several tickets of a client, one comes before the second of another
            alike = []
            for each in ready:
                if each is not first and not each.search and each.kind == first.kind:
                    alike.append((rank[each.question.client], each))
                    rank[each.question.client] += 1
            turn = [first, *(each for _, each in sorted(alike, key=lambda pair: pair[0]))][: self.regions]
        self.turns += 1
        waiting = {each.question.client for each in self._tickets}
        self._served = {client: last for client, last in self._served.items() if client in waiting}
        for each in turn:
            self._served[each.question.client] = self.turns
        return turn

    def _first(self, ready: Sequence[Ticket]) -> Ticket:
        """Who is next: new tickets and others alternate, and among these the client who has waited longest."""
        new, others = ([each for each in ready if bool(each.turns) is had] for had in (False, True))
        chosen = (others if self._after_new else new) or others or new
        self._after_new = chosen is new
        return min(chosen, key=lambda each: self._served.get(each.question.client, -1))

    def _make(self, turn: list[Ticket]) -> None:
        for ticket in turn:
            ticket.turns += 1
        try:
            if turn[0].search:
                self._search(turn[0])
            else:
                self._answer(turn)
        except Exception as error:  # whatever goes wrong with these, the others are to be answered
            if len(turn) > 1:
                for ticket in turn:
                    self._make([ticket])
                return
            (ticket,) = turn
            _end(ticket, _to_scheduler_error(error))

    def _search(self, ticket: Ticket) -> None:
        """Continue the search of a ticket for at most SEARCH_SECONDS."""
        if ticket.steps is None:
            limits = {"max_found": self.max_found, "max_bytes": SEARCH_BYTES}
            encoded = self._encoded([ticket])
            ticket.steps = search_everything(self.captioner, encoded, ticket.question.everything, **limits)
        end = time.monotonic() + SEARCH_SECONDS
        try:
            while True:
                step = next(ticket.steps)
                if step != ticket.looked_at:
                    ticket.looked_at = step
                    _tell(ticket, step)
                if ticket.cancelled or time.monotonic() > end:
                    return
        except StopIteration as found:
            ticket.masks, ticket.prompts = (each[: ticket.question.max_regions] for each in found.value)
            ticket.search, ticket.steps = False, None
            _tell(ticket, Found(len(ticket.prompts)))
            if not ticket.prompts:
                _tell(ticket, Done(0))

    def _shares(self, turn: Sequence[Ticket]) -> list[int]:
        """How many regions of each ticket are answered in a turn: one of each after another, up to what a turn may
        cost.
        """
        others = any(not each.cancelled for each in self._tickets if not any(each is one for one in turn))
        left = self.regions / (CROWDED if others else 1)
        costs = [self._costs(ticket) for ticket in turn]
        shares = [0] * len(turn)
        while True:
            before = sum(shares)
            for place, ticket in enumerate(turn):
                if shares[place] < ticket.left:
                    cost = costs[place](ticket.prompts[ticket.answered + shares[place]])
                    if sum(shares) and cost > left:
                        return shares
                    left -= cost
                    shares[place] += 1
            if sum(shares) == before:
                return shares

    def _costs(self, ticket: Ticket) -> Callable[[Prompt], float]:
        """What a region costs, compared to a usual one."""
        usual = getattr(self.captioner, "generation", GENERATION)
        asked = {**usual, **ticket.question.generation}
        texts = max(asked["beams"], asked.get("captions", 1))
        words = texts * asked["max_new_tokens"] / (usual["beams"] * usual["max_new_tokens"])
        if asked.get("seed") is not None:  # such regions are captioned one at a time
            words = max(words, self.regions)
        pixels = ticket.question.image.width * ticket.question.image.height / PIXELS
        made = ticket.to_mask + 3 * ticket.question.candidates

        def cost(prompt: Prompt) -> float:
            masks = made + (prompt.mask is not None)
            return max(1.0, words) + len(prompt.points) // POINTS + int(masks * pixels)

        return cost

    def _answer(self, turn: list[Ticket]) -> None:
        shares = zip(turn, self._shares(turn), strict=True)
        parts = [(each, share) for each, share in shares if share or not each.left]
        turn = [each for each, _ in parts]
        requests = [each.prompts[each.answered : each.answered + share] for each, share in parts]
        task, settings = turn[0].question.task, turn[0].question.generation
        images, encoded = [ticket.question.image for ticket in turn], None
        if hasattr(self.captioner, "answer"):
            encoded, settings = self._encoded(turn), {**settings, "masks": turn[0].to_mask}
        answers = answer_requests(self.captioner, images, requests, task, encoded, **settings)
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
        """Send the candidate masks of the next regions."""
        prompts = ticket.prompts[ticket.answered : ticket.answered + count]
        found = self.captioner.segment(self._encoded([ticket]), [prompts])
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
        shown = [ticket.question.image for ticket in turn]
        if each[0].features is None:
            return Encoded(shown, None, ())
        features = each[0].features if len(each) == 1 else torch.cat([encoded.features for encoded in each])
        return Encoded(shown, features, [frame for encoded in each for frame in encoded.frames])


def _tell(ticket: Ticket, event: Event) -> None:
    if ticket.cancelled:
        return
    try:
        ticket.tell(event)
    except RuntimeError:  # of an event loop that has ended
        ticket.cancel()


def _end(ticket: Ticket, error: SchedulerError) -> None:
    """End a ticket without an answer: the error is its last event."""
    _tell(ticket, error)
    ticket.cancel()
    ticket.steps = None


def _to_scheduler_error(error: Exception) -> SchedulerError:
    """What may be said of an error; a defect is for the log."""
    if isinstance(error, SchedulerError):
        return error
    if is_out_of_memory(error):
        return NoRoomError("not enough memory: ask for fewer regions or beams")
    if isinstance(error, ValueError):  # what the library raises for what was asked
        return CannotError(str(error))
    log.exception("a question could not be answered", exc_info=error)
    return SchedulerError("the model failed; the server's log says how")


def _one(encoded: Encoded, place: int) -> Encoded:
    """What was made of one of several images, by itself in memory and without the image."""
    if encoded.features is None:
        return Encoded((), None, ())
    return Encoded((), encoded.features[place : place + 1].clone(), [encoded.frames[place]])
