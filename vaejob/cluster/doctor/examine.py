"""The examination: every probe in its order, each followed by what was found."""

import math
import secrets
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vaejob.cluster.doctor import findings, network, pace, probes, room, step
from vaejob.cluster.doctor.findings import Finding
from vaejob.cluster.doctor.results import BucketUse, Clock, DataSample, Failed, Host, StepMemory, Summing
from vaejob.cluster.doctor.words import by_size
from vaejob.cluster.doctor.workers import Here, Workers, tried
from vaejob.config import JobConfig, changed_results
from vaejob.data.batches import DataSet, open_data
from vaejob.errors import BucketError, ClusterError, OutsideError, UserError, VaejobError
from vaejob.run import run_address
from vaejob.storage import Bucket
from vaejob.storage.runs import JOB_KEY, newest_record, read_job, read_rows
from vaejob.training.resident import resident_bytes

DRIVER = "the driver"
CLOCK_QUESTIONS = 5


@dataclass(frozen=True)
class Measures:
    """What is done beyond looking."""

    steps: bool = False
    """Take training steps, until memory or time ends them."""
    price_per_hour: float | None = None
    """Of all nodes, in any currency."""


def examine(job: JobConfig, measures: Measures) -> Iterator[Finding]:
    """What was found, line by line as it is found; the cluster is joined as `vaejob train` joins it.

    Raises UserError for an address that no place can have.
    """
    yield from of_run(job)
    try:
        with _workers(job) as workers:
            yield from Examination(job, workers).findings(measures)
    except ClusterError as error:
        yield Finding(
            "fail", "workers", str(error), "start the cluster, or correct --address, RAY_ADDRESS or cluster.address"
        )


@contextmanager
def _workers(job: JobConfig) -> Iterator[Workers]:
    if job.cluster.workers == 0:
        yield Here()
        return
    from vaejob.cluster.doctor.on_ray import workers_on

    with workers_on(job.cluster) as workers:
        yield workers


def of_run(job: JobConfig) -> Iterator[Finding]:
    """Whether the run may be started, or gone on with, under its name."""
    run = probes.bucket_at(run_address(job))
    try:
        if run.size(JOB_KEY) is None:
            yield Finding("ok", "run", f"{run.url} is new")
        elif changes := changed_results(read_job(run), job):
            found = f"{run.url} belongs to a run with other settings ({'; '.join(changes)})"
            yield Finding("fail", "run", found, "set them back to continue it, or choose another run.name", True)
        else:
            record, _ = newest_record(run)
            seen = f"{record.images_seen:,} of {job.training.images:,} images" if record else "no checkpoint yet"
            yield Finding("ok", "run", f"{run.url} would go on: {seen}")
    except OutsideError as error:
        yield Finding("fail", "run", str(error), "see the lines about the bucket")
    except UserError as error:
        yield Finding("fail", "run", str(error), "choose another run.name", True)


class Examination:
    """Of one job in the places of its workers."""

    def __init__(self, job: JobConfig, workers: Workers) -> None:
        self._job, self._workers = job, workers
        self._run = probes.bucket_at(run_address(job))
        self._world = len(workers.names)
        self._alone = isinstance(workers, Here)
        self._hosts: dict[str, Host] = {}

    def findings(self, measures: Measures) -> Iterator[Finding]:
        job, places = self._job, self._workers.places
        if not self._alone:
            yield from findings.of_places(places, gpus_per_worker=job.cluster.gpus_per_worker)
        yield from self._of_hosts()
        if len(self._hosts) < self._world:
            return  # a worker that cannot even tell its versions is to be mended first
        yield from findings.of_clocks(self._clocks())
        yield from findings.of_bucket(self._bucket_uses())
        data = yield from self._of_data()
        if data is None:
            return
        # Of the job as it was asked for, even where not all of its workers found room.
        workers = max(1, job.cluster.least_workers if places.error else self._world)
        yield from findings.of_batches(
            global_batch=job.data.global_batch, lanes=job.data.lanes, workers=workers, images=data.manifest.images
        )
        if not self._world:
            return
        images = math.ceil(job.data.global_batch / workers)
        memory = yield from self._of_room(data, images=images, workers=workers)
        if memory is not None:
            yield from self._of_pace(data, memory, measures, images=images, workers=workers)

    def _of_hosts(self) -> Iterator[Finding]:
        driver, head = probes.look_around(self._job), self._workers.places.head
        found = self._workers.each(probes.look_around, [{"job": self._job, "towards": head}] * self._world)
        for name, host in zip(self._workers.names, found, strict=True):
            if isinstance(host, Failed):
                advice = "install the same vaejob with all it needs on every node, or use vaejob submit"
                yield findings.of_failure("workers", host, whose=name, advice=advice)
            else:
                self._hosts[name] = host
        versions = {} if self._alone else {name: host.versions for name, host in self._hosts.items()}
        yield from findings.of_versions(driver.versions, versions)
        if versions:
            yield findings.of_interfaces(self._hosts)

    def _clocks(self) -> dict[str, Clock]:
        """By questions whose round trip is timed: the shortest blurs least."""
        clocks = dict[str, Clock]()
        for rank, name in enumerate(self._workers.names):
            if self._alone or name not in self._hosts:
                continue
            answers = []
            for _ in range(CLOCK_QUESTIONS):
                asked, theirs, answered = time.time(), self._workers.ask(rank, probes.now), time.time()
                if not isinstance(theirs, Failed):
                    answers.append(Clock(theirs - (asked + answered) / 2, (answered - asked) / 2))
            if answers:
                clocks[name] = min(answers, key=lambda clock: clock.uncertainty)
        return clocks

    def _bucket_uses(self) -> dict[str, BucketUse | Failed]:
        """Of the workers, while something of the driver lies there, and of the driver."""
        mark = f"doctor/{secrets.token_hex(8)}"
        left = None if self._alone else _leave(self._run, mark)
        asked = {"address": self._run.url, "left_by_driver": left}
        try:
            uses = [] if self._alone else self._workers.each(probes.use_bucket_at, [asked] * self._world)
            driver = tried(probes.use_bucket_at, {"address": self._run.url})
        finally:
            if left is not None:
                with suppress(BucketError):
                    self._run.delete(mark)
        return dict(zip(self._workers.names if uses else [], uses, strict=True)) | {DRIVER: driver}

    def _of_data(self) -> Generator[Finding, None, DataSet | None]:
        """Of both data sets; the training set if it is one."""
        opened: dict[str, DataSet] = {}
        for setting, address in (("data.train", self._job.data.train), ("data.test", self._job.data.test)):
            if address is None:
                continue
            found = tried(open_data, {"address": address})
            if isinstance(found, Failed):
                yield findings.of_failure(setting, found, whose=DRIVER, advice=f"pack the data, or correct {setting}")
                if found.wrong_input:
                    continue
                return None  # the store does not answer, and would not for the other
            opened[setting] = found
            yield from findings.of_data(setting, self._samples(address))
        train, test = opened.get("data.train"), opened.get("data.test")
        if train and test and train.manifest.shape != test.manifest.shape:
            shapes = " and ".join(by_size(data.manifest.shape) for data in (train, test))
            advice = "set data.test to images of the training set's shape"
            yield Finding("fail", "data.test", f"the images of data.train and data.test are {shapes}", advice, True)
        return train

    def _samples(self, address: str) -> dict[str, DataSample | Failed]:
        if not self._world:
            return {DRIVER: tried(probes.sample_data, {"address": address, "rank": 0, "world_size": 1})}
        asked = [{"address": address, "rank": rank, "world_size": self._world} for rank in range(self._world)]
        return dict(zip(self._workers.names, self._workers.each(probes.sample_data, asked), strict=True))

    def _of_room(self, data: DataSet, *, images: int, workers: int) -> Generator[Finding, None, StepMemory | None]:
        """Of GPUs, memory and disks; what a step needs if it can be taken."""
        job, hosts = self._job, self._hosts
        on_gpus = job.cluster.gpus_per_worker > 0
        yield from room.of_gpus({name: host.gpu for name, host in hosts.items()}, asked=job.cluster.gpus_per_worker)
        yield from room.of_disks(hosts, data=probes.data_bytes(data), cache_bytes=job.data.cache_bytes, on_gpus=on_gpus)
        memory = self._workers.ask(0, step.estimate_memory, job=job)
        if isinstance(memory, Failed):
            advice = (
                "set the model's sizes to suit the images"
                if memory.wrong_input
                else "see that a step can be taken there"
            )
            yield findings.of_failure("model", memory, whose=self._workers.names[0], advice=advice)
            return None
        assert isinstance(memory, StepMemory), memory
        free = min(host.memory // self._on_node[host.node] for host in hosts.values())
        reader, resident = data.reader_bytes(job.data, world_size=workers), resident_bytes(data, job)
        at_once = self._at_once(images)
        if on_gpus:
            on_card = min((host.gpu.free for host in hosts.values() if host.gpu), default=0)
            yield room.of_memory(memory, images=at_once, resident=resident, free=on_card, where="on each worker's GPU")
        else:
            yield room.of_memory(
                memory, images=at_once, resident=resident, free=free, where="for each worker of a machine"
            )
            free = max(0, free - memory.of_batch(at_once) - resident)
        yield room.of_host_memory(reader=reader, state=memory.state // workers, free=free)
        return memory

    def _of_pace(
        self, data: DataSet, memory: StepMemory, measures: Measures, *, images: int, workers: int
    ) -> Iterator[Finding]:
        """How fast the workers are, alone and together, and what follows from it."""
        job, speed = self._job, None
        sums = self._sums(memory.gradients)
        slowest = max((one for one in sums if isinstance(one, Summing)), key=lambda one: one.seconds, default=None)
        step_seconds = None
        if measures.steps:
            processes = self._on_node[self._hosts[self._workers.names[0]].node]
            curve = self._workers.ask(0, step.measure_curve, job=job, memory=memory, processes=processes)
            yield from pace.of_curve(curve, configured=self._at_once(images))
            asked = {"job": job, "images": images, "world_size": workers}
            steps = self._workers.each(step.timed_step, [asked] * self._world)
            sync = pace.seconds_to_sum(slowest, memory.gradients) if slowest else 0.0
            found, speed = pace.of_steps(steps, global_batch=job.data.global_batch, sync_seconds=sync)
            step_seconds = speed.seconds_per_step - sync if speed else None
            yield found
        yield from pace.of_summing(sums, gradients=memory.gradients, step_seconds=step_seconds)
        if self._workers.places.error:
            speed = None  # as many workers as the job asks for were not there
        elif speed is None:
            with suppress(VaejobError):  # the lines about the run and the bucket say what is wrong with them
                speed = pace.speed_of_rows(read_rows(self._run), world_size=workers)
        yield pace.of_time(
            speed,
            images=job.training.images,
            data_images=data.manifest.images,
            global_batch=job.data.global_batch,
            price_per_hour=measures.price_per_hour,
        )

    def _sums(self, size: int) -> list[Summing | Failed]:
        """One all-reduce of all workers; empty where there is but one."""
        if self._world < 2:
            return []
        port = self._workers.ask(0, network.free_port)
        if isinstance(port, Failed):
            return [port]
        common = {
            "world_size": self._world,
            "meet_at": (self._hosts[self._workers.names[0]].address, port),
            "size": size,
            "on_gpu": self._job.cluster.gpus_per_worker > 0,
        }
        return self._workers.each(network.sum_together, [{**common, "rank": rank} for rank in range(self._world)])

    def _at_once(self, images: int) -> int:
        """Of a worker's part of the global batch, what it takes through the model in one piece."""
        return min(images, self._job.training.micro_batch or images)

    @property
    def _on_node(self) -> Counter[str]:
        """Workers of each machine."""
        return Counter(host.node for host in self._hosts.values())


def _leave(run: Bucket, key: str) -> str | None:
    """The key, if the driver can put something there; what it cannot, its own line says."""
    try:
        run.write(key, b"left by the driver of vaejob doctor")
    except BucketError:
        return None
    return key
