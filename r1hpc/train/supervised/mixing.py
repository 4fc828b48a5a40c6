"""Change the weights of a run's sources, and record the changes in its logs and checkpoints.

    mixing = Mixing(loader, config)
    mixing.base_id                    # id of the order without any change: what a checkpoint belongs to
    mixing.after_step(step, sums)     # online: appends a change if one is due
    mixing.meta(step)                 # the changes so far, and the id of the resulting order
    mixing.read(meta)                 # of the checkpoint to resume from

A checkpoint holds every change that has begun, as a segment of the order (mixture.py). Those are fixed; later
ones can change. A schedule's segments are known from the start. Online mixing appends its segments after a
step whose state is saved, so one checkpoint holds the losses they follow from, and the segments those losses
follow from.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.config.schema.run import RunConfig
from r1hpc.data.read.mixture import Change, Mixture, OnlineWeights
from r1hpc.data.read.sampler import DocumentMixture, WindowMixture
from r1hpc.train.loop.session import Session
from r1hpc.train.parallel.errors import ResumeError

Ints = npt.NDArray[np.int64]


class Loader(Protocol):
    """Interface of a loader that gives a rank its batches by a plan."""

    plan: Any

    def follow(self, plan: Any) -> None: ...

    def order_id(self, plan: Any) -> str: ...


class Mixing:
    """The mixture of one run, the same on every rank. Without a mixture it does nothing."""

    def __init__(self, loader: Loader, config: RunConfig) -> None:
        self._loader = loader
        self._batch = config.train.global_batch_size
        self._every = config.data.mix.every
        is_mixed = isinstance(loader.plan, WindowMixture | DocumentMixture)
        self._mixture: Mixture | None = loader.plan.mixture if is_mixed else None
        self._online: OnlineWeights | None = None
        if self._mixture is not None and config.data.mix.is_online:
            self._online = OnlineWeights(self._mixture.weights, config.data.mix.smoothing)
        self._seen: list[tuple[torch.Tensor, Ints]] = []

    @property
    def base_id(self) -> str:
        """Return the id of the order before any weight has changed."""
        return self._order_id(())

    @property
    def wants_losses(self) -> bool:
        """True if `see` needs every loss of a step."""
        return self._online is not None

    def see(self, losses: torch.Tensor, samples: Ints) -> None:
        """Add this rank's loss of some tokens, and the sample of each; both (num_tokens,)."""
        self._seen.append((losses.detach(), samples))

    def sums(self) -> list[float]:
        """Return the step's loss by source, then tokens by source, to add up over the ranks."""
        if self._online is None:
            return []
        assert self._mixture is not None, "what is online is mixed"
        count = len(self._mixture.sizes)
        losses, tokens = np.zeros(count), np.zeros(count)
        for values, samples in self._seen:
            each, place = np.unique(samples, return_inverse=True)
            sources = self._mixture.locate(each)[0][place]
            losses += np.bincount(sources, values.double().cpu().numpy(), count)
            tokens += np.bincount(sources, minlength=count)
        self._seen = []
        return [*losses.tolist(), *tokens.tolist()]

    def after_step(self, step: int, sums: Sequence[float]) -> dict[str, Any]:
        """Change the weights if that is due after `step`; `sums` are those of all ranks.

        Returns for train.jsonl the weight of each source, and online its loss.
        """
        facts: dict[str, Any] = {}
        if self._changes or self._online is not None:
            facts |= self._weights(step, "mix_")
        if self._online is None:
            return facts
        losses, tokens = sums[: len(self._names)], sums[len(self._names) :]
        self._online.observe(losses, tokens)
        for name, loss, num in zip(self._names, losses, tokens, strict=True):
            facts[f"loss_{name}"] = loss / num if num else None
        if step % self._every == 0:
            self._follow([*self._changes, Change(step * self._batch, self._online.turn())])
        return facts

    def announce(self, session: Session, step: int) -> None:
        """Record an event on rank 0 if other weights begin after `step`."""
        if not any(change.first_sample == step * self._batch for change in self._changes):
            return
        weights, order_id = self._weights(step + 1), self._order_id(self._drawn_from(step + 1))
        session.metrics.event("mix", global_step=step, from_step=step + 1, weights=weights, order_id=order_id)
        said = ", ".join(f"{name} {weight:.1%}" for name, weight in weights.items())
        print(f"from step {step + 1} on: {said}", flush=True)

    def meta(self, step: int) -> dict[str, Any]:
        """Return the manifest entry of a checkpoint after `step`; empty if no weight has changed by then."""
        if self._online is not None:
            held: Sequence[Change] = self._changes
            more = {"online": self._online.state()}
        else:
            held, more = self._drawn_from(step), {}
        if not held and not more:
            return {}
        return {"mix": {"changes": _plain(held), "order_id": self._order_id(held), **more}}

    def read(self, meta: dict[str, Any]) -> None:
        """Load the changes of a checkpoint, or compare a schedule with them.

        Raises:
            ResumeError: they differ before its step.
        """
        step, saved = int(meta["global_step"]), meta.get("mix", {"changes": [], "order_id": self.base_id})
        if self._online is not None:
            if "online" not in saved:
                raise ResumeError(
                    "the checkpoint was trained without data.mix.online: go back to data.mix.online=none, or "
                    "start a run of another name"
                )
            self._follow([Change(first, tuple(weights)) for first, weights in saved["changes"]])
            self._online.restore(saved["online"])
        held = self._changes if self._online is not None else self._drawn_from(step)
        if saved["changes"] != _plain(held) or saved["order_id"] != self._order_id(held):
            raise ResumeError(
                f"the checkpoint was trained up to step {step} with "
                f"{self._in_words(saved['changes']) or 'no change of weights'}, and data.mix.schedule says "
                f"otherwise: only what begins at from_step {step + 1} or later can be changed"
            )

    @property
    def _changes(self) -> tuple[Change, ...]:
        return self._mixture.changes if self._mixture is not None else ()

    @property
    def _names(self) -> tuple[str, ...]:
        return self._mixture.names if self._mixture is not None else ()

    def _follow(self, changes: Sequence[Change]) -> None:
        plan = self._loader.plan.with_changes(changes)
        self._loader.follow(plan)
        self._mixture = plan.mixture

    def _weights(self, step: int, prefix: str = "") -> dict[str, float]:
        """Return the weight of each source in `step`."""
        assert self._mixture is not None, "only a mixture has weights"
        weights = self._mixture.weights_of(step - 1)
        return {f"{prefix}{name}": weight for name, weight in zip(self._names, weights, strict=True)}

    def _drawn_from(self, step: int) -> list[Change]:
        """Return the changes that `step` or an earlier one was drawn from."""
        return [change for change in self._changes if change.first_sample < step * self._batch]

    def _order_id(self, changes: Sequence[Change]) -> str:
        plan = self._loader.plan
        return self._loader.order_id(plan if self._mixture is None else plan.with_changes(changes))

    def _in_words(self, changes: Sequence[tuple[int, Sequence[float]]]) -> str:
        return "; ".join(
            f"from step {first // self._batch + 1} on "
            + ", ".join(f"{name} {weight:.4g}" for name, weight in zip(self._names, weights, strict=False))
            for first, weights in changes
        )


def _plain(changes: Sequence[Change]) -> list[Any]:
    """Return the changes as JSON stores and returns them."""
    return [[change.first_sample, list(change.weights)] for change in changes]
