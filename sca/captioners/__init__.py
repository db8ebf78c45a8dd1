"""What captions regions without being trained for it: baselines, and the door to them and to models."""
