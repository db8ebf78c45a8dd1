"""Launchers: run tasks in other processes or on other machines."""
