"""The page of `sca demo`, made of gradio's parts and a canvas to point with."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from sca_registry import zoo
from sca_registry.contracts import TASKS, Caption
from sca_registry.spec import GENERATION, EverythingOptions, Part

from sca.checkpoints.load import read_local_spec
from sca.checkpoints.trust import Trust
from sca.demo.session import Session
from sca.inference.automatic import Searched, settle_search
from sca.inference.factory import captioner
from sca.inference.generation import settle_generation
from sca.io.errors import InputError
from sca.io.hub import local_path
from sca.io.images import read_image
from sca.io.masks import PIXEL_LIMIT
from sca.io.text import escape_markdown
from sca.output import Writers
from sca.output.page import data_uri
from sca.serve.scheduler import RequestScheduler
from sca.serve.tickets import Candidates, Done, Question, SchedulerError

HELD = 2  # models that are kept in memory
SECONDS = 300.0  # that an answer may take
KEPT_SECONDS = 3600  # that the image and regions of a tab without a change stay in memory
FORMATS = ("png", "jsonl", "coco", "html")
TITLE = "Segment and caption anything"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = (
    '#canvas [data-testid="status-tracker"] { display: none }'  # what goes wrong is told elsewhere; this would cover it
)
HELP = (
    "Click what you mean, draw a box, or paint. Further points belong to the same region until **New region**. With "
    "the keyboard: arrows move a cross on the picture, Enter sets a point inside, Shift + Enter one outside."
)


class Controls(NamedTuple):
    """The values of the sliders."""

    beams: int = GENERATION["beams"]
    points: int = EverythingOptions.points_per_side
    iou: float = EverythingOptions.pred_iou_thresh

    @classmethod
    def of(cls, generation: Mapping[str, Any], search: EverythingOptions) -> Controls:
        """Return the values that a model's own settings give the sliders."""
        return cls(generation["beams"], search.points_per_side, search.pred_iou_thresh)

    def changed_from(self, shown: Controls) -> dict[str, Any]:
        """Return the values that a person moved, by name; None for those that are as they were shown."""
        moved = zip(self._fields, self, shown, strict=True)
        return {name: None if value == before else value for name, value, before in moved}

    def updates(self) -> list[Any]:
        """Return what puts the sliders at these values."""
        limits = zip(self, LIMITS, strict=True)
        return [gr.update(value=value, maximum=max(value, limit)) for value, limit in limits]


LIMITS = Controls(8, 64, 1)  # right ends of the sliders, unless the model's own value is beyond


class Models:
    """Schedulers by the names of their models; of many, those asked last stay in memory, and those in use.

    Args:
        device: Device of the models.
        dtype: Type of their parameters, None for their own.
        names: The models of the command line, which may have options.
        any_model: Allow every other name and folder, without options.
        agreed: What a model may do (see `sca.load`), by the names of the command line; others may do nothing.
    """

    def __init__(
        self,
        device: Any,
        dtype: str | None,
        names: Collection[str],
        *,
        any_model: bool = False,
        agreed: Mapping[str, Mapping[str, bool]] | None = None,
    ):
        self.device, self.dtype, self.names, self.any_model = device, dtype, names, any_model
        self.agreed = agreed or {}
        self._schedulers: OrderedDict[str, RequestScheduler] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._lock, self._loading = threading.Lock(), threading.Lock()

    @contextmanager
    def scheduler(self, name: str) -> Iterator[RequestScheduler]:
        """Loads it if it is not there. What `sca.captioner` raises for a name, and ValueError for one that may not be
        chosen.
        """
        self._check_name(name)
        scheduler = self._there(name)
        if scheduler is None:
            with self._loading:  # one at a time; nobody waits for it whose model is there
                scheduler = self._there(name) or self._loaded(name)
        try:
            yield scheduler
        finally:
            with self._lock:
                self._users[name] -= 1
            self._forget()

    def controls(self, name: str) -> Controls:
        """Return the model's own values without loading it, the same that `sca caption` uses.

        Those of a model that is neither loaded nor on this machine are not known; SAM's stand in for them.

        Raises:
            ValueError: The model cannot be chosen, or its spec cannot be read.
        """
        self._check_name(name)
        with self._lock:
            loaded = self._schedulers.get(name)
        if loaded is not None:
            generation = getattr(loaded.captioner, "generation", GENERATION)
            return Controls.of(generation, settle_search(loaded.captioner, {}))
        agreed = self.agreed.get(name, {})
        spec = read_local_spec(name, Trust(agreed.get("trust_remote_code", False), agreed.get("allow_external", False)))
        return Controls() if spec is None else Controls.of(spec.generation, spec.search)

    def close(self) -> None:
        with self._lock:
            ended = [*self._schedulers.values()]
            self._schedulers.clear()
        for scheduler in ended:
            scheduler.close()

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            if not self.any_model:
                raise ValueError(f"no model {name!r} here; choose from {', '.join(self.names)}")
            _check_bare_name(name)

    def _there(self, name: str) -> RequestScheduler | None:
        with self._lock:
            if name not in self._schedulers:
                return None
            self._schedulers.move_to_end(name)
            self._users[name] += 1
            return self._schedulers[name]

    def _loaded(self, name: str) -> RequestScheduler:
        options = {**self.agreed.get(name, {}), **({"dtype": self.dtype} if self.dtype else {})}
        scheduler = RequestScheduler(captioner(name, self.device, **options))
        with self._lock:
            self._schedulers[name] = scheduler
            self._users[name] += 1
        return scheduler

    def _forget(self) -> None:
        """All but the last `HELD`, as far as nobody uses them."""
        with self._lock:
            idle = [name for name in self._schedulers if not self._users[name]]
            ended = [self._schedulers.pop(name) for name in idle[: max(0, len(self._schedulers) - HELD)]]
        for scheduler in ended:
            scheduler.close()


def _check_bare_name(name: str) -> None:
    """Raise ValueError for the name of a model with options, which may trust a checkpoint; a folder has none."""
    path = local_path(name)
    if (path is None or not path.exists()) and Part.parse(name, "a model").options:
        raise ValueError(f"the model {name!r:.80} has options; enter its name only, or pass it to --model")


def page(
    models: Models, names: Sequence[str], examples: Sequence[tuple[str, str]], pixels: int = PIXEL_LIMIT
) -> gr.Blocks:
    """Build the page of the demo.

    Args:
        models: The models behind it; with `any_model` other names and folders can be entered.
        names: Models to choose from, the first of them to begin with.
        examples: Images, and what they are called.
        pixels: Maximum pixels of an image.
    """
    any_model = models.any_model
    here = files("sca.demo")
    first = models.controls(names[0])
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as demo:
        session = gr.State(None, time_to_live=KEPT_SECONDS)
        shown_controls = gr.State(first, time_to_live=KEPT_SECONDS)
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            model = gr.Dropdown(
                list(names),
                value=names[0],
                label="Model",
                info="of the zoo, or a folder" if any_model else None,
                allow_custom_value=any_model,
                elem_id="model",
            )
            task = gr.Radio(list(TASKS), value="caption", label="Task", elem_id="task")
            beams = gr.Slider(1, max(LIMITS.beams, first.beams), first.beams, step=1, label="Beams", elem_id="beams")
        note = gr.Markdown(_note(names[0]), elem_id="note")
        with gr.Row():
            upload = gr.UploadButton("Open a picture", file_types=["image"], elem_id="open", scale=1)
            gallery = gr.Gallery(
                list(examples),
                label="Examples",
                columns=len(examples),
                height=130,
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="examples",
                scale=4,
            )
        with gr.Tabs():
            with gr.Tab("Point at regions", id="prompt"):
                gr.Markdown(HELP)
            with gr.Tab("Everything", id="everything"), gr.Row():
                points = gr.Slider(
                    1,
                    max(LIMITS.points, first.points),
                    first.points,
                    step=1,
                    label="Points along each side",
                    elem_id="points",
                )
                iou = gr.Slider(0, 1, first.iou, step=0.01, label="Least predicted IoU of a mask", elem_id="iou")
                with gr.Column():
                    find = gr.Button("Find everything", variant="primary", elem_id="find")
                    cancel = gr.Button("Cancel", elem_id="cancel")
        status = gr.Markdown("", elem_id="status")
        canvas = gr.HTML(
            value=None,
            html_template=here.joinpath("canvas.html").read_text("utf-8"),
            css_template=here.joinpath("canvas.css").read_text("utf-8"),
            js_on_load=here.joinpath("canvas.js").read_text("utf-8"),
            picture="",
            elem_id="canvas",
        )
        with gr.Row():
            save = gr.Button("Make files to download", elem_id="save", scale=1)
            made = gr.Files(label="Files", interactive=False, elem_id="files", scale=4)

        def pointed(event: gr.EventData, *given: Any) -> Iterator[Any]:
            yield from _pointed(models, event._data, *given)

        def found(*given: Any) -> Iterator[Any]:
            yield from _found(models, *given)

        def chosen(event: gr.SelectData) -> Any:
            return _opened(*examples[event.index], pixels)

        def selected(name: str) -> list[Any]:
            return _selected(models, name)

        def refreshed(name: str, shown: Controls, *values: float) -> list[Any]:
            return _refreshed(models, name, shown, values)

        shown = [session, canvas, status]
        sliders = [beams, points, iou]
        quietly = {"show_progress": "hidden", "api_visibility": "private"}
        decoding = {"concurrency_limit": 1, "concurrency_id": "decode"}  # an image at a time, so that memory suffices
        upload.upload(lambda path: _opened(path, path, pixels), upload, shown, **quietly, **decoding)
        gallery.select(chosen, None, shown, **quietly, **decoding)
        asked = [session, model, shown_controls, task]
        answer = canvas.input(pointed, [*asked, beams], shown, **quietly, concurrency_limit=None)
        finding = find.click(found, [*asked, *sliders], shown, **quietly, concurrency_limit=None)
        model.change(selected, model, [note, shown_controls, *sliders], **quietly)
        for event in (answer, finding):  # by then the model is loaded, so that its own values are known
            event.success(refreshed, [model, shown_controls, *sliders], [shown_controls, *sliders], **quietly)
        cancel.click(lambda: "cancelled; what was found stays", None, status, cancels=[finding, answer])
        save.click(_files, [session, model], made, api_visibility="private")
    return demo


def _opened(path: str, name: str, pixels: int) -> tuple[Session, Any, str]:
    try:
        with open(path, "rb") as file:
            image = read_image(file, Path(name).name, pixels)
    except InputError as error:
        raise _shown(error) from error
    session = Session(image, Path(name).name)
    return (
        session,
        gr.update(value=session.plain(), picture=data_uri(image)),
        f"{escape_markdown(session.name)}: {_size(image)}",
    )


def _note(model: str) -> str:
    """Return the line about a model of a narrow domain, in which commands are Markdown's code."""
    return zoo.describe_domain(model)


def _selected(models: Models, name: str) -> list[Any]:
    """Return the note on a model, its own values, and what puts the sliders there."""
    try:
        controls = models.controls(name)
    except ValueError as error:
        raise _shown(error) from error
    return [_note(name), controls, *controls.updates()]


def _refreshed(models: Models, name: str, shown: Controls, values: Sequence[float]) -> list[Any]:
    """Return the model's own values, and what puts the sliders there that nobody moved.

    Args:
        shown: The values that the sliders were put at.
        values: The values that they have.
    """
    controls = models.controls(name)
    moved = Controls(*values).changed_from(shown)
    updates = zip(moved.values(), controls.updates(), strict=True)
    return [controls, *(update if value is None else gr.skip() for value, update in updates)]


def _pointed(
    models: Models, event: Any, session: Session | None, model: str, shown: Controls, task: str, beams: int
) -> Iterator[tuple[Session, Any, str]]:
    """Shows what was pointed at, then the answer."""
    if session is None:
        raise gr.Error("there is no picture yet: open one, or choose an example")
    try:
        number = session.point_at(event)
    except ValueError as error:
        raise _shown(error) from error
    yield session, session.plain(), ""
    if number is None:
        return
    prompt = session.regions[number].prompt
    try:
        with models.scheduler(model) as scheduler:
            question = Question(
                session.image,
                [prompt],
                task=task,
                generation=settle_generation(scheduler.captioner, num_beams=None if beams == shown.beams else int(beams)),
                candidates=scheduler.finds,
                seconds=SECONDS,
            )
            found: tuple[Any, ...] = ()
            for told in scheduler.events(question):
                if isinstance(told, Candidates):
                    found = tuple(told.masks)
                elif isinstance(told, Caption):
                    session.answered(prompt, told, found)
    except (SchedulerError, ValueError) as error:
        session.failed(prompt)
        yield session, session.plain(), ""
        raise _shown(error) from error
    yield session, session.plain(), ""


def _found(
    models: Models,
    session: Session | None,
    model: str,
    shown: Controls,
    task: str,
    beams: int,
    points: int,
    iou: float,
) -> Iterator[tuple[Session, Any, str]]:
    """Shows how far the search is, and regions as they are captioned."""
    if session is None:
        raise gr.Error("there is no picture yet: open one, or choose an example")
    try:
        with models.scheduler(model) as scheduler:
            given = Controls(int(beams), int(points), float(iou)).changed_from(shown)
            generation = settle_generation(scheduler.captioner, num_beams=given.pop("beams"))
            options = settle_search(scheduler.captioner, given)
            question = Question(session.image, (), options, task, generation, seconds=SECONDS)
            session.begin()
            yield session, session.plain(), "looking for regions"
            fresh = 0
            for told in scheduler.events(question):
                if isinstance(told, Searched):
                    yield session, gr.skip(), f"looked at {told.done} of {told.points} points"
                elif isinstance(told, Caption):
                    session.add(told)
                    fresh += 1
                if fresh and (fresh >= 16 or isinstance(told, Done)):
                    yield session, session.plain(), f"{len(session.regions)} regions captioned"
                    fresh = 0
    except (SchedulerError, ValueError) as error:
        raise _shown(error) from error
    count = len(session.regions)
    told = f"{count} regions" if count else "nothing found: lower the least IoU, or raise the points"
    yield session, session.plain(), told


def _files(session: Session | None, model: str) -> list[str]:
    if session is None or not session.captions:
        raise gr.Error("there is nothing to download yet: point at something first")
    folder = Path(tempfile.mkdtemp(prefix="sca-demo-", dir=_temporary()))
    with Writers(folder, FORMATS, model) as writers:
        writers.add(session.name, session.image, session.captions)
    return sorted(str(path) for path in folder.iterdir())


def _temporary() -> str:
    """Where gradio may serve files from."""
    from gradio.utils import get_upload_folder

    folder = get_upload_folder()
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _shown(error: Exception) -> gr.Error:
    """A message for the page, which takes it for HTML."""
    return gr.Error(escape(str(error), quote=False))


def _size(image: Any) -> str:
    return f"{image.width} x {image.height} pixels"
