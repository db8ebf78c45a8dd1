"""What authors of plugins test with: the conformance kit, a pytest fixture, and the scaffold of a plugin package."""
