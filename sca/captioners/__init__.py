"""Baselines and vision-language models that caption regions."""
