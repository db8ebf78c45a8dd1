"""Registries of components, one per kind. Importing this package does not import torch."""

from sca_registry.errors import RegistryError
from sca_registry.plugins import refresh_plugins
from sca_registry.registry import REGISTRIES, Registry, RegistryEntry, get_registry

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
    "Registry",
    "RegistryEntry",
    "RegistryError",
    "captioners",
    "datasets",
    "encoders",
    "get_registry",
    "language_models",
    "launchers",
    "metrics",
    "mixers",
    "proposers",
    "refresh_plugins",
    "segmenters",
]
