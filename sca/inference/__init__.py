"""From images and prompts to masks and captions."""
