"""What can be named, and what each kind of part must do. Imports no torch."""

from sca_registry.messages import RegistryError
from sca_registry.plugins import refresh_plugins
from sca_registry.registry import REGISTRIES, RegistryEntry, Registry, get_registry

encoders = REGISTRIES["encoders"]
segmenters = REGISTRIES["segmenters"]
mixers = REGISTRIES["mixers"]
language_models = REGISTRIES["language_models"]
datasets = REGISTRIES["datasets"]
metrics = REGISTRIES["metrics"]
proposers = REGISTRIES["proposers"]
captioners = REGISTRIES["captioners"]
launchers = REGISTRIES["launchers"]

__all__ = [
    "REGISTRIES",
    "RegistryEntry",
    "Registry",
    "RegistryError",
    "captioners",
    "datasets",
    "encoders",
    "language_models",
    "launchers",
    "metrics",
    "mixers",
    "proposers",
    "refresh_plugins",
    "get_registry",
    "segmenters",
]
