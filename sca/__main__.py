"""`python -m sca`."""

from sca.cli import main

main()
