"""The ranks of a measurement, started and watched as a server's are.

Followers run as ``python -m lingbot_rt.bench.ranks JOB`` and do what the bench's own process, rank 0, says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

from lingbot_rt.bench.collectives import Exchange, Exchanges, measure
from lingbot_rt.bench.random_model import random_pipeline, shapes_of
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline, resolve_device
from lingbot_rt.engine.worker import run_worker, worker_loop
from lingbot_rt.parallel.coordinator import Coordinator, Stop, create_coordinator
from lingbot_rt.parallel.groups import RankGroup, Ranks
from lingbot_rt.parallel.launch import RankInfo
from lingbot_rt.session.plan import EngineStatus


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank of a measurement has to know."""

    config: ServeConfig
    random_weights: bool
    exchanges_only: bool = False  # no networks: the ranks only talk

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**fields | {"config": ServeConfig(**fields["config"])})

    def pipeline(self, report: Callable[[EngineStatus], None], ranks: Ranks | None = None) -> Pipeline:
        """Raises CheckpointError for a model that is not there, ConfigError for a device or kernel that is not."""
        if not self.random_weights:
            return load_pipeline(self.config, report, ranks)
        return random_pipeline(self.config, ranks)


@contextmanager
def measured(job: Job, report: Callable[[EngineStatus], None]) -> Iterator[tuple[Pipeline, Coordinator]]:
    """A pipeline over as many ranks as the job has. Raises EngineFailed when one is lost."""
    with _led(job) as leader:

        def went_on(status: EngineStatus) -> None:
            leader.ranks.tick()
            report(status)

        with leader.starting():
            pipeline = job.pipeline(went_on, leader.ranks)
        yield pipeline, leader


def measured_exchanges(job: Job, exchanges: Exchanges) -> list[Exchange]:
    """Of two ranks or more. Raises EngineFailed when one is lost."""
    with _led(job) as leader:
        with leader.starting():
            device = resolve_device(job.config.device)
        with leader.command(exchanges):
            assert isinstance(leader.ranks, RankGroup), "one rank exchanges nothing"
            return measure(exchanges, leader.ranks, device)


@contextmanager
def _led(job: Job) -> Iterator[Coordinator]:
    command = [sys.executable, "-m", "lingbot_rt.bench.ranks", job.to_json()]
    heads = shapes_of(job.config.model_path).dit.num_attention_heads
    # The failure of a lost rank is logged, and raised where rank 0 waits for it.
    leader = create_coordinator(job.config, lambda failure: None, command, heads)
    try:
        yield leader
    finally:
        leader.stop()


def _help(job: Job, group: RankGroup) -> None:
    if not job.exchanges_only:
        worker_loop(job.pipeline(lambda status: group.tick(), group), group)
        return
    device = resolve_device(job.config.device)
    group.agree(True)
    while True:
        match group.receive():
            case Exchanges() as exchanges:
                measure(exchanges, group, device)
            case Stop():
                return


if __name__ == "__main__":
    job, place = Job.from_json(sys.argv[1]), RankInfo.from_environment()
    assert place is not None, "rank 0 says where"
    sys.exit(run_worker(job.config, place, partial(_help, job)))
