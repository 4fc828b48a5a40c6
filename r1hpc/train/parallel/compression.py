"""Average gradients over the ranks in fewer bytes, and count the bytes: train.gradient_compression.

int8      a block of 256 values becomes 8-bit integers and a scale, twice: on the way to the rank that sums
          a part of the gradient, and back.
powersgd  a matrix (rows, cols) becomes two of `rank` columns (Vogels et al., arXiv 1905.13727); vectors stay.

Both keep the compression error and add it to the next step's gradient: fp32, as large as the model, on each
rank, by parameter name. The mean of the ranks' errors is what the weights lack so far. DeepSpeed 0.19.8 calls
us where it would all-reduce without ZeRO, once a step (engine.buffered_allreduce_fallback); clipping and the
optimizer's step follow as usual. Without compression the bytes are counted too; under ZeRO DeepSpeed
averages, and nothing is counted.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1hpc.config.schema.run import TrainConfig
from r1hpc.train.parallel.distributed import Group, portions

PREFIX = "compression_rank_"
_BLOCK = 256
"""Values that share a scale."""
_BUCKET = 1 << 25
"""Values exchanged together; a larger tensor goes alone. The memory held besides is as large."""
Tensors = dict[str, torch.Tensor]


def compression_name(rank: int) -> str:
    return f"{PREFIX}{rank}.pt"


def exchange_of(train: TrainConfig, engine: Any, group: Group) -> "GradientExchange | None":
    """Return the object that averages an engine's gradients; None under ZeRO, where DeepSpeed does it."""
    if engine.zero_optimization_stage() > 0:
        return None
    if train.gradient_compression == "none":
        return Whole(engine, group)
    named = engine.module.named_parameters()
    parameters = {name: p for name, p in named if p.requires_grad and p.numel()}
    if train.gradient_compression == "int8":
        return Int8(engine, group, parameters)
    return PowerSgd(engine, group, parameters, train.compression_rank, train.seed)


class GradientExchange:
    """Averages the gradients and counts the bytes this rank sends for it.

    Counts the tensors that go into collectives, as the algorithms with the fewest bytes send them: an
    all-reduce of B bytes over n ranks 2 (n - 1) / n x B from each, an exchange of parts (n - 1) / n x B, a
    gathering (n - 1) x its part. What a network adds is not counted.
    """

    def __init__(self, engine: Any, group: Group) -> None:
        self._engine, self._group = engine, group
        self._bytes = 0

    def take_bytes(self) -> int:
        """Return the bytes this rank sent for gradients since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken

    def _count(self, times: int, num_bytes: int) -> None:
        """Add (n - 1) / n of the bytes, `times` times."""
        world_size = self._group.world_size
        self._bytes += times * (world_size - 1) * num_bytes // world_size


class Whole(GradientExchange):
    """DeepSpeed's own all-reduce."""

    def __init__(self, engine: Any, group: Group) -> None:
        super().__init__(engine, group)
        self._reduce_bucket = engine.allreduce_bucket
        engine.allreduce_bucket = self._counted

    def _counted(self, bucket: list[torch.Tensor], *more: Any, **named: Any) -> Any:
        width = self._engine.communication_data_type.itemsize
        self._count(2, width * sum(tensor.numel() for tensor in bucket))
        return self._reduce_bucket(bucket, *more, **named)


class Compressor(GradientExchange, ABC):
    """Shared by int8 and PowerSGD: the errors, their place in a checkpoint, the collectives."""

    def __init__(self, engine: Any, group: Group, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__(engine, group)
        self._parameters = parameters
        self.errors: Tensors = {}
        """By parameter, in its shape: what the mean over the ranks lacks so far, fp32."""
        self.factors: Tensors = {}
        """By parameter: the start of the next step, the same on every rank."""
        engine.buffered_allreduce_fallback = self._reduce

    def state(self) -> dict[str, Any]:
        """Return this rank's tensors for a checkpoint."""
        return {"errors": self.errors, "factors": self.factors}

    @torch.no_grad()
    def load(self, folder: Path, world_size: int) -> None:
        """Load the state that `world_size` ranks saved in a folder.

        The same number of ranks get their own states back. Otherwise a rank takes the errors of several ranks
        at regular distance, scaled so that the mean over the ranks is unchanged: no gradient is lost or
        counted twice.
        """
        ours, rank = self._group.world_size, self._group.rank
        for error in self.errors.values():
            error.zero_()
        for number in range(rank, world_size, ours):
            saved = _read(folder / compression_name(number))
            for name, error in self.errors.items():
                error.add_(saved["errors"][name].to(error.device), alpha=ours / world_size)
        if self.factors:
            saved = _read(folder / compression_name(0))
            for name, factor in self.factors.items():
                factor.copy_(saved["factors"][name])
        if ours != world_size and rank == 0:
            print(
                f"gradient compression: the errors of {world_size} rank(s) are divided among {ours}, "
                "their mean as it was",
                flush=True,
            )

    @abstractmethod
    def reduce(self, gradients: Tensors) -> None:
        """Replace each gradient by its mean over the ranks, as far as the compression can send it."""

    @torch.no_grad()
    def _reduce(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Called by DeepSpeed, which leaves both arguments at their defaults."""
        for parameter in self._parameters.values():
            if parameter.grad is None:  # unused by this rank's micro batches, maybe used by others'
                parameter.grad = torch.zeros_like(parameter)
        self.reduce({name: p.grad for name, p in self._parameters.items() if p.grad is not None})

    def _mean(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        if not tensors:
            return []
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        self._count(2, flat.nbytes)
        flat.div_(self._group.world_size)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class Int8(Compressor):
    """Blocks of integers, added up in parts: rank r gets part r of every rank, and returns their mean to all.

    The mean is rounded again. The rank that rounds adds that loss to its errors, times the number of ranks,
    since errors are averaged. Each rank sends the same bytes, however many there are.
    """

    def __init__(self, engine: Any, group: Group, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__(engine, group, parameters)
        self._buckets: list[tuple[list[str], torch.Tensor]] = []
        """Names, and their errors in one row that divides into blocks for each rank."""
        unit = _BLOCK * group.world_size
        for names in portions(parameters, lambda name: parameters[name].numel(), _BUCKET):
            sizes = [parameters[name].numel() for name in names]
            row = torch.zeros(-(-sum(sizes) // unit) * unit, device=group.device)
            for name, part in zip(names, torch.split(row[: sum(sizes)], sizes), strict=True):
                self.errors[name] = part.view(parameters[name].shape)
            self._buckets.append((names, row))

    def reduce(self, gradients: Tensors) -> None:
        world_size, rank = self._group.world_size, self._group.rank
        for names, row in self._buckets:
            for name in names:
                self.errors[name].add_(gradients[name])
            packed = _packed(row.view(world_size, -1))
            row.sub_(_unpacked(packed).view(-1))
            received = torch.empty_like(packed)  # row r is rank r's row for this rank
            dist.all_to_all_single(received, packed)
            self._count(1, packed.nbytes)
            mean = _unpacked(received).sum(0).div_(world_size)
            packed = _packed(mean.view(1, -1))
            row.view(world_size, -1)[rank].add_(mean.sub_(_unpacked(packed)[0]), alpha=world_size)
            gathered = packed.new_empty(world_size, packed.numel())  # every rank's part
            dist.all_gather(list(gathered.unbind()), packed.view(-1))
            self._count(1, gathered.nbytes)
            result = _unpacked(gathered).view(-1)
            for name in names:
                part = result[: gradients[name].numel()]
                gradients[name].copy_(part.view(gradients[name].shape))
                result = result[part.numel() :]


class PowerSgd(Compressor):
    """Matrices M as P Q^T, by one step of the power iteration, which continues from the last step's Q."""

    def __init__(
        self, engine: Any, group: Group, parameters: Mapping[str, torch.nn.Parameter], rank: int, seed: int
    ) -> None:
        super().__init__(engine, group, parameters)
        for name, parameter in parameters.items():
            rows, cols = parameter.shape[0], parameter[0].numel()
            width = min(rank, rows, cols)
            if parameter.dim() > 1 and width * (rows + cols) < rows * cols:
                self.errors[name] = torch.zeros(parameter.shape, device=group.device)
                # The same on every rank and in every attempt.
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                draws = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                self.factors[name] = torch.randn(cols, width, generator=draws).to(group.device)

    def reduce(self, gradients: Tensors) -> None:
        whole = [name for name in gradients if name not in self.factors]
        errors = {name: self.errors[name].flatten(1) for name in self.factors}
        for name in errors:
            self.errors[name].add_(gradients[name])
        lefts = [errors[name] @ factor for name, factor in self.factors.items()]
        means = self._mean([*lefts, *(gradients[name] for name in whole)])
        for name, mean in zip(whole, means[len(lefts) :], strict=True):
            gradients[name].copy_(mean)
        # From the mean, so the same on every rank. Unlike Gram-Schmidt, QR gives a basis of any matrix.
        bases = [torch.linalg.qr(left).Q for left in means[: len(lefts)]]
        rights = [error.T @ basis for error, basis in zip(errors.values(), bases, strict=True)]
        for error, basis, right in zip(errors.values(), bases, rights, strict=True):
            error.sub_(basis @ right.T)
        for name, basis, mean in zip(errors, bases, self._mean(rights), strict=True):
            gradients[name].copy_((basis @ mean.T).view(gradients[name].shape))
            self.factors[name].copy_(mean)


def _packed(rows: torch.Tensor) -> torch.Tensor:
    """Pack each row as bytes: integers, then the fp32 scales of its blocks. Non-finite values become NaN."""
    blocks = rows.view(rows.shape[0], -1, _BLOCK)
    scales = blocks.abs().amax(-1) / 127
    safe = torch.where(scales > 0, scales, 1.0)
    integers = (blocks / safe[..., None]).round_().nan_to_num_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([integers.flatten(1).view(torch.uint8), scales.view(torch.uint8)], dim=1)


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Return the rows that `_packed` packed, fp32."""
    num_blocks = packed.shape[1] // (_BLOCK + 4)
    integers = packed[:, : num_blocks * _BLOCK].view(torch.int8)
    scales = packed[:, num_blocks * _BLOCK :].contiguous().view(torch.float32)
    blocks = integers.reshape(packed.shape[0], num_blocks, _BLOCK).float()
    return blocks.mul_(scales[..., None]).flatten(1)


def _read(path: Path) -> dict[str, Tensors]:
    saved: dict[str, Tensors] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return saved
