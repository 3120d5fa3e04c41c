"""Starts and watches the ranks of a measurement in the way a server does.

The bench's own process is rank 0. The other ranks run ``python -m lingbot_rt.bench.ranks JOB`` and follow its commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

from lingbot_rt.bench.collectives import CollectivesSpec, Exchange, measure
from lingbot_rt.bench.random_model import random_model, random_pipeline
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.compilation import tuned_convolutions
from lingbot_rt.engine.device import resolve_device
from lingbot_rt.engine.model_memory import require_memory
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.worker import run_worker, worker_loop
from lingbot_rt.models.model_path import DUMMY
from lingbot_rt.parallel.coordinator import Coordinator, Stop, create_coordinator
from lingbot_rt.parallel.groups import RankGroup, Ranks
from lingbot_rt.parallel.launch import RankInfo, require_ranks
from lingbot_rt.session.plan import EngineStatus

_OFFERED = ("dtype", "quantization", "num_gpus", "dit_cpu_offload")
"""Options of the command that save memory."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank of a measurement needs to know."""

    config: ServeConfig
    random_weights: bool
    exchanges_only: bool = False  # run collectives only; load no networks

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**fields | {"config": ServeConfig(**fields["config"])})

    @property
    def _loaded(self) -> ServeConfig:
        return replace(self.config, load_format=DUMMY) if self.random_weights else self.config

    def require_ranks(self) -> None:
        """Raises ConfigError if the ranks do not fit the machine or the model."""
        require_ranks(self._loaded)

    def require_memory(self) -> None:
        """Raises ConfigError if the weights do not fit in memory."""
        require_memory(self._loaded, text_encoder=not self.random_weights, offered=_OFFERED)

    def pipeline(self, report: Callable[[EngineStatus], None], ranks: Ranks | None = None) -> Pipeline:
        """Raises CheckpointError for a missing model, ConfigError for a missing device or attention kernel."""
        if not self.random_weights:
            return load_pipeline(self.config, report, ranks)
        return random_pipeline(self.config, report, ranks)


@contextmanager
def pipeline_on_ranks(job: Job, report: Callable[[EngineStatus], None]) -> Iterator[tuple[Pipeline, Coordinator]]:
    """A pipeline on all ranks of the job, and what commands the others.

    Raises EngineFailed if a rank is lost, ConfigError if the weights do not fit in memory.
    """
    job.require_ranks()
    job.require_memory()
    with _started_ranks(job) as coordinator:

        def on_progress(status: EngineStatus) -> None:
            coordinator.ranks.tick()
            report(status)

        with coordinator.starting():
            pipeline = job.pipeline(on_progress, coordinator.ranks)
        yield pipeline, coordinator


def measure_on_ranks(job: Job, spec: CollectivesSpec) -> list[Exchange]:
    """Times the collectives on two ranks or more. Raises EngineFailed if a rank is lost."""
    with _started_ranks(job) as coordinator:
        with coordinator.starting():
            device = resolve_device(job.config.device)
        with coordinator.command(spec):
            assert isinstance(coordinator.ranks, RankGroup), "one rank has no collectives"
            return measure(spec, coordinator.ranks, device)


@contextmanager
def _started_ranks(job: Job) -> Iterator[Coordinator]:
    command = [sys.executable, "-m", "lingbot_rt.bench.ranks", job.to_json()]
    heads = random_model(job.config).dit_config.num_attention_heads
    # A lost rank needs no callback here: it is logged, and raised where rank 0 waits for it.
    coordinator = create_coordinator(job.config, lambda failure: None, command, heads)
    try:
        yield coordinator
    finally:
        coordinator.stop()


def _run_worker(job: Job, group: RankGroup) -> None:
    if not job.exchanges_only:
        pipeline = job.pipeline(lambda status: group.tick(), group)
        with tuned_convolutions():  # rank 0 does so in its warm-up, whose shapes are those of all chunks
            worker_loop(pipeline, group)
        return
    device = resolve_device(job.config.device)
    group.agree(True)
    while True:
        match group.receive(CollectivesSpec, Stop):
            case CollectivesSpec() as spec:
                measure(spec, group, device)
            case Stop():
                return


if __name__ == "__main__":
    job, place = Job.from_json(sys.argv[1]), RankInfo.from_environment()
    assert place is not None, "not started as a rank: only rank 0 may run this module"
    sys.exit(run_worker(job.config, place, partial(_run_worker, job)))
