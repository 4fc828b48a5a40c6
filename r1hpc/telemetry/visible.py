"""Which of a node's GPUs CUDA_VISIBLE_DEVICES names, by UUID.

>>> select_visible(["GPU-aa", "GPU-bb"], "1")
(('GPU-bb',), None)
>>> select_visible(["GPU-aa", "GPU-bb"], "GPU-a,9")
(('GPU-aa',), "CUDA_VISIBLE_DEVICES names '9', which is no GPU here; CUDA ignores it and what follows")
"""

from collections.abc import Sequence

from r1hpc.base.names import printable


def select_visible(uuids: Sequence[str], visible: str | None) -> tuple[tuple[str, ...], str | None]:
    """The UUIDs of the GPUs a job sees, in CUDA's order, and what is odd about the list, if anything.

    Entries are indices, UUIDs or unique beginnings of UUIDs; MIG entries are passed on as they are. As in
    CUDA (programming guide, "CUDA environment variables") the list ends at the first entry that names no
    GPU. None (not set) selects all.

    Doubt: an index is taken as a position in NVML's order of the GPUs this process may open. Under Slurm's
    ConstrainDevices both orders count inside the cgroup, and equal GPUs are in PCI order in both. On a node
    of mixed models CUDA counts the fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID; give UUIDs there.
    """
    if visible is None:
        return tuple(uuids), None
    chosen: list[str] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        uuid = _find(uuids, entry)
        if uuid is None:
            return tuple(chosen), (
                f"CUDA_VISIBLE_DEVICES names {printable(entry)!r}, which is no GPU here; "
                "CUDA ignores it and what follows"
            )
        if uuid not in chosen:
            chosen.append(uuid)
    return tuple(chosen), None


def _find(uuids: Sequence[str], entry: str) -> str | None:
    if entry.startswith("MIG-"):
        return entry
    if entry.isascii() and entry.isdigit():
        return uuids[int(entry)] if int(entry) < len(uuids) else None
    found = [uuid for uuid in uuids if uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None
