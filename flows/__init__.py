"""Prefect lives here and nowhere else: flows that run stages, launchers, and the `eqm` command."""
