"""Typed configurations of the commands; registered with Hydra by ``register``. Does not import torch."""

from __future__ import annotations

from fastsample.conf.schema import (
    BenchConfig,
    CompareConfig,
    DistillConfig,
    DoctorConfig,
    ReferenceConfig,
    ReportConfig,
    SampleConfig,
    TuneConfig,
)

__all__ = [
    "COMMANDS",
    "BenchConfig",
    "DistillConfig",
    "ReferenceConfig",
    "ReportConfig",
    "SampleConfig",
    "TuneConfig",
    "register",
]

COMMANDS: dict[str, type] = {
    "sample": SampleConfig,
    "bench": BenchConfig,
    "tune": TuneConfig,
    "distill": DistillConfig,
    "report": ReportConfig,
    "compare": CompareConfig,
    "doctor": DoctorConfig,
}


def register() -> None:
    """Put the commands' configurations into Hydra's ConfigStore."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    hydra = {
        # A sweep puts one folder a job under `out`; a single run makes `out` itself, after its checks.
        "run": {"dir": "."},
        "sweep": {"dir": "${out}", "subdir": "${hydra:job.num}"},
        "output_subdir": None,
        "job": {"chdir": False},
    }
    no_log_files = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_schema", node=schema)
        groups = [{"method": "consistency"}] if name == "distill" else []
        defaults = [f"{name}_schema", "_self_", *groups, *no_log_files]
        store.store(name=name, node={"defaults": defaults, "hydra": hydra})


def register_methods() -> None:
    """Put the distillation methods into the group ``method``: their settings and defaults."""
    import dataclasses

    from hydra.core.config_store import ConfigStore

    from fastsample import distill
    from fastsample.distill.method import NO_SETTINGS

    for name, (_, kind) in distill.METHODS.items():
        fields = dataclasses.fields(getattr(distill, kind))
        settings = {f.name: f.default for f in fields if f.name not in (*NO_SETTINGS, "total")}
        ConfigStore.instance().store(group="method", name=name, node={"name": name, **settings})
