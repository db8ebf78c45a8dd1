"""Gradio page of `sca demo`, with a canvas for prompts."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import gradio as gr
from sca_registry import zoo
from sca_registry.contracts import TASKS, Caption, list_region_references
from sca_registry.spec import DEFAULT_GENERATION, ComponentSpec, EverythingOptions

from sca.checkpoints.load import read_local_spec
from sca.checkpoints.trust import Trust
from sca.demo.session import Session
from sca.inference.automatic import resolve_everything_options
from sca.inference.factory import load_captioner
from sca.inference.find_options import DEFAULT_THRESHOLD
from sca.inference.generation_options import resolve_generation_options
from sca.inference.prompt_arguments import get_tasks
from sca.inference.region_search import SearchProgress
from sca.inference.text_search import check_can_find, check_text
from sca.inference.zoom_options import DEFAULT_ZOOM, ZOOM_AUTO, ZOOM_OFF, resolve_zoom
from sca.io.errors import InputError
from sca.io.hub import resolve_local_path
from sca.io.images import read_image
from sca.io.masks import PIXEL_LIMIT
from sca.io.text import escape_markdown
from sca.output.formats import MultiFormatWriter
from sca.output.html_page import encode_data_uri
from sca.serve.inference_requests import CandidateMasks, InferenceRequest, RequestDone, SchedulerError
from sca.serve.limits import MAX_TEXT_LENGTH
from sca.serve.scheduler import RequestScheduler

if TYPE_CHECKING:
    from PIL import Image

MAX_LOADED_MODELS = 2  # models in memory, unless more are in use
RESPONSE_TIMEOUT_SECONDS = 300.0  # per request
SESSION_LIFETIME_SECONDS = 3600  # time in memory of the image and regions of an inactive browser tab
DOWNLOAD_FORMATS = ("png", "jsonl", "coco", "html")
TITLE = "Segment and caption anything"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Errors are displayed elsewhere; the status tracker would cover the canvas.
CSS = '#canvas [data-testid="status-tracker"] { display: none }'
USAGE_TEXT = (
    "Click a point, draw a box or paint a mask. Further prompts refine the same region until you press **New region**. "
    "Keyboard: arrow keys move a crosshair, Enter adds a foreground point, Shift + Enter adds a background point."
)
NO_IMAGE_MESSAGE = "no image is open; open an image or choose an example"


class _EventOptions(TypedDict):
    """Options of gradio events: how they are shown, and whether they are part of the API."""

    show_progress: Literal["full", "minimal", "hidden"]
    api_visibility: Literal["public", "private", "undocumented"]


class _ConcurrencyOptions(TypedDict):
    """Options of gradio events that share a limit on concurrency."""

    concurrency_limit: int
    concurrency_id: str


class SliderValues(NamedTuple):
    """Values of the sliders.

    Attributes:
        num_beams: Number of beams.
        points_per_side: Points per side of the prompt grid.
        pred_iou_thresh: Minimum predicted IoU of a mask.
    """

    num_beams: int = DEFAULT_GENERATION["num_beams"]
    points_per_side: int = EverythingOptions.points_per_side
    pred_iou_thresh: float = EverythingOptions.pred_iou_thresh

    @classmethod
    def from_settings(cls, generation: Mapping[str, Any], search: EverythingOptions) -> SliderValues:
        """Return the slider values of the default options of a model."""
        return cls(generation["num_beams"], search.points_per_side, search.pred_iou_thresh)

    def find_changes(self, initial: SliderValues) -> dict[str, Any]:
        """Return the values that differ from `initial` by name; None for unchanged values."""
        triples = zip(self._fields, self, initial, strict=True)
        return {name: None if value == initial_value else value for name, value, initial_value in triples}

    def make_slider_updates(self) -> list[Any]:
        """Return gradio updates that set the sliders to these values."""
        values_with_limits = zip(self, SLIDER_MAXIMA, strict=True)
        return [gr.update(value=value, maximum=max(value, limit)) for value, limit in values_with_limits]


SLIDER_MAXIMA = SliderValues(8, 64, 1)  # raised to the value of the model if that is larger


class ModelDefaults(NamedTuple):
    """Initial values of the page for a model.

    Attributes:
        slider_values: Values of the sliders.
        tasks: Names of the tasks.
    """

    slider_values: SliderValues = SliderValues()
    tasks: tuple[str, ...] = TASKS


class ModelPool:
    """Pool of models, each with a scheduler. Models in use and the most recently used ones stay in memory.

    Args:
        device: Device of the models.
        precision: Precision of the models, see `sca.load`; None for that of the checkpoint.
        model_names: Models of the command line; their names can contain options.
        allow_any_model: Allow all other names and folders, without options.
        trust_options: Trust options (see `sca.load`) by model name; other models are not trusted.
    """

    def __init__(
        self,
        device: Any,
        precision: str | None,
        model_names: Collection[str],
        *,
        allow_any_model: bool = False,
        trust_options: Mapping[str, Mapping[str, bool]] | None = None,
    ):
        self.device = device
        self.precision = precision
        self.model_names = model_names
        self.allow_any_model = allow_any_model
        self.trust_options: Mapping[str, Mapping[str, bool]] = trust_options or {}
        self._schedulers: OrderedDict[str, RequestScheduler] = OrderedDict()
        self._num_users: Counter[str] = Counter()
        self._lock, self._load_lock = threading.Lock(), threading.Lock()

    @contextmanager
    def acquire_scheduler(self, name: str) -> Iterator[RequestScheduler]:
        """Return the scheduler of a model for a `with` block, and load the model if necessary.

        Args:
            name: Name of the model.

        Yields:
            The scheduler, which stays loaded during the block.

        Raises:
            ValueError: The model is not allowed or cannot be loaded; `sca.load_captioner` lists the errors.
        """
        self._check_model_name(name)
        scheduler = self._acquire_loaded(name)
        if scheduler is None:
            with self._load_lock:  # loads are serialized; requests to loaded models do not wait
                scheduler = self._acquire_loaded(name) or self._load_model(name)
        try:
            yield scheduler
        finally:
            with self._lock:
                self._num_users[name] -= 1
            self._unload_idle_models()

    def get_defaults(self, name: str) -> ModelDefaults:
        """Return the defaults of a model without loading it: those of `sca caption`.

        Those of SAM and `TASKS` replace those of a model that is neither loaded nor on this machine.

        Args:
            name: Name of the model.

        Returns:
            The values of the sliders, and the tasks.

        Raises:
            ValueError: The model is not allowed, or its spec cannot be read.
        """
        self._check_model_name(name)
        with self._lock:
            loaded_scheduler = self._schedulers.get(name)
        if loaded_scheduler is not None:
            captioner = loaded_scheduler.captioner
            generation = getattr(captioner, "generation", DEFAULT_GENERATION)
            slider_values = SliderValues.from_settings(generation, resolve_everything_options(captioner, {}))
            return ModelDefaults(slider_values, tuple(get_tasks(captioner)))
        trust_options = self.trust_options.get(name, {})
        spec = read_local_spec(
            name, Trust(trust_options.get("trust_remote_code", False), trust_options.get("allow_external", False))
        )
        if spec is None:
            return ModelDefaults()
        return ModelDefaults(SliderValues.from_settings(spec.generation, spec.everything_options), spec.task_names)

    def close(self) -> None:
        """Close the schedulers of all models."""
        with self._lock:
            schedulers = [*self._schedulers.values()]
            self._schedulers.clear()
        for scheduler in schedulers:
            scheduler.close()

    def _check_model_name(self, name: str) -> None:
        if name not in self.model_names:
            if not self.allow_any_model:
                raise ValueError(f"the model {name!r} is not available; choose from {', '.join(self.model_names)}")
            _check_has_no_options(name)

    def _acquire_loaded(self, name: str) -> RequestScheduler | None:
        with self._lock:
            if name not in self._schedulers:
                return None
            self._schedulers.move_to_end(name)
            self._num_users[name] += 1
            return self._schedulers[name]

    def _load_model(self, name: str) -> RequestScheduler:
        options: dict[str, Any] = {"precision": self.precision} if self.precision else {}
        options |= self.trust_options.get(name, {})
        scheduler = RequestScheduler(load_captioner(name, self.device, **options))
        with self._lock:
            self._schedulers[name] = scheduler
            self._num_users[name] += 1
        return scheduler

    def _unload_idle_models(self) -> None:
        """Unload the least recently used idle models while more than `MAX_LOADED_MODELS` are loaded."""
        with self._lock:
            idle_names = [name for name in self._schedulers if not self._num_users[name]]
            schedulers = [
                self._schedulers.pop(name) for name in idle_names[: max(0, len(self._schedulers) - MAX_LOADED_MODELS)]
            ]
        for scheduler in schedulers:
            scheduler.close()


def _check_has_no_options(name: str) -> None:
    """Raise ValueError if a name contains options, which could trust a checkpoint; folders have none."""
    path = resolve_local_path(name)
    if (path is None or not path.exists()) and ComponentSpec.parse(name, "a model").options:
        raise ValueError(f"the model {name!r:.80} has options; enter the name only, or pass it to --model")


def build_page(
    models: ModelPool, model_names: Sequence[str], examples: Sequence[tuple[str, str]], max_pixels: int = PIXEL_LIMIT
) -> gr.Blocks:
    """Build the page of the demo.

    Args:
        models: Pool of models. If it has `allow_any_model`, visitors can enter other names and folders.
        model_names: Models to choose from; the first is selected.
        examples: Paths and names of example images.
        max_pixels: Maximum number of pixels per image.

    Returns:
        The Gradio page.
    """
    any_model = models.allow_any_model
    package_files = files("sca.demo")
    initial_values, initial_tasks = models.get_defaults(model_names[0])
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as blocks:
        session = gr.State(None, time_to_live=SESSION_LIFETIME_SECONDS)
        initial_state = gr.State(initial_values, time_to_live=SESSION_LIFETIME_SECONDS)
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            model = gr.Dropdown(
                list(model_names),
                value=model_names[0],
                label="Model",
                info="Model name or checkpoint folder" if any_model else None,
                allow_custom_value=any_model,
                elem_id="model",
            )
            task = gr.Dropdown(
                list(initial_tasks),
                value="caption",
                label="Task",
                allow_custom_value=True,  # the tasks of a model on the Hub are unknown until it is loaded
                elem_id="task",
            )
            num_beams = gr.Slider(
                1,
                max(SLIDER_MAXIMA.num_beams, initial_values.num_beams),
                initial_values.num_beams,
                step=1,
                label="Number of beams",
                elem_id="num_beams",
            )
            zoom = gr.Checkbox(
                DEFAULT_ZOOM == ZOOM_AUTO,
                label="Zoom",
                info="Predict small regions from crops, for models with a measured size",
                elem_id="zoom",
            )
            question = gr.Textbox(
                label="Question",
                info="Optional, for models that support questions; the answer replaces the caption",
                max_lines=1,
                max_length=MAX_TEXT_LENGTH,
                elem_id="question",
            )
        model_note = gr.Markdown(zoo.describe_domain(model_names[0]), elem_id="model-note")
        with gr.Row():
            upload = gr.UploadButton("Open image", file_types=["image"], elem_id="open-image", scale=1)
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
            with gr.Tab("Prompts", id="prompts"):
                gr.Markdown(USAGE_TEXT)
            with gr.Tab("Everything", id="everything"), gr.Row():
                points_per_side = gr.Slider(
                    1,
                    max(SLIDER_MAXIMA.points_per_side, initial_values.points_per_side),
                    initial_values.points_per_side,
                    step=1,
                    label="Points per side",
                    elem_id="points_per_side",
                )
                pred_iou_thresh = gr.Slider(
                    0,
                    1,
                    initial_values.pred_iou_thresh,
                    step=0.01,
                    label="Minimum predicted IoU",
                    elem_id="pred_iou_thresh",
                )
                with gr.Column():
                    everything_button = gr.Button("Caption everything", variant="primary", elem_id="caption-everything")
                    cancel_button = gr.Button("Cancel", elem_id="cancel")
            with gr.Tab("Find", id="find"), gr.Row():
                find_text = gr.Textbox(
                    label="Text",
                    placeholder="a red circle",
                    max_lines=1,
                    max_length=MAX_TEXT_LENGTH,
                    elem_id="find-text",
                )
                min_score = gr.Number(DEFAULT_THRESHOLD, minimum=0, maximum=1, step=0.05, label="Minimum score")
                find_button = gr.Button("Find regions", variant="primary", elem_id="find-regions")
        status = gr.Markdown("", elem_id="status")
        canvas = gr.HTML(
            value=None,
            html_template=package_files.joinpath("canvas.html").read_text("utf-8"),
            css_template=package_files.joinpath("canvas.css").read_text("utf-8"),
            js_on_load=package_files.joinpath("canvas.js").read_text("utf-8"),
            image="",
            elem_id="canvas",
        )
        with gr.Row():
            downloads_button = gr.Button("Prepare downloads", elem_id="prepare-downloads", scale=1)
            download_files = gr.Files(label="Downloads", interactive=False, elem_id="downloads", scale=4)

        def handle_canvas_event(event: gr.EventData, *inputs: Any) -> Iterator[Any]:
            yield from _caption_prompted_region(models, event._data, *inputs)

        def handle_caption_everything(*inputs: Any) -> Iterator[Any]:
            yield from _caption_everything(models, *inputs)

        def handle_find(*inputs: Any) -> Iterator[Any]:
            yield from _find_regions(models, *inputs)

        def open_example(event: gr.SelectData) -> Any:
            path, name = examples[event.index]
            return _start_session(path, name, max_pixels)

        def handle_model_change(name: str, task: str) -> list[Any]:
            return _select_model(models, name, task)

        def handle_model_loaded(name: str, initial: SliderValues, *values: float) -> list[Any]:
            return _refresh_options(models, name, initial, values)

        session_outputs = [session, canvas, status]
        sliders = [num_beams, points_per_side, pred_iou_thresh]
        event_options: _EventOptions = {"show_progress": "hidden", "api_visibility": "private"}
        # Decode one image at a time to limit memory.
        decoding_options: _ConcurrencyOptions = {"concurrency_limit": 1, "concurrency_id": "decode"}
        upload.upload(
            lambda path: _start_session(path, path, max_pixels),
            upload,
            session_outputs,
            **event_options,
            **decoding_options,
        )
        gallery.select(open_example, None, session_outputs, **event_options, **decoding_options)
        request_inputs = [session, model, initial_state, task]
        canvas_event = canvas.input(
            handle_canvas_event,
            [*request_inputs, num_beams, zoom, question],
            session_outputs,
            **event_options,
            concurrency_limit=None,
            trigger_mode="multiple",  # the default drops events while a caption is pending
        )
        everything_event = everything_button.click(
            handle_caption_everything,
            [*request_inputs, *sliders, zoom, question],
            session_outputs,
            **event_options,
            concurrency_limit=None,
        )
        find_event = gr.on(
            [find_button.click, find_text.submit],
            handle_find,
            [session, model, initial_state, find_text, min_score, points_per_side, pred_iou_thresh],
            session_outputs,
            **event_options,
            concurrency_limit=None,
        )
        model.change(handle_model_change, [model, task], [model_note, task, initial_state, *sliders], **event_options)
        for event in (canvas_event, everything_event, find_event):  # the model is loaded now: its defaults are known
            event.success(
                handle_model_loaded, [model, initial_state, *sliders], [task, initial_state, *sliders], **event_options
            )
        cancel_button.click(
            lambda: "cancelled; captioned regions are kept",
            None,
            status,
            cancels=[everything_event, canvas_event, find_event],
        )
        downloads_button.click(_prepare_downloads, [session, model], download_files, api_visibility="private")
    return blocks


def _start_session(path: str, name: str, max_pixels: int) -> tuple[Session, Any, str]:
    try:
        with open(path, "rb") as file:
            image = read_image(file, Path(name).name, max_pixels)
    except InputError as error:
        raise _make_page_error(error) from error
    session = Session(image, Path(name).name)
    return (
        session,
        gr.update(value=session.to_canvas_value(), image=encode_data_uri(image)),
        f"{escape_markdown(session.name)}: {_format_image_size(image)}",
    )


def _select_model(models: ModelPool, name: str, task: str) -> list[Any]:
    """Return the note on the domain of a model, an update of `task`, its slider values, and updates of the sliders."""
    try:
        slider_values, tasks = models.get_defaults(name)
    except ValueError as error:
        raise _make_page_error(error) from error
    task_update = gr.update(choices=list(tasks), value=task if task in tasks else "caption")
    return [zoo.describe_domain(name), task_update, slider_values, *slider_values.make_slider_updates()]


def _refresh_options(models: ModelPool, name: str, initial: SliderValues, values: Sequence[float]) -> list[Any]:
    """Return the options of a loaded model.

    Args:
        models: Pool of models.
        name: Name of the model.
        initial: Slider values when the model was selected.
        values: Present values of the sliders.

    Returns:
        An update of the tasks, the slider values of the model, and updates of the sliders whose values still are
        `initial`.
    """
    slider_values, tasks = models.get_defaults(name)
    num_beams, points_per_side, pred_iou_thresh = values
    changes = SliderValues(int(num_beams), int(points_per_side), pred_iou_thresh).find_changes(initial)
    updates = zip(changes.values(), slider_values.make_slider_updates(), strict=True)
    return [
        gr.update(choices=list(tasks)),
        slider_values,
        *(update if value is None else gr.skip() for value, update in updates),
    ]


def _caption_prompted_region(
    models: ModelPool,
    canvas_event: Any,
    session: Session | None,
    model: str,
    initial: SliderValues,
    task: str,
    num_beams: int,
    has_zoom: bool = False,
    question: str = "",
) -> Iterator[tuple[Session, Any, str]]:
    """Yield the page with the new prompt, then with its caption."""
    if session is None:
        raise gr.Error(NO_IMAGE_MESSAGE)
    try:
        region_index = session.handle_event(canvas_event)
    except ValueError as error:
        raise _make_page_error(error) from error
    yield session, session.to_canvas_value(), ""
    if region_index is None:
        return
    prompt = session.regions[region_index].prompt
    try:
        with models.acquire_scheduler(model) as scheduler:
            inference_request = InferenceRequest(
                session.image,
                [prompt],
                task=task,
                generation=resolve_generation_options(
                    scheduler.captioner,
                    num_beams=None if num_beams == initial.num_beams else int(num_beams),
                    question=_read_question(question),
                ),
                return_candidates=scheduler.supports_everything,
                timeout=RESPONSE_TIMEOUT_SECONDS,
                zoom=resolve_zoom(scheduler.captioner, ZOOM_AUTO if has_zoom else ZOOM_OFF),
            )
            mask_candidates: tuple[Any, ...] = ()
            for event in scheduler.iter_events(inference_request):
                if isinstance(event, CandidateMasks):
                    mask_candidates = tuple(event.masks)
                elif isinstance(event, Caption):
                    session.store_caption(prompt, event, mask_candidates)
    except (SchedulerError, ValueError) as error:
        session.revert_prompt(prompt)
        yield session, session.to_canvas_value(), ""
        raise _make_page_error(error) from error
    yield session, session.to_canvas_value(), ""


def _read_question(text: str) -> str | None:
    """Return a question about one region; None if the field is empty. Raises ValueError for several regions."""
    if list_region_references(text):
        raise ValueError("the demo does not support region references such as <region 1>; remove them")
    return text.strip() or None


def _caption_everything(
    models: ModelPool,
    session: Session | None,
    model: str,
    initial: SliderValues,
    task: str,
    num_beams: int,
    points_per_side: int,
    pred_iou_thresh: float,
    has_zoom: bool = False,
    question: str = "",
) -> Iterator[tuple[Session, Any, str]]:
    """Yield the progress of the search, then regions as they are captioned."""
    if session is None:
        raise gr.Error(NO_IMAGE_MESSAGE)
    try:
        with models.acquire_scheduler(model) as scheduler:
            changes = SliderValues(int(num_beams), int(points_per_side), float(pred_iou_thresh)).find_changes(initial)
            generation = resolve_generation_options(
                scheduler.captioner, num_beams=changes.pop("num_beams"), question=_read_question(question)
            )
            options = resolve_everything_options(scheduler.captioner, changes)
            zoom = resolve_zoom(scheduler.captioner, ZOOM_AUTO if has_zoom else ZOOM_OFF)
            inference_request = InferenceRequest(
                session.image, (), options, task, generation, timeout=RESPONSE_TIMEOUT_SECONDS, zoom=zoom
            )
            session.clear_regions()
            yield session, session.to_canvas_value(), "searching for regions"
            num_unshown = 0
            for event in scheduler.iter_events(inference_request):
                if isinstance(event, SearchProgress):
                    yield session, gr.skip(), f"searched {event.processed_points} of {event.total_points} points"
                elif isinstance(event, Caption):
                    session.add_found_region(event)
                    num_unshown += 1
                if num_unshown and (num_unshown >= 16 or isinstance(event, RequestDone)):
                    yield session, session.to_canvas_value(), f"{len(session.regions)} regions captioned"
                    num_unshown = 0
    except (SchedulerError, ValueError) as error:
        raise _make_page_error(error) from error
    count = len(session.regions)
    summary = (
        f"{count} regions" if count else "no regions found; lower the minimum predicted IoU or add points per side"
    )
    yield session, session.to_canvas_value(), summary


def _find_regions(
    models: ModelPool,
    session: Session | None,
    model: str,
    initial: SliderValues,
    text: str,
    min_score: float,
    points_per_side: int,
    pred_iou_thresh: float,
) -> Iterator[tuple[Session, Any, str]]:
    """Yield the progress of the search, then the regions that match the text, best first."""
    if session is None:
        raise gr.Error(NO_IMAGE_MESSAGE)
    try:
        with models.acquire_scheduler(model) as scheduler:
            check_text(check_can_find(scheduler.captioner, model), text)
            changes = SliderValues(initial.num_beams, int(points_per_side), float(pred_iou_thresh)).find_changes(
                initial
            )
            del changes["num_beams"]
            options = resolve_everything_options(scheduler.captioner, changes)
            inference_request = InferenceRequest(
                session.image, (), options, text=text, threshold=min_score, timeout=RESPONSE_TIMEOUT_SECONDS
            )
            session.clear_regions()
            yield session, session.to_canvas_value(), "searching for regions"
            matches, num_regions = [], 0
            for event in scheduler.iter_events(inference_request):
                if isinstance(event, SearchProgress):
                    yield session, gr.skip(), f"searched {event.processed_points} of {event.total_points} points"
                elif isinstance(event, Caption):
                    matches.append(event)
                elif isinstance(event, RequestDone):
                    num_regions = event.num_regions
    except (SchedulerError, ValueError) as error:
        raise _make_page_error(error) from error
    for match in sorted(matches, key=lambda each: -(each.proposal_score or 0)):
        session.add_found_region(match)
    summary = f"{len(matches)} of {num_regions} regions match {escape_markdown(text)}"
    if not matches:
        summary += "; lower the minimum score"
    yield session, session.to_canvas_value(), summary


def _prepare_downloads(session: Session | None, model: str) -> list[str]:
    if session is None or not session.captions:
        raise gr.Error("no captions to download; caption a region first")
    folder = Path(tempfile.mkdtemp(prefix="sca-demo-", dir=_get_upload_folder()))
    with MultiFormatWriter(folder, DOWNLOAD_FORMATS, model) as writers:
        writers.add(session.name, session.image, session.captions)
    return sorted(str(path) for path in folder.iterdir())


def _get_upload_folder() -> str:
    """Return the folder from which gradio can serve files."""
    from gradio.utils import get_upload_folder

    folder = get_upload_folder()
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _make_page_error(error: Exception) -> gr.Error:
    """Convert an error to a message for the page, escaped because gradio renders HTML."""
    return gr.Error(escape(str(error), quote=False))


def _format_image_size(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"
