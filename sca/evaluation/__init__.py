"""How good a model is: `predictions` asks it, `metrics` read nothing but what was recorded, `evaluate` does both."""
