"""`python -m opd_cli`: the same as the `opd` command."""

from opd_cli import main

main()
