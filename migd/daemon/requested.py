"""What a request to migrate asks for: the configuration, with what the request says instead."""

from __future__ import annotations

from migd.config import MigrationConfig
from migd.control.commands import Migrate
from migd.migration.convergence import Exhausted, Policy
from migd.source.attempt import Compression, DirtyLogChoice, SourceOptions, Verify


def options(config: MigrationConfig, request: Migrate) -> SourceOptions:
    return SourceOptions(
        streams=request.streams or config.streams,
        live=request.live,
        hints=config.hints if request.hints is None else request.hints,
        verify=Verify(request.verify or config.verify),
        compression=Compression(request.compression or config.compression),
        dirty_log=DirtyLogChoice(request.dirty_log or config.dirty_log),
        policy=policy(config, request),
    )


def policy(config: MigrationConfig, request: Migrate) -> Policy:
    return Policy(
        downtime_limit_s=(request.downtime_limit_ms or config.downtime_limit_ms) / 1e3,
        max_iterations=request.max_iterations or config.max_iterations,
        max_total_s=request.max_total_s or config.max_total_s,
        on_exhausted=Exhausted(request.on_exhausted or config.on_exhausted),
    )


def max_bandwidth_bytes_s(config: MigrationConfig, request: Migrate) -> int:
    """0 for none: a request may lift the configured limit of a migration, not the daemon's."""
    asked = request.max_bandwidth_bytes_s
    return config.max_bandwidth if asked is None else asked
