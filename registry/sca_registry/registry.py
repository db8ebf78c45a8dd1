"""Registries: one `catalogue.Registry` per kind, with built-in components, installed plugins and registered code.

    @mixers.register("mean")
    class MeanMixer: ...

    "mean" in mixers, mixers.get("mean"), mixers.get_all(), mixers.find("mean")

Names are read from cards and package metadata: listing imports nothing, and a lookup imports one module. A built-in
component takes precedence over a plugin with the same name. Plugins that share a name are available as
`distribution:name`. A broken component does not affect other names.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
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
    Origin,
    Registration,
    find_plugin_registrations,
    get_builtin_registrations,
    is_same_distribution,
)

TIMM_NAME_PATTERN = re.compile(r"[a-z]\w*[_\d]\w*(\.\w+)?", re.ASCII)  # such as resnet50.a1_in1k
KINDS_WITHOUT_TEMPLATE = ("captioners", "launchers")  # that `sca plugin new` cannot write
Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class RegistryEntry:
    """Metadata and state of a component.

    `Registry.list_entries` reads the state and the options from metadata; `Registry.load_entry` imports the factory.

    Attributes:
        name: Shortest unambiguous name.
        kind: Singular name of the kind, such as "encoder".
        summary: One sentence that describes the component.
        source: Paper, or Hub id and revision.
        license: License of the component and its weights.
        terms: Restrictions of the weights.
        parameters: Number of parameters.
        extra: Extra of the distribution that must be installed.
        distribution: Distribution, or module of a component registered in code.
        version: Version of the distribution.
        state: "ok", "unchecked" (a plugin that was not imported), "broken", or "needs extra: NAME".
        reason: Cause of the failure, or the command that installs the extra.
        factory: Path of the factory, "package.module:attribute".
        options: Options set by the card or, from `Registry.load_entry`, the defaults of all options of the factory,
            with `options.REQUIRED` for an option without a default.
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
    """Registry of the components of one kind.

    Extends `catalogue.Registry`: names are listed without imports, card files are read, duplicate names are rejected, a
    broken plugin only affects its own name, and `build` checks options and results.

    Args:
        kind: Kind of the components.

    Attributes:
        kind: Kind of the components.
    """

    def __init__(self, kind: ComponentKind):
        super().__init__(("sca", kind.plural))
        self.kind = kind

    def __repr__(self) -> str:
        return f"<Registry of {self.kind.plural}: {', '.join(self.list_names())}>"

    def register(self, name: str, *, func: Any = None) -> Any:
        """Register a factory in this process.

        Args:
            name: Name of the component.
            func: Function or class to register; None returns a decorator.

        Returns:
            The registered factory, or a decorator that registers one.

        Raises:
            RegistryError: The name is invalid, built in or already registered, or the factory is not callable. A module
                that runs again (a reload or a notebook cell) can register its own factory again.
        """
        if isinstance(name, type) or inspect.isfunction(name):
            raise RegistryError(
                f"{self.kind.plural}.register has no name for {name.__qualname__}; write "
                f'`@{self.kind.plural}.register("name")`'
            )
        check_name(name)

        def add_factory(factory: Factory) -> Factory:
            if not callable(factory):
                raise RegistryError(
                    f"{self._singular} {name!r} is {factory!r}, which is not callable; register a class or function"
                )
            conflicts = [
                f"{BUILTIN_DISTRIBUTION} ({registration.card.factory})"
                for registration in self._get_builtin_registrations()
                if registration.card.name == name
            ]
            previous = self._get_registered().get(name)
            if previous is not None and not _is_redefinition(previous, factory):
                conflicts.append(_describe_location(previous))
            if conflicts:
                raise RegistryError(
                    f"{self._singular} {name!r} is already registered by {conflicts[0]}; register "
                    f"{_describe_location(factory)} under another name"
                )
            return super(Registry, self).register(name)(factory)

        return add_factory if func is None else add_factory(func)

    # --- names and metadata, without imports --------------------------------------------------------------------------

    def list_names(self) -> list[str]:
        """Return all names, sorted; ambiguous ones are `distribution:name`."""
        return sorted(self._get_registrations_by_name())

    def __contains__(self, name: object) -> bool:
        """Return whether a name refers to exactly one component, working or broken."""
        return name in self._get_registrations_by_name() or len(self._find_qualified_registrations(name)) == 1

    def list_entries(self) -> list[RegistryEntry]:
        """Return the metadata of all components, sorted by name, including broken ones and invalid names."""
        named_registrations = [
            *self._get_registrations_by_name().items(),
            *(
                (registration.card.name, registration)
                for registration in self._list_registrations()
                if _has_invalid_name(registration)
            ),
        ]
        entries = [
            self._make_entry(name, registration, registration.card.default_options, infer_state(registration))
            for name, registration in named_registrations
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def get_card(self, name: str) -> Card:
        """Return the card of a component; only `name` and `factory` are set for a component without a card.

        Args:
            name: Name of the component.

        Returns:
            The card.

        Raises:
            RegistryError: The name is unknown or ambiguous.
        """
        return self._resolve_registration(name).card

    # --- factories, with an import of their module --------------------------------------------------------------------

    def get(self, name: str) -> Callable[..., Any]:
        """Return the factory of a component, with the options of its card bound.

        Args:
            name: Name of the component.

        Returns:
            The factory.

        Raises:
            RegistryError: The name is unknown or ambiguous, or the component is broken or needs an extra.
        """
        registration = self._resolve_registration(name)
        return _bind_options(self._load_factory(registration), registration.card.default_options)

    def get_all(self) -> dict[str, Callable[..., Any]]:
        """Import all components and return the factories that work, by name. `find` returns the state of the others."""
        return self._load_working(self.list_names())

    def get_entry_points(self) -> dict[str, Callable[..., Any]]:
        """Import all installed plugins and return the factories that work, by name."""
        return self._load_working(
            name for name, registration in self._get_registrations_by_name().items() if self._is_plugin(registration)
        )

    def get_entry_point(self, name: str, default: Any = None) -> Any:
        """Return the factory of a plugin.

        Args:
            name: Name of the component.
            default: Returned if no plugin has the name, or the plugin does not work.

        Returns:
            The factory, or `default`.
        """
        with suppress(RegistryError):
            if self._is_plugin(self._resolve_registration(name)):
                return self.get(name)
        return default

    def find(self, name: str) -> dict[str, Any]:
        """Return the location and the state of a component.

        Args:
            name: Name of the component.

        Returns:
            `module`, `file`, `line_no` and `docstring` as in catalogue; `distribution`, `version`, `state` and `reason`
            as in `RegistryEntry`.

        Raises:
            RegistryError: The name is unknown or ambiguous.
        """
        entry, registration = self.load_entry(name), self._resolve_registration(name)
        state_facts = {key: getattr(entry, key) for key in ("distribution", "version", "state", "reason")}
        source_facts: dict[str, Any] = {"file": None, "line_no": None, "docstring": None}
        with suppress(RegistryError):
            factory = self._load_factory(registration)
            source_facts["docstring"] = inspect.getdoc(factory)
            with suppress(TypeError, OSError):
                source_facts |= {"file": inspect.getsourcefile(factory), "line_no": inspect.getsourcelines(factory)[1]}
        return {"module": entry.factory.partition(":")[0], **source_facts, **state_facts}

    def build(self, name: str, /, *upstream: Any, **options: Any) -> Any:
        """Build a component.

        Args:
            name: Name of the component.
            *upstream: The built upstream component, or the split of a dataset, if the kind has one.
            **options: Options of the factory.

        Returns:
            The component.

        Raises:
            RegistryError: The name is unknown or ambiguous, the component is broken or needs an extra, an option is
                invalid, the factory raises an error, or its result lacks attributes of the protocol.
        """
        assert len(upstream) == self._num_positional, (
            f"build({name!r}, ...) takes {self._num_positional} positional argument(s) and options"
        )
        registration = self._resolve_registration(name)
        card = registration.card
        default_options: Mapping[str, Any] = card.default_options
        if "weights" in options and options["weights"] != card.options.get("weights"):
            default_options = {key: value for key, value in card.options.items() if key != "revision"}
        factory = _bind_options(self._load_factory(registration), default_options)
        check_options(f"{self._singular} {name!r}", factory, self._num_positional, options)
        try:
            component = factory(*upstream, **options)
            missing = [name for name in _list_protocol_members(self.kind.protocol) if not hasattr(component, name)]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # third-party code can raise anything
            can_blame_options = bool(upstream or options) or registration.is_builtin
            if isinstance(error, ValueError | OSError) and can_blame_options:
                raise RegistryError(f"{self._describe_registration(registration)} cannot be built: {error}") from error
            option_text = ", ".join(f"{option}={value!r}" for option, value in options.items())
            problem = f"cannot be built with {option_text}" if option_text else "cannot be built"
            is_component_fault = not (options or registration.is_builtin or is_memory_error(error))
            self._raise_failure(registration, problem, error, is_component_fault)
        if missing:
            hint = f"; `sca plugin new {self.kind.singular.replace('_', '-')} NAME` writes a template"
            raise RegistryError(
                f"{self._describe_registration(registration)} returned a {type(component).__name__} without "
                f"{', '.join(missing)}; implement the protocol sca_registry.contracts.{self.kind.protocol.__name__}"
                f"{'' if self.kind.plural in KINDS_WITHOUT_TEMPLATE else hint}"
            )
        return component

    def check(self, name: str, **options: Any) -> None:
        """Check the name, the extra and the options of a component without building it.

        Args:
            name: Name of the component.
            **options: Options of the factory.

        Raises:
            RegistryError: The name is unknown or ambiguous, the component is broken or needs an extra, or an option is
                invalid.
        """
        registration = self._resolve_registration(name)
        state = infer_state(registration)
        if state.name.startswith("needs extra"):
            raise RegistryError(self._describe_missing_extra(registration, state))
        factory = _bind_options(self._load_factory(registration), registration.card.default_options)
        check_options(f"{self._singular} {name!r}", factory, self._num_positional, options)

    def load_entry(self, name: str) -> RegistryEntry:
        """Import a component and return its metadata and state.

        Args:
            name: Name of the component.

        Returns:
            Entry with all options of the factory. Its state is "broken" or "needs extra: NAME" if the import fails.

        Raises:
            RegistryError: The name is unknown or ambiguous.
        """
        registration = self._resolve_registration(name)
        name = next(
            key
            for key, known_registration in self._get_registrations_by_name().items()
            if known_registration == registration
        )
        try:
            factory = self._load_factory(registration)
        except RegistryError as error:
            state = (
                classify_failure(registration, error.__cause__)
                if error.__cause__ is not None
                else infer_state(registration)
            )
            return self._make_entry(name, registration, registration.card.default_options, state)
        options = get_factory_options(_bind_options(factory, registration.card.default_options), self._num_positional)
        state = infer_state(registration)
        entry = self._make_entry(
            name, registration, options, ComponentState("ok") if state.name == "unchecked" else state
        )
        return replace(entry, summary=entry.summary or (inspect.getdoc(factory) or "").partition("\n")[0])

    def is_text_option(self, name: str, option: str) -> bool:
        """Return whether an option only takes text or a path; False if the component cannot be loaded.

        Args:
            name: Name of the component.
            option: Name of the option.

        Returns:
            True if the option takes text.
        """
        try:
            return is_text_option(self._load_factory(self._resolve_registration(name)), self._num_positional, option)
        except RegistryError:
            return False

    def get_declared(self, name: str, field: str) -> Any:
        """Return a field that the card of a component, or else its class, declares.

        Args:
            name: Name of the component.
            field: "provides", "requires" or "default_segmenter".

        Returns:
            The value; None if neither declares it.

        Raises:
            RegistryError: The name is unknown or ambiguous, or the component is broken or needs an extra.
        """
        registration = self._resolve_registration(name)
        value = getattr(registration.card, field, None)
        if value is None:
            value = getattr(self._load_factory(registration), field, None)
        return None if isinstance(value, property) else value

    # --- registrations ------------------------------------------------------------------------------------------------

    def _get_builtin_registrations(self) -> tuple[Registration, ...]:
        return get_builtin_registrations(self.kind.plural)

    def _get_registered(self) -> dict[str, Any]:
        return super().get_all()

    def _is_plugin(self, registration: Registration) -> bool:
        return not registration.is_builtin and registration.registered_factory is None

    def _load_working(self, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
        factories = {}
        for name in names:
            with suppress(RegistryError):
                factories[name] = self.get(name)
        return factories

    def _list_registrations(self) -> list[Registration]:
        """List all registrations, built-in first; a factory that is both an entry point and registered appears once."""
        plugins = find_plugin_registrations(self.kind.entry_point_group)
        installed = {(registration.card.name, registration.card.factory) for registration in plugins}
        code_registrations = [
            Registration(
                Card(name, _get_factory_path(factory)), Origin(_get_module_name(factory)), registered_factory=factory
            )
            for name, factory in self._get_registered().items()
            if (name, _get_factory_path(factory)) not in installed
        ]
        return [*self._get_builtin_registrations(), *plugins, *code_registrations]

    def _get_registrations_by_name(self) -> dict[str, Registration]:
        """Return each registration by its shortest unambiguous name."""
        registrations = [
            registration for registration in self._list_registrations() if not _has_invalid_name(registration)
        ]
        registrations_by_short_name: dict[str, list[Registration]] = {}
        for registration in registrations:
            registrations_by_short_name.setdefault(registration.card.name, []).append(registration)
        return {
            name
            if registration.is_builtin or len(registrations_by_short_name[name]) == 1
            else f"{registration.origin.name}:{name}": registration
            for name, registration in ((registration.card.name, registration) for registration in registrations)
        }

    def _find_qualified_registrations(self, name: object) -> list[Registration]:
        """Find the registrations with the name `distribution:name`."""
        distribution, _, short_name = str(name).rpartition(":")
        registrations = self._get_registrations_by_name().values()
        return [
            registration
            for registration in registrations
            if registration.card.name == short_name and is_same_distribution(registration.origin.name, distribution)
        ]

    def _resolve_registration(self, name: str) -> Registration:
        registrations_by_name = self._get_registrations_by_name()
        matches = (
            [registrations_by_name[name]] if name in registrations_by_name else self._find_qualified_registrations(name)
        )
        if len(matches) == 1:
            return matches[0]
        qualified_names = [
            repr(qualified_name)
            for qualified_name, registration in registrations_by_name.items()
            if registration.card.name == name
        ]
        if len(qualified_names) > 1:
            raise RegistryError(
                f"{len(qualified_names)} {self._plural} are named {name!r}; choose {' or '.join(qualified_names)}"
            )
        if self.kind.plural == "encoders" and _is_timm_model(name):
            raise RegistryError(
                f"no encoders named {name!r}; it is a model of timm: use 'timm' with the option model={name!r}"
            )
        raise RegistryError(
            f"no {self._plural} named {name!r}.{self._suggest_meaning(str(name), registrations_by_name)}"
            f"{format_choices(sorted(registrations_by_name))} "
            f"Plugins add names with entry points in the group {self.kind.entry_point_group!r}."
        )

    def _suggest_meaning(self, name: str, registrations_by_name: Mapping[str, Registration]) -> str:
        """Suggest a component of another kind, the component of a Hub id or factory, or the closest name."""
        for other in REGISTRIES.values():
            if other is not self and name in other:
                article = "an" if other.kind.singular[0] in "aeiou" else "a"
                return f" It is the name of {article} {other.kind.singular.replace('_', ' ')}."
        for known_name, registration in registrations_by_name.items():
            if name in (registration.card.options.get("weights"), registration.card.factory):
                return f" Did you mean {known_name!r}?"
        if "/" in name and self.kind.plural == "language_models":
            return f" For a Hub id or a folder, use 'hf' with the option weights={name!r}."
        return suggest_name(name, registrations_by_name)

    def _load_factory(self, registration: Registration) -> Callable[..., Any]:
        """Import a factory, without binding the options of its card."""
        if registration.registered_factory is not None:
            return registration.registered_factory
        if registration.problem:
            raise RegistryError(
                f"{self._describe_registration(registration)} is broken: {registration.problem}."
                f"{_suggest_remedy(registration)}"
            )
        module, _, attribute = registration.card.factory.partition(":")
        try:
            factory = attrgetter(attribute)(importlib.import_module(module))
            if not callable(factory):
                raise TypeError(f"{registration.card.factory} is a {type(factory).__name__}, which is not callable")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # third-party code can raise anything, or call sys.exit
            self._raise_failure(registration, "is broken", error)
        return factory

    def _raise_failure(
        self, registration: Registration, problem: str, error: BaseException, is_component_fault: bool = True
    ) -> NoReturn:
        """Raise the error of a failed import or construction, with a remedy if the component is at fault."""
        state = classify_failure(registration, error)
        if state.name != "broken":
            raise RegistryError(self._describe_missing_extra(registration, state)) from error
        remedy = _suggest_remedy(registration) if is_component_fault else ""
        raise RegistryError(
            f"{self._describe_registration(registration)} {problem}: {state.reason}.{remedy}"
        ) from error

    def _describe_missing_extra(self, registration: Registration, state: ComponentState) -> str:
        component, extra = self._describe_registration(registration), registration.card.extra
        return f"{component} needs the extra {extra!r}; install it with: {state.reason}"

    # --- metadata and messages ----------------------------------------------------------------------------------------

    def _make_entry(
        self, name: str, registration: Registration, options: Mapping[str, Any], state: ComponentState
    ) -> RegistryEntry:
        card = registration.card
        return RegistryEntry(
            name=name,
            kind=self.kind.singular,
            summary=card.summary,
            source=card.source,
            license=card.license,
            terms=card.terms,
            parameters=card.parameters,
            extra=card.extra,
            distribution=registration.origin.name,
            version=registration.origin.version,
            state=state.name,
            reason=state.reason,
            factory=card.factory,
            options=dict(options),
        )

    @property
    def _num_positional(self) -> int:
        """Number of leading parameters of a factory that are not options."""
        return int(bool(self.kind.upstream_kind or self.kind.first_argument))

    @property
    def _singular(self) -> str:
        return self.kind.singular.replace("_", " ")

    @property
    def _plural(self) -> str:
        return self.kind.plural.replace("_", " ")

    def _describe_registration(self, registration: Registration) -> str:
        return f"{self._singular} {registration.card.name!r}" + (
            "" if registration.is_builtin else f" of {registration.origin}"
        )


REGISTRIES = {plural: Registry(kind) for plural, kind in COMPONENT_KINDS.items()}


def get_registry(kind: str) -> Registry:
    """Return the registry of a kind.

    Args:
        kind: Singular or plural name with underscores or hyphens, such as "language-model" or "language_models".

    Returns:
        The registry.

    Raises:
        RegistryError: The kind is unknown.
    """
    normalized = kind.replace("-", "_")
    for component_kind in COMPONENT_KINDS.values():
        if normalized in (component_kind.singular, component_kind.plural):
            return REGISTRIES[component_kind.plural]
    raise make_unknown_name_error(f"unknown kind of component {kind!r}", kind, COMPONENT_KINDS)


def _is_timm_model(name: object) -> bool:
    """Return whether timm is installed and has a model of this name, which may be followed by a dot and a tag."""
    if not isinstance(name, str) or not TIMM_NAME_PATTERN.fullmatch(name) or find_spec("timm") is None:
        return False
    try:
        import timm  # slow

        return timm.is_model(name)
    except Exception:  # a broken installation
        return False


def _list_protocol_members(protocol: type) -> list[str]:
    """List the attributes and methods of a protocol."""
    methods = [
        name
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) and value.__module__ == protocol.__module__
    ]
    return [*protocol.__annotations__, *methods]


def _bind_options(factory: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return functools.partial(factory, **options) if options else factory


def _has_invalid_name(registration: Registration) -> bool:
    try:
        check_name(registration.card.name)
    except RegistryError:
        return True
    return False


def _suggest_remedy(registration: Registration) -> str:
    if registration.is_builtin:  # a dependency is broken, so that upgrading this package does not help
        return " Run `sca doctor` to find the cause."
    if (
        registration.registered_factory or "pip install" in registration.problem
    ):  # no package to upgrade, or a remedy already
        return ""
    return f" Try: pip install -U {registration.origin.name}"


def _get_module_name(factory: Any) -> str:
    return getattr(factory, "__module__", None) or type(factory).__module__


def _get_factory_path(factory: Any) -> str:
    return f"{_get_module_name(factory)}:{getattr(factory, '__qualname__', type(factory).__qualname__)}"


def _describe_location(factory: Any) -> str:
    """Format "module:name (file:line)"; omit the file if it is unknown."""
    try:
        return f"{_get_factory_path(factory)} ({inspect.getsourcefile(factory)}:{inspect.getsourcelines(factory)[1]})"
    except (TypeError, OSError):
        return _get_factory_path(factory)


def _is_redefinition(previous: Any, factory: Any) -> bool:
    return _get_factory_path(previous) == _get_factory_path(factory) and "<locals>" not in _get_factory_path(factory)
