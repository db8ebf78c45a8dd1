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
from sca_registry.contracts import KINDS, Kind
from sca_registry.messages import RegistryError, choice, suggestion, unknown
from sca_registry.options import check_options, read_options, takes_text
from sca_registry.plugins import BUILTIN, Offer, Origin, builtin_offers, plugin_offers, same_distribution
from sca_registry.states import State, blame, out_of_memory, read_state

Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
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
    licence: str
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

    def __init__(self, kind: Kind):
        super().__init__(("sca", kind.plural))
        self.kind = kind

    def __repr__(self) -> str:
        return f"<Registry of {self.kind.plural}: {', '.join(self.names())}>"

    def register(self, name: str, *, func: Any = None) -> Any:
        """Register a factory, or a class, under a name of this process: a decorator, or at once with `func`.

        Raises:
            RegistryError: The name is built in or was registered before. A module that runs again (reloaded, or a cell
                of a notebook) may register its own factory again.
        """
        check_name(name)

        def register(factory: Factory) -> Factory:
            if not callable(factory):
                raise RegistryError(
                    f"{self._one} {name!r} cannot be {factory!r}: a factory is called, and that cannot be"
                )
            taken = [f"{BUILTIN} ({offer.card.factory})" for offer in self._builtin() if offer.card.name == name]
            before = self._registered().get(name)
            if before is not None and not _runs_again(before, factory):
                taken.append(_place(before))
            if taken:
                raise RegistryError(
                    f"{self._one} {name!r} is already registered by {taken[0]}: give {_place(factory)} another name"
                )
            return super(Registry, self).register(name)(factory)

        return register if func is None else register(func)

    # --- reading names: nothing is imported ---------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every name, sorted; one that is taken by another distribution stands as `distribution:name`."""
        return sorted(self._named())

    def __contains__(self, name: object) -> bool:
        """Whether `name` reaches exactly one part, working or not."""
        return name in self._named() or len(self._in_full(name)) == 1

    def entries(self) -> list[Entry]:
        """Return the metadata of every name, sorted; broken ones and those that cannot be names included."""
        listed = [*self._named().items(), *((offer.card.name, offer) for offer in self._offers() if _nameless(offer))]
        entries = [self._entry(name, offer, offer.card.given, read_state(offer)) for name, offer in listed]
        return sorted(entries, key=lambda entry: entry.name)

    def card(self, name: str) -> Card:
        """The card of a name; a factory without a card has one that says little.

        Raises RegistryError for an unknown or ambiguous name.
        """
        return self._find(name).card

    # --- using names: one module is imported --------------------------------------------------------------------------

    def get(self, name: str) -> Callable[..., Any]:
        """The factory of a name, with the options of its card filled in.

        Raises RegistryError for a name that is unknown, ambiguous or broken, or needs an extra.
        """
        offer = self._find(name)
        return _filled(self._load(offer), offer.card.given)

    def get_all(self) -> dict[str, Callable[..., Any]]:
        """The factories of all names that work; each is imported. `find` says what is wrong with the others."""
        return self._load_all(self.names())

    def get_entry_points(self) -> dict[str, Callable[..., Any]]:
        """The factories that work of installed plugins, by the names that reach them."""
        return self._load_all(name for name, offer in self._named().items() if self._is_plugin(offer))

    def get_entry_point(self, name: str, default: Any = None) -> Any:
        """The factory of a plugin, or `default` if no plugin offers the name or it does not work."""
        with suppress(RegistryError):
            if self._is_plugin(self._find(name)):
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
        entry, offer = self.describe(name), self._find(name)
        facts = {key: getattr(entry, key) for key in ("distribution", "version", "state", "reason")}
        place: dict[str, Any] = {"file": None, "line_no": None, "docstring": None}
        with suppress(RegistryError):
            factory = self._load(offer)
            place["docstring"] = inspect.getdoc(factory)
            with suppress(TypeError, OSError):
                place |= {"file": inspect.getsourcefile(factory), "line_no": inspect.getsourcelines(factory)[1]}
        return {"module": entry.factory.partition(":")[0], **place, **facts}

    def build(self, name: str, /, *upstream: Any, **options: Any) -> Any:
        """A part of this kind: the factory called with the built part upstream (or a dataset's split) and options.

        Raises RegistryError like `get`, for an option that the factory does not take, for whatever stops the
        construction, and for a result without the attributes that the contract of this kind asks for.
        """
        assert len(upstream) == self._upstream, f"build({name!r}, ...) takes {self._upstream} argument(s) and options"
        offer = self._find(name)
        card = offer.card
        preset: Mapping[str, Any] = card.given
        if "weights" in options and options["weights"] != card.options.get("weights"):
            preset = {key: value for key, value in card.options.items() if key != "revision"}  # of its own weights
        factory = _filled(self._load(offer), preset)
        check_options(f"{self._one} {name!r}", factory, self._upstream, options)
        try:
            part = factory(*upstream, **options)
            missing = [attribute for attribute in _contract(self.kind.protocol) if not hasattr(part, attribute)]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # other people's code: whatever it raises is the failure of this one name
            if isinstance(error, ValueError) and (upstream or options):  # so a factory refuses what it was given
                raise RegistryError(f"{self._told(offer)} cannot be built: {error}") from error
            given = ", ".join(f"{option}={value!r}" for option, value in options.items())
            own = not (options or offer.builtin or out_of_memory(error))  # else it says nothing of the part by itself
            self._fail(offer, f"cannot be built with {given}" if given else "cannot be built", error, own)
        if missing:
            problem = f"built a {type(part).__name__} without {', '.join(missing)}"
            contract = f"sca_registry.contracts.{self.kind.protocol.__name__}"
            raise RegistryError(f"{self._told(offer)} {problem}: see {contract} for what {self.kind.plural} have")
        return part

    def check(self, name: str, **options: Any) -> None:
        """Check a name, its extra and its options before anything is built.

        Raises RegistryError like `build`, as far as metadata and the signature of the factory tell.
        """
        offer = self._find(name)
        state = read_state(offer)
        if state.name.startswith("needs extra"):
            raise RegistryError(f"{self._told(offer)} {state.name}. Install it: {state.reason}")
        factory = _filled(self._load(offer), offer.card.given)
        check_options(f"{self._one} {name!r}", factory, self._upstream, options)

    def describe(self, name: str) -> Entry:
        """Import the factory of a name and return its entry, with the options of the factory.

        A factory that cannot be imported has the state "broken", with the reason, or "needs extra".

        Raises:
            RegistryError: The name is unknown or ambiguous.
        """
        offer = self._find(name)
        name = next(key for key, named in self._named().items() if named == offer)
        try:
            factory = self._load(offer)
        except RegistryError as error:
            state = blame(offer, error.__cause__) if error.__cause__ else read_state(offer)
            return self._entry(name, offer, offer.card.given, state)
        options = read_options(_filled(factory, offer.card.given), self._upstream)
        state = read_state(offer)
        entry = self._entry(name, offer, options, State("ok") if state.name == "unchecked" else state)
        return replace(entry, summary=entry.summary or (inspect.getdoc(factory) or "").partition("\n")[0])

    def takes_text(self, name: str, option: str) -> bool:
        """Return whether an option is text or a path and nothing else; False for a part that does not load."""
        try:
            return takes_text(self._load(self._find(name)), self._upstream, option)
        except RegistryError:
            return False

    def stated(self, name: str, fact: str) -> Any:
        """What the card of a part, or else its class, says of `gives`, `needs` or `default_segmenter`; else None.

        Raises like `get`.
        """
        offer = self._find(name)
        value = getattr(offer.card, fact, None)
        if value is None:
            value = getattr(self._load(offer), fact, None)
        return None if isinstance(value, property) else value

    # --- offers -------------------------------------------------------------------------------------------------------

    def _builtin(self) -> tuple[Offer, ...]:
        return builtin_offers(self.kind.plural)

    def _registered(self) -> dict[str, Any]:
        """What code has registered."""
        return super().get_all()

    def _is_plugin(self, offer: Offer) -> bool:
        return not offer.builtin and offer.registered is None

    def _load_all(self, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
        found = {}
        for name in names:
            with suppress(RegistryError):
                found[name] = self.get(name)
        return found

    def _offers(self) -> list[Offer]:
        """Built-in first. What code registers and an entry point names as well is one offer, the entry point's."""
        plugins = plugin_offers(self.kind.group)
        installed = {(offer.card.name, offer.card.factory) for offer in plugins}
        code = [
            Offer(Card(name, _path(factory)), Origin(_module(factory)), registered=factory)
            for name, factory in self._registered().items()
            if (name, _path(factory)) not in installed
        ]
        return [*self._builtin(), *plugins, *code]

    def _named(self) -> dict[str, Offer]:
        """Each offer under the shortest name that reaches it and no other."""
        offers = [offer for offer in self._offers() if not _nameless(offer)]
        rivals: dict[str, list[Offer]] = {}
        for offer in offers:
            rivals.setdefault(offer.card.name, []).append(offer)
        return {
            name if offer.builtin or len(rivals[name]) == 1 else f"{offer.origin.name}:{name}": offer
            for name, offer in ((offer.card.name, offer) for offer in offers)
        }

    def _in_full(self, name: object) -> list[Offer]:
        """Those that `distribution:name` reaches."""
        distribution, _, short = str(name).rpartition(":")
        offers = self._named().values()
        return [
            offer for offer in offers if offer.card.name == short and same_distribution(offer.origin.name, distribution)
        ]

    def _find(self, name: str) -> Offer:
        named = self._named()
        found = [named[name]] if name in named else self._in_full(name)
        if len(found) == 1:
            return found[0]
        rivals = [repr(full) for full, offer in named.items() if offer.card.name == name]
        if len(rivals) > 1:
            raise RegistryError(f"{len(rivals)} {self._many} are named {name!r}. Say which: {' or '.join(rivals)}")
        raise RegistryError(
            f"no {self._many} named {name!r}.{self._hint(str(name), named)}{choice(sorted(named))}  "
            f"A plugin adds one with an entry point in {self.kind.group!r}."
        )

    def _hint(self, name: str, named: Mapping[str, Offer]) -> str:
        """What an unknown name may mean: a part of another kind, a hub id or folder of weights, or a close name."""
        for other in REGISTRIES.values():
            if other is not self and name in other:
                return f" It is one of the {other.kind.plural.replace('_', ' ')}."
        for short, offer in named.items():
            if name in (offer.card.options.get("weights"), offer.card.factory):
                return f" Did you mean {short!r}?"
        if "/" in name and self.kind.plural == "language_models":
            return f" For any hub id or folder give the part 'hf' with the option weights={name!r}."
        return suggestion(name, named)

    def _load(self, offer: Offer) -> Callable[..., Any]:
        """The factory as it was written, without the card's options."""
        if offer.registered is not None:
            return offer.registered
        if offer.fault:
            raise RegistryError(f"{self._told(offer)} is broken: {offer.fault}.{_remedy(offer)}")
        module, _, attribute = offer.card.factory.partition(":")
        try:
            factory = attrgetter(attribute)(importlib.import_module(module))
            if not callable(factory):
                raise TypeError(f"{offer.card.factory} is a {type(factory).__name__}, which cannot be called")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may call sys.exit at import; neither that nor a bug is ours to die of
            self._fail(offer, "is broken", error)
        return factory

    def _fail(self, offer: Offer, how: str, error: BaseException, own: bool = True) -> NoReturn:
        """Raise what the user reads, with a remedy if the failure is the component's own."""
        state = blame(offer, error)
        if state.name != "broken":
            raise RegistryError(f"{self._told(offer)} {state.name}. Install it: {state.reason}") from error
        raise RegistryError(f"{self._told(offer)} {how}: {state.reason}.{_remedy(offer) if own else ''}") from error

    # --- words --------------------------------------------------------------------------------------------------------

    def _entry(self, name: str, offer: Offer, options: Mapping[str, Any], state: State) -> Entry:
        card = offer.card
        return Entry(
            name=name,
            kind=self.kind.singular,
            summary=card.summary,
            source=card.source,
            licence=card.licence,
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
    def _upstream(self) -> int:
        """How many arguments of a factory are not options."""
        return int(bool(self.kind.upstream or self.kind.positional))

    @property
    def _one(self) -> str:
        return self.kind.singular.replace("_", " ")

    @property
    def _many(self) -> str:
        return self.kind.plural.replace("_", " ")

    def _told(self, offer: Offer) -> str:
        return f"{self._one} {offer.card.name!r}" + ("" if offer.builtin else f" of {offer.origin}")


REGISTRIES = {plural: Registry(kind) for plural, kind in KINDS.items()}


def registry(kind: str) -> Registry:
    """The registry of a kind by its singular or plural name, `language-model` as well as `language_models`.

    Raises RegistryError for a word that is no kind.
    """
    word = kind.replace("-", "_")
    for known in KINDS.values():
        if word in (known.singular, known.plural):
            return REGISTRIES[known.plural]
    raise unknown(f"no kind of part is called {kind!r}", kind, KINDS)


def _contract(protocol: type) -> list[str]:
    """The attributes and methods that a protocol lists."""
    methods = [
        name
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) and value.__module__ == protocol.__module__
    ]
    return [*protocol.__annotations__, *methods]


def _filled(factory: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return functools.partial(factory, **options) if options else factory


def _nameless(offer: Offer) -> bool:
    try:
        check_name(offer.card.name)
    except RegistryError:
        return True
    return False


def _remedy(offer: Offer) -> str:
    if offer.builtin:  # then a package that it imports is broken, and another version of this one would not help
        return " Run `sca doctor` to find the cause."
    if offer.registered or "pip install" in offer.fault:  # code has no package; a fault may include the remedy
        return ""
    return f" Try: pip install -U {offer.origin.name}"


def _module(factory: Any) -> str:
    return getattr(factory, "__module__", None) or type(factory).__module__


def _path(factory: Any) -> str:
    return f"{_module(factory)}:{getattr(factory, '__qualname__', type(factory).__qualname__)}"


def _place(factory: Any) -> str:
    """module:name (file:line), as far as Python can tell."""
    try:
        return f"{_path(factory)} ({inspect.getsourcefile(factory)}:{inspect.getsourcelines(factory)[1]})"
    except (TypeError, OSError):
        return _path(factory)


def _runs_again(before: Any, factory: Any) -> bool:
    return _path(before) == _path(factory) and "<locals>" not in _path(factory)
