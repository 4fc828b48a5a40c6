"""Keep what the objects of a training hold: random generators, objects with a state, plain values.

    holdings = Holdings({"callback EMA": ema, **script_globals()}, library_saves=[model, optimizer])
    saved = holdings.changed()       # of all that changed since the line above, for torch.save
    holdings.restore(saved)          # in the next attempt, after the same first line

Values are found through attributes, containers, closures, and the globals of the script. What cannot be kept
is named in `not_kept`. The objects themselves are never pickled.
"""

import functools
import os
import pickle
import random
import sys
import sysconfig
import types
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import xxhash

Path = tuple[Any, ...]
"""Name of the root, then attributes, keys and indices."""
_LEAVES = (bool, int, float, complex, str, bytes, torch.Tensor, np.ndarray, np.generic, torch.dtype)
_SIMPLE = (bool, int, float, str)
_DEEPEST = 5
_MOST_LEAVES, _MOST_BYTES = 200_000, 2**31
_MOST_MEMBERS = 1000
_SAMPLED = 4096
"""Elements of a weight that tell whether it changed; its version is compared too."""
_KEEP_THEMSELVES = ("transformers", "trl", "lightning", "pytorch_lightning", "accelerate", "peft", "torch")
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module())) | {"_trainer", "_fabric"}
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class TooLargeError(Exception):
    """A value that is too large to be kept beside a checkpoint."""


class Holdings:
    """The state of some objects. Paths are the same in every attempt."""

    def __init__(
        self,
        roots: dict[str, Any],
        library_saves: Iterable[Any] = (),
        without: Container[Path] = (),
        always: Container[Path] = (),
    ) -> None:
        """Look at the roots, by name.

        Args:
            library_saves: objects whose `state_dict` is in the library's own checkpoint.
            without: paths that are not kept.
            always: paths that are kept even if they did not change.
        """
        self._roots, self._without = roots, without
        self._saved_by_library = {id(each) for each in library_saves}
        self.not_kept: set[str] = set()
        """Texts for people."""
        self._too_large: dict[Path, tuple[int, int]] = {}
        self._digests = {path: _digest(value) for path, value in self._values() if path not in always}
        self._first: dict[Path, tuple[str, Any]] = {}
        self.look()
        self._first = self.glance()

    def changed(self, copies: bool = False) -> dict[Path, tuple[str, Any]]:
        """Return path -> (kind, content) of what is not as at the begin; with `copies` of all that may change
        in place later."""
        found = {path: value for path, value in self._values() if _digest(value) != self._digests.get(path)}
        return _copied(found) if copies else found

    def look(self) -> None:
        """Find the objects whose generators and numbers `glance` reads."""
        self._owned = list(self._owners())

    def glance(self) -> dict[Path, tuple[str, Any]]:
        """Return generators, and the numbers and texts that changed, of the objects found by `look`."""
        found: dict[Path, tuple[str, Any]] = {}
        for path, owner in self._owned:
            for name, value in _members(owner):
                generator = generator_state(value)
                is_number = isinstance(value, _SIMPLE) and not _is_pid(name, value)
                if generator is not None:
                    found[*path, name] = generator
                elif is_number and self._first.get((*path, name)) != ("plain", value):
                    found[*path, name] = "plain", value
        return found

    def restore(self, saved: dict[Path, tuple[str, Any]]) -> None:
        """Put back what `changed` returned; name what has no place any more."""
        owners = dict(self._owners())
        for path, (kind, content) in saved.items():
            owner = owners.get(path[:-1])
            try:
                if owner is None:
                    raise LookupError
                _put(owner, path[-1], kind, content)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                self.not_kept.add(f"{_text(path)} (cannot be restored: {error or 'its object is missing'})")

    def _values(self) -> Iterator[tuple[Path, tuple[str, Any]]]:
        self._covered = set(self._saved_by_library)
        for path, owner in self._owners():
            for name, value in _members(owner):
                here = (*path, name)
                if str(name).endswith("dataset") and isinstance(value, dict | list | tuple | torch.Tensor):
                    continue  # data, not a state
                is_known = here in self._too_large and self._too_large[here] == _size(value)
                if is_known or here in self._without:
                    continue
                try:
                    content = ("pid", None) if _is_pid(name, value) else self._content(value)
                except TooLargeError:
                    if here in self._too_large:  # it grew since
                        self.not_kept.add(f"{_text(here)} (too large)")
                    self._too_large[here] = _size(value)
                    continue
                if content is not None:
                    yield here, content
                elif _is_running(value) and not _is_of_library(owner):
                    self.not_kept.add(f"{_text(here)} (a {type(value).__name__})")

    def _content(self, value: Any) -> tuple[str, Any] | None:
        """Return the kind and the content; None if the value itself cannot be kept."""
        if value is None or type(value) in _SIMPLE:  # most are
            return "plain", value
        generator = generator_state(value)
        if generator is not None:
            return generator
        if _has_state(value):
            if id(value) in self._covered:
                return None
            parts = value.modules() if isinstance(value, torch.nn.Module) else [value]
            self._covered |= {id(part) for part in parts}
            with suppress(Exception):  # another's code
                return "state", value.state_dict()
            return None
        try:
            return "plain", plain(value)
        except TypeError:
            return None

    def _owners(self) -> Iterator[tuple[Path, Any]]:
        """Yield (path, object) of each object whose members are looked at, the nearest first."""
        waiting: deque[tuple[Path, Any]] = deque(((name,), root) for name, root in self._roots.items())
        seen = set[int]()
        while waiting:
            path, owner = waiting.popleft()
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            yield path, owner
            waiting += [
                ((*path, name), value)
                for name, value in _members(owner)
                if len(path) <= _DEEPEST and (isinstance(value, torch.nn.Module) or _is_own(value))
            ]


def script_globals() -> dict[str, Any]:
    """Return the script and its own modules by name: their globals are roots."""
    modules = {name: module for name, module in list(sys.modules.items()) if _is_script(name, module)}
    return {f"global of {name}": module for name, module in sorted(modules.items())}


def keeps_itself(value: Any) -> bool:
    """True for a library's own callback: its state is in the library's checkpoint."""
    return str(type(value).__module__).partition(".")[0] in _KEEP_THEMSELVES


def generator_state(value: Any) -> tuple[str, Any] | None:
    """Return the kind and state of a random generator; None for anything else."""
    if isinstance(value, np.random.Generator):
        return "numpy", value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return "numpy_old", value.get_state(legacy=False)
    if isinstance(value, torch.Generator):
        return "torch", (str(value.device), value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return "python", value.getstate()
    return None


def plain(value: Any) -> Any:
    """Return numbers, text, arrays, tensors, and containers of them. Raise TypeError for anything else.

    Raise TooLargeError above two GiB or 200,000 values.
    """
    left = [_MOST_LEAVES, _MOST_BYTES]

    def of(value: Any) -> Any:
        left[0] -= 1
        if value is None or isinstance(value, _LEAVES):
            left[1] -= getattr(value, "nbytes", 0)
            if isinstance(value, np.ndarray) and value.dtype.hasobject:
                raise TypeError("array of objects")
            return value
        if min(left) < 0:
            raise TooLargeError
        if not _is_builtin(value):
            raise TypeError(type(value).__name__)
        if isinstance(value, dict):
            return {key: of(each) for key, each in value.items()}
        if isinstance(value, list | deque | set):
            return [of(each) for each in value]
        if type(value) is tuple:
            return tuple(of(each) for each in value)
        raise TypeError(type(value).__name__)

    found = of(value)
    if min(left) < 0:
        raise TooLargeError
    return found


def filled(into: Any, saved: Any) -> Any:
    """Return the saved value. Containers and tensors are filled in place: others may hold them too."""
    if isinstance(into, dict) and isinstance(saved, dict):
        for key in into.keys() - saved.keys():
            del into[key]
        for key, value in saved.items():
            has = key in into or (isinstance(into, defaultdict) and into.default_factory)
            into[key] = filled(into[key] if has else None, value)
        return into
    if isinstance(into, list | deque | set):
        into.clear()
        (into.update if isinstance(into, set) else into.extend)(saved)
        return into
    if isinstance(into, torch.Tensor) and isinstance(saved, torch.Tensor):
        if (into.shape, into.dtype) != (saved.shape, saved.dtype):
            return saved.to(into.device)
        into.data.copy_(saved)
        return into
    are_arrays = isinstance(into, np.ndarray) and isinstance(saved, np.ndarray) and into.flags.writeable
    if are_arrays and (into.shape, into.dtype) == (saved.shape, saved.dtype):
        into[...] = saved
        return into
    return saved


def _put(owner: Any, name: Any, kind: str, content: Any) -> None:
    now = dict(_members(owner)).get(name)
    if kind == "state":
        now.load_state_dict(content)  # type: ignore[union-attr]
        return
    if kind == "pid":
        fresh: Any = os.getpid()
    elif kind == "plain":
        fresh = filled(now, content)
    else:
        fresh = _generator(now, kind, content)
    if fresh is not now:
        _setter(owner)(name, fresh)


def _setter(owner: Any) -> Callable[[Any, Any], None]:
    if isinstance(owner, MutableMapping | list):
        return owner.__setitem__
    if isinstance(owner, types.FunctionType):
        cells = dict(zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True))
        return lambda name, value: setattr(cells[name], "cell_contents", value)
    return functools.partial(setattr, owner)


def _generator(now: Any, kind: str, state: Any) -> Any:
    """Set the state of a generator, or of a new one where there is none yet."""
    if kind == "torch":
        now = now if isinstance(now, torch.Generator) else torch.Generator(state[0])
        now.set_state(state[1].cpu())
    elif kind == "python":
        now = now if isinstance(now, random.Random) else random.Random()
        now.setstate(state)
    elif kind == "numpy_old":
        now = now if isinstance(now, np.random.RandomState) else np.random.RandomState()
        now.set_state(state)
    else:
        if not isinstance(now, np.random.Generator):
            now = np.random.Generator(getattr(np.random, state["bit_generator"])())
        now.bit_generator.state = state
    return now


def _members(owner: Any) -> list[tuple[Any, Any]]:
    """Return the names and values that an object holds."""
    if isinstance(owner, dict) and _is_builtin(owner):
        found = [(key, value) for key, value in owner.items() if isinstance(key, str | int)]
        return found if len(found) <= _MOST_MEMBERS else []
    if isinstance(owner, list | tuple | deque):
        return list(enumerate(owner)) if len(owner) <= _MOST_MEMBERS else []
    if isinstance(owner, functools.partial):
        return [("args", owner.args), ("keywords", owner.keywords)]
    if isinstance(owner, types.MethodType):
        return [("__self__", owner.__self__)]
    if isinstance(owner, types.FunctionType):
        cells = zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True)
        return [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]
    values = dict(getattr(owner, "__dict__", {}))
    if isinstance(owner, torch.nn.Module):
        hidden = {name: owner._buffers.get(name) for name in owner._non_persistent_buffers_set}
        own = {name: value for name, value in values.items() if name not in _OF_EVERY_MODULE}
        return [*own.items(), *hidden.items(), *owner._modules.items()]
    return [(name, value) for name, value in values.items() if not name.startswith("__")]


def _is_own(value: Any) -> bool:
    """True for an object whose members may change in training: of the script's code, or a container."""
    if isinstance(value, dict | list | tuple | deque):
        return bool(value) and _is_builtin(value) and len(value) <= _MOST_MEMBERS and not _is_plain(value)
    if isinstance(value, functools.partial | types.MethodType):
        return True
    if isinstance(value, types.ModuleType) or (
        isinstance(value, types.FunctionType) and not value.__closure__
    ):
        return False
    return hasattr(value, "__dict__") and not _is_of_library(value)


def _is_builtin(value: Any) -> bool:
    """False for a library's own container, which may do anything when it is read."""
    return type(value).__module__ in ("builtins", "collections") or not _is_of_library(value)


def _is_plain(value: Any) -> bool:
    try:
        plain(value)
    except TooLargeError:
        return True
    except TypeError:
        return False
    return True


def _is_of_library(value: Any) -> bool:
    kind = value if isinstance(value, type | types.FunctionType) else type(value)
    return _is_installed(str(kind.__module__))


@functools.cache
def _is_installed(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return name != "__main__" and (file is None or file.startswith(_INSTALLED) or name.startswith("r1hpc."))


def _is_script(name: str, module: Any) -> bool:
    return name == "__main__" or (
        isinstance(module, types.ModuleType)
        and name.partition(".")[0] not in ("r1hpc", "sitecustomize", "__mp_main__")
        and bool(getattr(module, "__file__", None))
        and not _is_installed(name)
    )


def _has_state(value: Any) -> bool:
    kind = type(value)
    if hasattr(kind, "__iter__"):  # a loader's position is its library's
        return False
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))


def _is_running(value: Any) -> bool:
    """True for an iterator, or a source of randomness, that hides how far it is."""
    return hasattr(type(value), "__next__") and not hasattr(value, "read")


def _is_pid(name: Any, value: Any) -> bool:
    """True for this process's number, by which an object sees that it was not copied by a fork."""
    return value == os.getpid() if isinstance(value, int) and "pid" in str(name) else False


def _size(value: Any) -> tuple[int, int]:
    return id(value), len(value) if hasattr(value, "__len__") else 0


def _text(path: Path) -> str:
    return f"{path[0]}: {'.'.join(map(str, path[1:]))}"


class _Digests(pickle.Pickler):
    """Pickles tensors as the digest of their bytes."""

    def __init__(self, file: Any, is_sampled: bool) -> None:
        super().__init__(file, protocol=5)
        self._is_sampled = is_sampled

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        flat, version = value.detach().reshape(-1), 0
        if self._is_sampled:
            flat, version = flat[:: max(1, len(flat) // _SAMPLED)], value._version
        raw: Any = flat.cpu().contiguous().view(torch.uint8).numpy() if flat.numel() else b""
        return bytes, (xxhash.xxh3_128_digest(raw) + str((value.shape, version)).encode(),)


class _Hash:
    """A file for pickle that keeps the digest alone."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.write, self.digest = self._hash.update, self._hash.digest


def _digest(content: tuple[str, Any]) -> Any:
    """Return what is equal for equal content: a number or a text itself."""
    kind, value = content
    if value is None or type(value) in _SIMPLE:
        return kind, type(value), repr(value)  # 0.0 is not -0.0
    into = _Hash()
    try:
        _Digests(into, kind == "state").dump(content)
    except Exception:  # a state that holds what pickle refuses: always changed
        return random.SystemRandom().randbytes(16)
    return into.digest()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return tuple(map(_copied, value)) if type(value) is tuple else value
