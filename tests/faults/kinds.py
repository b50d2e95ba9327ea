"""The faults: who is killed, and when; and what a bucket does to a job that lives."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tests.faults.jobs import FOR_EVER, SOON_SECONDS, HurtJob, Outcome, Went
from tests.job.memory import kill_for_memory
from tests.job.network import Network
from tests.job.nodes import Nodes
from tests.s3.faultproxy import FaultProxy, Rule

On = Literal["its own", "nodes", "network"]


@dataclass(frozen=True)
class Place:
    """Where jobs run: a folder for their files, and the way to their bucket."""

    folder: Path
    proxy: FaultProxy
    store_port: int
    """Of the server behind the proxy."""

    def job(self, name: str, *, workers: int, images: int = FOR_EVER, on: On = "its own") -> HurtJob:
        return HurtJob(
            self.folder,
            name,
            data="s3://faults/digits",
            runs="s3://faults/runs",
            images=images,
            workers=workers,
            store=f"http://127.0.0.1:{self.proxy.port}",
            cluster={"its own": None, "nodes": Nodes, "network": partial(Network, store_port=self.store_port)}[on],
        )


Injure = Callable[[HurtJob, Place, random.Random], Outcome]


@dataclass(frozen=True)
class Kind:
    name: str
    workers: int
    injure: Injure
    on: On = "its own"
    """The cluster; others are there before the job, of a head and two nodes, in networks of their own if need be."""


def all_of_it(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
    return job.hurt(job.kill)


def process(name: str) -> Injure:
    """SIGKILL to one process of the job, which is to go on by itself."""

    def injure(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
        child = job.child(name)
        if child is None:
            raise Went(f"runs without a process {name}")
        return job.hurt(child.kill)

    return injure


def out_of_memory(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
    """The kernel kills a worker for its memory; the job is to say so, and to go on by itself."""
    child = job.child("RayTrainWorker")
    if child is None:
        raise Went("runs without a worker")
    outcome = job.hurt(lambda: kill_for_memory(child))
    if "killed: by the kernel where memory runs out" not in job.said():
        raise Went(f"does not say that a worker was killed: {job.said()}")
    return outcome


def at_request(**rule: Any) -> Injure:
    """SIGKILL to all of the job while a request hangs: the rule's fault holds one of the next few that match."""

    def injure(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
        place.proxy.strike({"count": 1, "skip": chance.randrange(3), **rule})
        wait_until_struck(place.proxy, job)

        def kill() -> None:
            job.kill()
            place.proxy.strike()

        return job.hurt(kill)

    return injure


def wait_until_struck(proxy: FaultProxy, job: HurtJob) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not any(request["fault"] for request in proxy.log):
        if job.process.poll() is not None:
            raise Went(f"was over before it made such a request: {job.said()}")
        if time.monotonic() > deadline:
            raise Went(f"made no such request in {SOON_SECONDS:.0f} s: {job.said()}")
        time.sleep(0.02)
    time.sleep(0.1)


WRITE_FAULTS: list[Rule] = [
    {"fault": "reset"},
    {"fault": "close"},
    {"fault": "status", "code": 500, "s3code": "InternalError"},
    {"fault": "status", "code": 503},
    {"fault": "req_reset", "at": 1000},
    {"fault": "req_corrupt", "at": 100},
    {"fault": "reset_after"},
    {"fault": "delay", "seconds": 5},
    {"fault": "blackhole", "seconds": 40},
]
READ_FAULTS: list[Rule] = [
    {"fault": "reset"},
    {"fault": "close"},
    {"fault": "status", "code": 500, "s3code": "InternalError"},
    {"fault": "status", "code": 503},
    {"fault": "reset_mid", "at": 100},
    {"fault": "fin_mid", "at": 100},
    {"fault": "short_length", "at": 100},
    {"fault": "corrupt", "at": 100},
    {"fault": "throttle", "bytes_per_s": 20_000},
    {"fault": "delay", "seconds": 5},
    {"fault": "stall_mid", "at": 100, "seconds": 40},
]
MOST_STRUCK = {"blackhole": 1, "stall_mid": 1, "corrupt": 2}
"""Requests at once: a state that is damaged three times is what the bucket holds."""
REFUSED: Rule = {"fault": "refuse"}
"""Nobody listens, whatever is asked for."""


def drawn(faults: list[Rule], chance: random.Random, **where: str) -> Rule:
    fault = chance.choice(faults)
    return {**fault, "count": chance.randint(1, MOST_STRUCK.get(fault["fault"], 5)), **where}


def failing_write(**where: str) -> Injure:
    """The bucket fails some of the next such requests, and the job goes on."""

    def injure(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
        rule = drawn([*WRITE_FAULTS, REFUSED], chance, **where)

        def fault() -> None:
            if rule["fault"] == REFUSED["fault"]:
                place.proxy.refuse(seconds=chance.uniform(1, 10))
            else:
                place.proxy.strike(rule)
                wait_until_struck(place.proxy, job)

        return job.outlast(fault)

    return injure


def failing_read(**where: str) -> Injure:
    """All of the job is killed, and when it is started again the bucket fails some of the first such requests."""

    def injure(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
        rule = drawn([*READ_FAULTS, REFUSED], chance, **where)

        def fault() -> None:
            job.kill()
            if rule["fault"] == REFUSED["fault"]:
                place.proxy.refuse(seconds=chance.uniform(5, 15))
            else:
                place.proxy.strike(rule)

        outcome = job.hurt(fault)
        if rule["fault"] != REFUSED["fault"] and not any(request["fault"] for request in place.proxy.log):
            raise Went(f"started again without such a request as {rule}")
        return outcome

    return injure


def the_driver(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
    """SIGKILL to the process that the user started, of a job whose workers are elsewhere."""
    return job.hurt(job.kill)


def a_node(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
    """SIGKILL to all of a node that runs a worker; another takes its place."""

    def kill() -> None:
        job.nodes.lose(job.on.pop(chance.randrange(len(job.on))))
        job.on += job.nodes.add()

    return job.hurt(kill)


def cut_off(how: Callable[[Network, Any], None]) -> Injure:
    """A node that runs a worker can no longer be reached, and goes on; another takes its place, and then it is back."""

    def injure(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
        node = job.on.pop(chance.randrange(len(job.on)))

        def fault() -> None:
            how(job.nodes, node)
            job.on += job.nodes.add()

        outcome = job.hurt(fault)
        job.nodes.heal(node)
        job.train_a_while(2_000)
        job.nodes.lose(node)
        return outcome

    return injure


def the_cluster(job: HurtJob, place: Place, chance: random.Random) -> Outcome:
    """SIGKILL to every node, the head too; the command is repeated on a new cluster."""
    return job.hurt(job.new_nodes)


KINDS = [
    Kind("all of a job in one process", 0, all_of_it),
    Kind("all of a job with 2 workers and its cluster", 2, all_of_it),
    Kind("a worker of 2", 2, process("RayTrainWorker")),
    Kind("a worker of 2, by the kernel for its memory", 2, out_of_memory),
    Kind("Ray Train's controller", 2, process("TrainController")),
    Kind("the driver, whose workers are on a cluster", 2, the_driver, on="nodes"),
    Kind("a node of 2", 2, a_node, on="nodes"),
    Kind("a machine of 2", 2, a_node, on="network"),
    Kind("the link of a machine, which comes back", 2, cut_off(Network.cut), on="network"),
    Kind("a machine in silence, which comes back", 2, cut_off(Network.silence), on="network"),
    Kind("the head and all nodes", 2, the_cluster, on="nodes"),
    Kind("before a state is uploaded", 0, at_request(fault="blackhole", method="PUT", path="/states/")),
    Kind("in the middle of a state", 0, at_request(fault="req_stall", at=1000, method="PUT", path="/states/")),
    Kind("between the files of a state", 2, at_request(fault="blackhole", method="PUT", path="/states/.*1of2")),
    Kind("before a record is written", 0, at_request(fault="blackhole", method="PUT", path="/records/")),
    Kind("after a record, whose reply is lost", 0, at_request(fault="stall_after", method="PUT", path="/records/")),
    Kind("while an older checkpoint is deleted", 0, at_request(fault="blackhole", method="DELETE|POST")),
    Kind("before rows are written", 0, at_request(fault="blackhole", method="PUT", path="/metrics/")),
    Kind("the bucket fails writes of states", 0, failing_write(method="PUT", path="/states/")),
    Kind("the bucket fails writes of records", 0, failing_write(method="PUT", path="/records/")),
    Kind("the bucket fails writes of rows", 0, failing_write(method="PUT", path="/metrics/")),
    Kind("the bucket fails reads of the state to go on from", 0, failing_read(method="GET", path="/states/")),
    Kind("the bucket fails reads of records", 0, failing_read(method="GET|HEAD", path="/records/")),
]
