"""Test support for plugin authors: conformance checks, a pytest fixture, and a template of a plugin package."""
