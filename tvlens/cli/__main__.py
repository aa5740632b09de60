"""``python -m tvlens.cli``."""

from tvlens.cli import main

main()
