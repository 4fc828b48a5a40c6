"""Change the weights of a run's sources, and record the changes in its logs and checkpoints.

    mixing = Mixing(loader, config)
    mixing.base_id                    # id of the order without any change: what a checkpoint belongs to
    mixing.meta(step)                 # the changes so far, and the id of the resulting order
    mixing.check(meta)                # of the checkpoint to resume from

A checkpoint holds every change that has begun, as a segment of the order (mixture.py). Those are fixed; later
ones can change.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from r1hpc.config.schema.run import RunConfig
from r1hpc.data.read.mixture import Change, Mixture
from r1hpc.data.read.sampler import DocumentMixture, WindowMixture
from r1hpc.train.loop.session import Session
from r1hpc.train.parallel.errors import ResumeError


class Loader(Protocol):
    """Interface of a loader that gives a rank its batches by a plan."""

    plan: Any

    def order_id(self, plan: Any) -> str: ...


class Mixing:
    """The mixture of one run, the same on every rank. Without a mixture it does nothing."""

    def __init__(self, loader: Loader, config: RunConfig) -> None:
        self._loader = loader
        self._batch = config.train.global_batch_size
        is_mixed = isinstance(loader.plan, WindowMixture | DocumentMixture)
        self._mixture: Mixture | None = loader.plan.mixture if is_mixed else None

    @property
    def base_id(self) -> str:
        """Return the id of the order before any weight has changed."""
        return self._order_id(())

    def facts(self, step: int) -> dict[str, Any]:
        """Return the weight of each source in `step`, for train.jsonl."""
        return self._weights(step, "mix_") if self._changes else {}

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
        held = self._drawn_from(step)
        return {"mix": {"changes": _plain(held), "order_id": self._order_id(held)}} if held else {}

    def check(self, meta: dict[str, Any]) -> None:
        """Compare the changes of a checkpoint with the schedule.

        Raises:
            ResumeError: they differ before its step.
        """
        step, saved = int(meta["global_step"]), meta.get("mix", {"changes": [], "order_id": self.base_id})
        held = self._drawn_from(step)
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
