"""Whether a job has room where it will run: GPUs, memory and disks, judged. Pure functions of their arguments."""

from collections import Counter
from collections.abc import Mapping

from vaejob.cluster.doctor.findings import Finding
from vaejob.cluster.doctor.results import Disk, Gpu, Host, StepMemory
from vaejob.cluster.doctor.words import counted, size_of, who

FULL_SHARE = 0.85
"""Of free memory: beyond it, what no estimate counts may be too much."""
SHARED_MEMORY_BYTES = 1 << 30
"""What NCCL's documentation asks for in containers (--shm-size=1g), whose own default is 64 MB."""
FULL_DISK_SHARE = 0.05
"""Ray puts nothing more on a disk of which less is free (local_fs_capacity_threshold)."""
LEAST_DISK_BYTES = 1 << 30
"""For logs and what passes through."""


def of_gpus(gpus: Mapping[str, Gpu | None], *, asked: int) -> list[Finding]:
    """Whether each worker sees the GPU it asked for. Empty where none was asked for."""
    if not asked:
        return []
    if without := [name for name, gpu in gpus.items() if gpu is None]:
        found = f"{who(without, of=len(gpus))} asked for a GPU and torch sees none"
        advice = "see nvidia-smi there, the driver's version, and that torch is a CUDA build"
        return [Finding("fail", "GPUs", found, advice)]
    there = [gpu for gpu in gpus.values() if gpu is not None]
    kinds = sorted({f"{gpu.name} ({size_of(gpu.size)})" for gpu in there})
    least = f"at least {size_of(min(gpu.free for gpu in there))} free"
    if len(kinds) > 1:
        found = f"the workers have {', '.join(kinds)}; {least}: each step waits for the slowest"
        return [Finding("warn", "GPUs", found, "place the job on nodes of one kind")]
    return [Finding("ok", "GPUs", f"{counted(len(there), 'GPU')}, one for each worker: {kinds[0]}, {least}")]


def of_memory(memory: StepMemory, *, images: int, resident: int, free: int, where: str) -> Finding:
    """Whether a rank's batch will fit, by an estimate.

    images: that a rank takes at once. resident: bytes of training images that stay there. free: bytes for one worker.
    """
    need = memory.of_batch(images) + resident
    found = (
        f"about {size_of(need)} for {counted(images, 'image')} at once, {size_of(free)} free {where}: weights "
        f"{size_of(memory.weights)}, gradients {size_of(memory.gradients)}, moments {size_of(memory.moments)}, "
        f"averaged {size_of(memory.averaged)}, kept for the backward pass "
        f"{size_of(memory.fixed + memory.per_image * images)}, resident images {size_of(resident)}; not counted: what the kernels use in passing, "
        "fragments, the CUDA context, torch.compile's changes, the held-out pass"
    )
    if need <= FULL_SHARE * free:
        return Finding("ok", "memory", found)
    advice = "set a smaller training.micro_batch, more workers, or a smaller model; --measure tries what fits"
    if resident:
        advice = f"set data.resident_bytes=0, which streams each epoch, or {advice.removeprefix('set ')}"
    return Finding("fail" if need > free else "warn", "memory", found, advice)


def of_host_memory(*, reader: int, state: int, free: int) -> Finding:
    """Of what each worker keeps in the machine's memory besides the step. free: bytes for one worker."""
    need = reader + state
    found = (
        f"{size_of(need)} of the machine for each worker, {size_of(free)} free: row groups and batches ahead of the step at "
        f"most {size_of(reader)}, a copy of its part of the state while it is saved {size_of(state)}"
    )
    if need <= FULL_SHARE * free:
        return Finding("ok", "host memory", found)
    advice = "set a smaller data.window_rows, data.lanes or data.prefetch_batches, or take nodes with more memory"
    return Finding("fail" if need > free else "warn", "host memory", found, advice)


def of_disks(hosts: Mapping[str, Host], *, data: int, cache_bytes: int, on_gpus: bool) -> list[Finding]:
    """Of the disks below the temporary folder and data.cache_dir, and of /dev/shm, on the machines of the workers.

    data: bytes of the training set, of which each machine's cache keeps up to cache_bytes.
    """
    findings = [_of_shared_memory(hosts, on_gpus=on_gpus), _of_temporary(hosts)]
    caches = {name: host.cache for name, host in hosts.items() if host.cache is not None}
    return findings + ([_of_caches(caches, need=min(data, cache_bytes))] if caches else [])


def _of_shared_memory(hosts: Mapping[str, Host], *, on_gpus: bool) -> Finding:
    on_node = Counter(host.node for host in hosts.values())
    shared = {name: host.shared_memory for name, host in hosts.items() if host.shared_memory is not None}
    if not shared:
        return Finding("ok", "/dev/shm", "there is none here, and nothing of this job needs it")
    least = min(shared.values())
    found = f"{size_of(least)} free{' at least' if len(shared) > 1 else ''}"
    little = [name for name, free in shared.items() if free < SHARED_MEMORY_BYTES and on_node[hosts[name].node] > 1]
    if on_gpus and little:
        found += f"; NCCL needs about 1 GB where several workers share a node ({who(little, of=len(hosts))})"
        return Finding(
            "warn", "/dev/shm", found, "start the containers with --shm-size=1g or more, or an emptyDir of memory"
        )
    return Finding("ok", "/dev/shm", found)


def _of_temporary(hosts: Mapping[str, Host]) -> Finding:
    disks = {name: host.temporary for name, host in hosts.items()}
    if unwritable := {name: disk for name, disk in disks.items() if disk.error}:
        name, disk = next(iter(unwritable.items()))
        found = f"{disk.folder} of {who(list(unwritable), of=len(disks))} cannot be written: {disk.error}"
        return Finding("fail", "disk", found, "set TMPDIR there to a folder with room")
    name, worst = min(disks.items(), key=lambda item: item[1].free)
    found = f"{size_of(worst.free)} of {size_of(worst.size)} free in {worst.folder}"
    if worst.free < max(LEAST_DISK_BYTES, FULL_DISK_SHARE * worst.size):
        advice = "free some, or point TMPDIR and Ray's --temp-dir at a larger disk"
        return Finding("warn", "disk", f"{found} of {name}; Ray needs 5% and 1 GB", advice)
    return Finding("ok", "disk", f"{found}{' at least' if len(disks) > 1 else ''}")


def _of_caches(caches: Mapping[str, Disk], *, need: int) -> Finding:
    if unwritable := {name: disk for name, disk in caches.items() if disk.error}:
        disk = next(iter(unwritable.values()))
        found = f"{disk.folder} of {who(list(unwritable), of=len(caches))} cannot be written: {disk.error}"
        return Finding(
            "fail", "cache", found, "set data.cache_dir to a folder on each node's own disk, or leave it out"
        )
    name, worst = min(caches.items(), key=lambda item: item[1].free + item[1].held)
    room = worst.free + worst.held
    found = f"{size_of(room)} for data.cache_dir in {worst.folder} of {name}, which is to hold {size_of(need)}"
    if room < need:
        advice = "take a larger disk; what it does not hold is fetched again in each epoch"
        return Finding("warn", "cache", found, advice)
    return Finding("ok", "cache", found)
