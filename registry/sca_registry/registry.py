"""Components by name: one `catalogue.Registry` for each kind, over built-in cards, installed plugins and code.

    @mixers.register("mean")
    class MeanMixer: ...

    "mean" in mixers, mixers.get("mean"), mixers.get_all(), mixers.find("mean")

Names are read from cards and from metadata, so that listing them imports nothing; looking one up imports one module. A
built-in keeps its name when a plugin offers the same, two plugins with one name have to be told apart, and
`distribution:name` reaches each of them. A part that does not work harms only its own name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NoReturn, TypeVar

import catalogue

from sca_registry.cards import Card, check_name
from sca_registry.component_states import ComponentState, classify_failure, infer_state, is_memory_error
from sca_registry.contracts import COMPONENT_KINDS, ComponentKind
from sca_registry.errors import RegistryError, format_choices, make_unknown_name_error, suggest_name
from sca_registry.options import check_options, get_factory_options, is_text_option
from sca_registry.plugins import (
    BUILTIN_DISTRIBUTION,
    Offer,
    Origin,
    find_plugin_offers,
    get_builtin_offers,
    is_same_distribution,
)

Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class RegistryEntry:
    """What a listing shows of one name.

    `state` is "ok", "unchecked" (a plugin that was not imported), "broken", or "needs extra: NAME"; `reason` is the
    cause, or the command that helps. `Registry.entries` reads the state from metadata; `Registry.describe` imports the
    factory. `options` are those that the card sets; `Registry.describe` gives all that the factory takes, with
    defaults, and `options.REQUIRED` where there is none.
    """

    name: str
    kind: str
    summary: str
    source: str
    license: str
    terms: str
    parameters: int | None
    extra: str
    distribution: str
    version: str
    state: str
    reason: str
    factory: str
    options: Mapping[str, Any]


class Registry(catalogue.Registry):
    """The components of one kind, with the methods of `catalogue.Registry`.

    Unlike catalogue's, it lists names without an import, reads card files, refuses a name that is taken, confines a
    broken plugin to its own name, and checks options and results in `build`.
    """

    def __init__(self, kind: ComponentKind):
        super().__init__(("sca", kind.plural))
        self.kind = kind

    def __repr__(self) -> str:
        return f"<Registry of {self.kind.plural}: {', '.join(self.list_names())}>"

    def register(self, name: str, *, func: Any = None) -> Any:
        """Register a factory, or a class, under a name of this process: a decorator, or at once with `func`.

        Raises:
            RegistryError: The name is built in or was registered before. A module that runs again (reloaded, or a cell
                of a notebook) may register its own factory again.
        """
        check_name(name)

        def add_factory(factory: Factory) -> Factory:
            if not callable(factory):
                raise RegistryError(
                    f"{self._singular} {name!r} cannot be {factory!r}: a factory is called, and that cannot be"
                )
            conflicts = [
                f"{BUILTIN_DISTRIBUTION} ({offer.card.factory})"
                for offer in self._get_builtin_offers()
                if offer.card.name == name
            ]
            previous = self._get_registered().get(name)
            if previous is not None and not _is_redefinition(previous, factory):
                conflicts.append(_describe_location(previous))
            if conflicts:
                raise RegistryError(
                    f"{self._singular} {name!r} is already registered by {conflicts[0]}; give "
                    f"{_describe_location(factory)} another name"
                )
            return super(Registry, self).register(name)(factory)

        return add_factory if func is None else add_factory(func)

    # --- reading names: nothing is imported ---------------------------------------------------------------------------

    def list_names(self) -> list[str]:
        """Every name, sorted; one that is taken by another distribution stands as `distribution:name`."""
        return sorted(self._get_offers_by_name())

    def __contains__(self, name: object) -> bool:
        """Whether `name` reaches exactly one part, working or not."""
        return name in self._get_offers_by_name() or len(self._find_qualified_offers(name)) == 1

    def list_entries(self) -> list[RegistryEntry]:
        """Return the metadata of every name, sorted; broken ones and those that cannot be names included."""
        named_offers = [
            *self._get_offers_by_name().items(),
            *((offer.card.name, offer) for offer in self._list_offers() if _has_invalid_name(offer)),
        ]
        entries = [
            self._make_entry(name, offer, offer.card.default_options, infer_state(offer))
            for name, offer in named_offers
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def get_card(self, name: str) -> Card:
        """The card of a name; a factory without a card has one that says little.

        Raises RegistryError for an unknown or ambiguous name.
        """
        return self._resolve_offer(name).card

    # --- using names: one module is imported --------------------------------------------------------------------------

    def get(self, name: str) -> Callable[..., Any]:
        """The factory of a name, with the options of its card filled in.

        Raises RegistryError for a name that is unknown, ambiguous or broken, or needs an extra.
        """
        offer = self._resolve_offer(name)
        return _bind_options(self._load_factory(offer), offer.card.default_options)

    def get_all(self) -> dict[str, Callable[..., Any]]:
        """The factories of all names that work; each is imported. `find` says what is wrong with the others."""
        return self._load_working(self.list_names())

    def get_entry_points(self) -> dict[str, Callable[..., Any]]:
        """The factories that work of installed plugins, by the names that reach them."""
        return self._load_working(name for name, offer in self._get_offers_by_name().items() if self._is_plugin(offer))

    def get_entry_point(self, name: str, default: Any = None) -> Any:
        """The factory of a plugin, or `default` if no plugin offers the name or it does not work."""
        with suppress(RegistryError):
            if self._is_plugin(self._resolve_offer(name)):
                return self.get(name)
        return default

    def find(self, name: str) -> dict[str, Any]:
        """Where a component comes from and whether it works; a broken one says why.

        Returns:
            module, file, line_no and docstring as in catalogue, and distribution, version, state and reason as in
            `Entry`.

        Raises:
            RegistryError: The name is unknown or ambiguous.
        """
        entry, offer = self.load_entry(name), self._resolve_offer(name)
        state_facts = {key: getattr(entry, key) for key in ("distribution", "version", "state", "reason")}
        source_facts: dict[str, Any] = {"file": None, "line_no": None, "docstring": None}
        with suppress(RegistryError):
            factory = self._load_factory(offer)
            source_facts["docstring"] = inspect.getdoc(factory)
            with suppress(TypeError, OSError):
                source_facts |= {"file": inspect.getsourcefile(factory), "line_no": inspect.getsourcelines(factory)[1]}
        return {"module": entry.factory.partition(":")[0], **source_facts, **state_facts}

    def build(self, name: str, /, *upstream: Any, **options: Any) -> Any:
        """A part of this kind: the factory called with the built part upstream (or a dataset's split) and options.

        Raises RegistryError like `get`, for an option that the factory does not take, for whatever stops the
        construction, and for a result without the attributes that the contract of this kind asks for.
        """
        assert len(upstream) == self._num_positional, (
            f"build({name!r}, ...) takes {self._num_positional} argument(s) and options"
        )
        offer = self._resolve_offer(name)
        card = offer.card
        default_options: Mapping[str, Any] = card.default_options
        if "weights" in options and options["weights"] != card.options.get("weights"):
            default_options = {key: value for key, value in card.options.items() if key != "revision"}
        factory = _bind_options(self._load_factory(offer), default_options)
        check_options(f"{self._singular} {name!r}", factory, self._num_positional, options)
        try:
            part = factory(*upstream, **options)
            missing = [
                attribute for attribute in _list_protocol_members(self.kind.protocol) if not hasattr(part, attribute)
            ]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # other people's code: whatever it raises is the failure of this one name
            if isinstance(error, ValueError | OSError) and (upstream or options):  # a factory rejects its options
                raise RegistryError(f"{self._describe_offer(offer)} cannot be built: {error}") from error
            option_text = ", ".join(f"{option}={value!r}" for option, value in options.items())
            is_component_fault = not (options or offer.is_builtin or is_memory_error(error))
            self._raise_failure(
                offer,
                f"cannot be built with {option_text}" if option_text else "cannot be built",
                error,
                is_component_fault,
            )
        if missing:
            problem = f"built a {type(part).__name__} without {', '.join(missing)}"
            protocol_name = f"sca_registry.contracts.{self.kind.protocol.__name__}"
            raise RegistryError(
                f"{self._describe_offer(offer)} {problem}: see {protocol_name} for what {self.kind.plural} have"
            )
        return part

    def check(self, name: str, **options: Any) -> None:
        """Check a name, its extra and its options before anything is built.

        Raises RegistryError like `build`, as far as metadata and the signature of the factory tell.
        """
        offer = self._resolve_offer(name)
        state = infer_state(offer)
        if state.name.startswith("needs extra"):
            raise RegistryError(f"{self._describe_offer(offer)} {state.name}. Install it: {state.reason}")
        factory = _bind_options(self._load_factory(offer), offer.card.default_options)
        check_options(f"{self._singular} {name!r}", factory, self._num_positional, options)

    def load_entry(self, name: str) -> RegistryEntry:
        """Import the factory of a name and return its entry, with the options of the factory.

        A factory that cannot be imported has the state "broken", with the reason, or "needs extra".

        Raises:
            RegistryError: The name is unknown or ambiguous.
        """
        offer = self._resolve_offer(name)
        name = next(key for key, known_offer in self._get_offers_by_name().items() if known_offer == offer)
        try:
            factory = self._load_factory(offer)
        except RegistryError as error:
            state = classify_failure(offer, error.__cause__) if error.__cause__ is not None else infer_state(offer)
            return self._make_entry(name, offer, offer.card.default_options, state)
        options = get_factory_options(_bind_options(factory, offer.card.default_options), self._num_positional)
        state = infer_state(offer)
        entry = self._make_entry(name, offer, options, ComponentState("ok") if state.name == "unchecked" else state)
        return replace(entry, summary=entry.summary or (inspect.getdoc(factory) or "").partition("\n")[0])

    def is_text_option(self, name: str, option: str) -> bool:
        """Return whether an option is text or a path and nothing else; False for a part that does not load."""
        try:
            return is_text_option(self._load_factory(self._resolve_offer(name)), self._num_positional, option)
        except RegistryError:
            return False

    def get_declared(self, name: str, field: str) -> Any:
        """What the card of a part, or else its class, says of `gives`, `needs` or `default_segmenter`; else None.

        Raises like `get`.
        """
        offer = self._resolve_offer(name)
        value = getattr(offer.card, field, None)
        if value is None:
            value = getattr(self._load_factory(offer), field, None)
        return None if isinstance(value, property) else value

    # --- offers -------------------------------------------------------------------------------------------------------

    def _get_builtin_offers(self) -> tuple[Offer, ...]:
        return get_builtin_offers(self.kind.plural)

    def _get_registered(self) -> dict[str, Any]:
        """What code has registered."""
        return super().get_all()

    def _is_plugin(self, offer: Offer) -> bool:
        return not offer.is_builtin and offer.registered_factory is None

    def _load_working(self, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
        factories = {}
        for name in names:
            with suppress(RegistryError):
                factories[name] = self.get(name)
        return factories

    def _list_offers(self) -> list[Offer]:
        """Built-in first. What code registers and an entry point names as well is one offer, the entry point's."""
        plugins = find_plugin_offers(self.kind.entry_point_group)
        installed = {(offer.card.name, offer.card.factory) for offer in plugins}
        code_offers = [
            Offer(Card(name, _get_factory_path(factory)), Origin(_get_module_name(factory)), registered_factory=factory)
            for name, factory in self._get_registered().items()
            if (name, _get_factory_path(factory)) not in installed
        ]
        return [*self._get_builtin_offers(), *plugins, *code_offers]

    def _get_offers_by_name(self) -> dict[str, Offer]:
        """Each offer under the shortest name that reaches it and no other."""
        offers = [offer for offer in self._list_offers() if not _has_invalid_name(offer)]
        offers_by_short_name: dict[str, list[Offer]] = {}
        for offer in offers:
            offers_by_short_name.setdefault(offer.card.name, []).append(offer)
        return {
            name if offer.is_builtin or len(offers_by_short_name[name]) == 1 else f"{offer.origin.name}:{name}": offer
            for name, offer in ((offer.card.name, offer) for offer in offers)
        }

    def _find_qualified_offers(self, name: object) -> list[Offer]:
        """Those that `distribution:name` reaches."""
        distribution, _, short_name = str(name).rpartition(":")
        offers = self._get_offers_by_name().values()
        return [
            offer
            for offer in offers
            if offer.card.name == short_name and is_same_distribution(offer.origin.name, distribution)
        ]

    def _resolve_offer(self, name: str) -> Offer:
        offers_by_name = self._get_offers_by_name()
        matches = [offers_by_name[name]] if name in offers_by_name else self._find_qualified_offers(name)
        if len(matches) == 1:
            return matches[0]
        qualified_names = [
            repr(qualified_name) for qualified_name, offer in offers_by_name.items() if offer.card.name == name
        ]
        if len(qualified_names) > 1:
            raise RegistryError(
                f"{len(qualified_names)} {self._plural} are named {name!r}. Say which: {' or '.join(qualified_names)}"
            )
        raise RegistryError(
            f"no {self._plural} named {name!r}.{self._suggest_meaning(str(name), offers_by_name)}"
            f"{format_choices(sorted(offers_by_name))}  "
            f"A plugin adds one with an entry point in {self.kind.entry_point_group!r}."
        )

    def _suggest_meaning(self, name: str, offers_by_name: Mapping[str, Offer]) -> str:
        """What an unknown name may mean: a part of another kind, a hub id or folder of weights, or a close name."""
        for other in REGISTRIES.values():
            if other is not self and name in other:
                return f" It is one of the {other.kind.plural.replace('_', ' ')}."
        for known_name, offer in offers_by_name.items():
            if name in (offer.card.options.get("weights"), offer.card.factory):
                return f" Did you mean {known_name!r}?"
        if "/" in name and self.kind.plural == "language_models":
            return f" For any hub id or folder give the part 'hf' with the option weights={name!r}."
        return suggest_name(name, offers_by_name)

    def _load_factory(self, offer: Offer) -> Callable[..., Any]:
        """The factory as it was written, without the card's options."""
        if offer.registered_factory is not None:
            return offer.registered_factory
        if offer.problem:
            raise RegistryError(f"{self._describe_offer(offer)} is broken: {offer.problem}.{_suggest_remedy(offer)}")
        module, _, attribute = offer.card.factory.partition(":")
        try:
            factory = attrgetter(attribute)(importlib.import_module(module))
            if not callable(factory):
                raise TypeError(f"{offer.card.factory} is a {type(factory).__name__}, which cannot be called")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may call sys.exit at import; neither that nor a bug is ours to die of
            self._raise_failure(offer, "is broken", error)
        return factory

    def _raise_failure(
        self, offer: Offer, problem: str, error: BaseException, is_component_fault: bool = True
    ) -> NoReturn:
        """Raise what the user reads, with a remedy if the failure is the component's own."""
        state = classify_failure(offer, error)
        if state.name != "broken":
            raise RegistryError(f"{self._describe_offer(offer)} {state.name}. Install it: {state.reason}") from error
        remedy = _suggest_remedy(offer) if is_component_fault else ""
        raise RegistryError(f"{self._describe_offer(offer)} {problem}: {state.reason}.{remedy}") from error

    # --- words --------------------------------------------------------------------------------------------------------

    def _make_entry(self, name: str, offer: Offer, options: Mapping[str, Any], state: ComponentState) -> RegistryEntry:
        card = offer.card
        return RegistryEntry(
            name=name,
            kind=self.kind.singular,
            summary=card.summary,
            source=card.source,
            license=card.license,
            terms=card.terms,
            parameters=card.parameters,
            extra=card.extra,
            distribution=offer.origin.name,
            version=offer.origin.version,
            state=state.name,
            reason=state.reason,
            factory=card.factory,
            options=dict(options),
        )

    @property
    def _num_positional(self) -> int:
        """How many arguments of a factory are not options."""
        return int(bool(self.kind.upstream_kind or self.kind.first_argument))

    @property
    def _singular(self) -> str:
        return self.kind.singular.replace("_", " ")

    @property
    def _plural(self) -> str:
        return self.kind.plural.replace("_", " ")

    def _describe_offer(self, offer: Offer) -> str:
        return f"{self._singular} {offer.card.name!r}" + ("" if offer.is_builtin else f" of {offer.origin}")


REGISTRIES = {plural: Registry(kind) for plural, kind in COMPONENT_KINDS.items()}


def get_registry(kind: str) -> Registry:
    """The registry of a kind by its singular or plural name, `language-model` as well as `language_models`.

    Raises RegistryError for a word that is no kind.
    """
    normalized = kind.replace("-", "_")
    for component_kind in COMPONENT_KINDS.values():
        if normalized in (component_kind.singular, component_kind.plural):
            return REGISTRIES[component_kind.plural]
    raise make_unknown_name_error(f"no kind of part is called {kind!r}", kind, COMPONENT_KINDS)


def _list_protocol_members(protocol: type) -> list[str]:
    """The attributes and methods that a protocol lists."""
    methods = [
        name
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) and value.__module__ == protocol.__module__
    ]
    return [*protocol.__annotations__, *methods]


def _bind_options(factory: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return functools.partial(factory, **options) if options else factory


def _has_invalid_name(offer: Offer) -> bool:
    try:
        check_name(offer.card.name)
    except RegistryError:
        return True
    return False


def _suggest_remedy(offer: Offer) -> str:
    if offer.is_builtin:  # then a package that it imports is broken, and another version of this one would not help
        return " Run `sca doctor` to find the cause."
    if (
        offer.registered_factory or "pip install" in offer.problem
    ):  # code has no package; a fault may include the remedy
        return ""
    return f" Try: pip install -U {offer.origin.name}"


def _get_module_name(factory: Any) -> str:
    return getattr(factory, "__module__", None) or type(factory).__module__


def _get_factory_path(factory: Any) -> str:
    return f"{_get_module_name(factory)}:{getattr(factory, '__qualname__', type(factory).__qualname__)}"


def _describe_location(factory: Any) -> str:
    """module:name (file:line), as far as Python can tell."""
    try:
        return f"{_get_factory_path(factory)} ({inspect.getsourcefile(factory)}:{inspect.getsourcelines(factory)[1]})"
    except (TypeError, OSError):
        return _get_factory_path(factory)


def _is_redefinition(previous: Any, factory: Any) -> bool:
    return _get_factory_path(previous) == _get_factory_path(factory) and "<locals>" not in _get_factory_path(factory)
