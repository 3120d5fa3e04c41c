"""Starts and watches the ranks of a measurement in the way a server does.

The bench's own process is rank 0. The other ranks run ``python -m lingbot_rt.bench.ranks JOB`` and follow its commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

from lingbot_rt.bench.collectives import CollectivesSpec, Exchange, measure
from lingbot_rt.bench.random_model import random_pipeline, shapes_of
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline, resolve_device
from lingbot_rt.engine.worker import follow, obey
from lingbot_rt.parallel.groups import RankGroup, Ranks
from lingbot_rt.parallel.launch import Place
from lingbot_rt.parallel.leader import Leader, Stop, lead
from lingbot_rt.session.plan import EngineStatus


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

    def pipeline(self, report: Callable[[EngineStatus], None], ranks: Ranks | None = None) -> Pipeline:
        """Raises CheckpointError for a missing model, ConfigError for a missing device or attention kernel."""
        if not self.random_weights:
            return load_pipeline(self.config, report, ranks)
        return random_pipeline(self.config, ranks)


@contextmanager
def pipeline_on_ranks(job: Job, report: Callable[[EngineStatus], None]) -> Iterator[tuple[Pipeline, Leader]]:
    """A pipeline on all ranks of the job, and what commands the others. Raises EngineFailed if a rank is lost."""
    with _started_ranks(job) as leader:

        def on_progress(status: EngineStatus) -> None:
            leader.ranks.tick()
            report(status)

        with leader.starting():
            pipeline = job.pipeline(on_progress, leader.ranks)
        yield pipeline, leader


def measure_on_ranks(job: Job, spec: CollectivesSpec) -> list[Exchange]:
    """Times the collectives on two ranks or more. Raises EngineFailed if a rank is lost."""
    with _started_ranks(job) as leader:
        with leader.starting():
            device = resolve_device(job.config.device)
        with leader.command(spec):
            assert isinstance(leader.ranks, RankGroup), "one rank has no collectives"
            return measure(spec, leader.ranks, device)


@contextmanager
def _started_ranks(job: Job) -> Iterator[Leader]:
    command = [sys.executable, "-m", "lingbot_rt.bench.ranks", job.to_json()]
    heads = shapes_of(job.config.model_path).dit.num_attention_heads
    # A lost rank needs no callback here: it is logged, and raised where rank 0 waits for it.
    leader = lead(job.config, lambda verdict: None, command, heads)
    try:
        yield leader
    finally:
        leader.stop()


def _run_worker(job: Job, group: RankGroup) -> None:
    if not job.exchanges_only:
        obey(job.pipeline(lambda status: group.tick(), group), group)
        return
    device = resolve_device(job.config.device)
    group.agree(True)
    while True:
        match group.receive():
            case CollectivesSpec() as spec:
                measure(spec, group, device)
            case Stop():
                return


if __name__ == "__main__":
    job, place = Job.from_json(sys.argv[1]), Place.from_environment()
    assert place is not None, "started without a place: only rank 0 may run this module"
    sys.exit(follow(job.config, place, partial(_run_worker, job)))
