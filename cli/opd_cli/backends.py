"""`opd backends`."""

from __future__ import annotations

import sys
from typing import Any

import click

from opd_cli.terminal import say_json


@click.command()
@click.argument("name", required=False)
@click.option(
    "--check",
    is_flag=True,
    help="Run every backend that can run here against numbers committed from the CPU.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of a table."
)
def backends(name: str | None, check: bool, as_json: bool) -> None:
    """Shows which backends are installed, on which device, and what is missing; --check verifies
    them in about a minute.

    NAME limits the command to one backend. With --check the exit code is 1 if a check fails.

    \b
    Examples:
      opd backends
      opd backends mlx --check
    """
    from opd import registry
    from opd.errors import BackendError, nearest
    from opd.testing.fixtures import check_backend
    from opd_cli.tables import backend_table, check_table

    known = registry.names()
    if name is not None and name not in known:
        raise BackendError(f"unknown backend '{name}'; {nearest(name, known)}")
    states = {backend: registry.state(backend) for backend in ([name] if name else known)}
    result: dict[str, Any] = {
        "automatic": registry.automatic(),
        "backends": {backend: vars(state) for backend, state in states.items()},
    }
    passed = True
    if not as_json:
        backend_table(states, result["automatic"])
    for backend, state in states.items():
        if check and state.ready:
            checks = check_backend(backend)
            all_passed = all(each.passed for each in checks)
            passed &= all_passed
            result["backends"][backend] |= {
                "passed": all_passed,
                "checks": [{**vars(each), "passed": each.passed} for each in checks],
            }
            if not as_json:
                check_table(backend, state.device, checks)
    if as_json:
        say_json(result)
    if not passed:
        sys.exit(1)
