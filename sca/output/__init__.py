"""Write and read caption files, and render the viewer."""
