"""Checkpoints by torch.distributed.checkpoint: each rank writes its shards, and any number of ranks reads them again.

That package is imported by the functions that use it, since this takes as long as all of hoptim.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hoptim.checks import listed
from hoptim.linalg.vectors import Layout, Tensors
from hoptim.problem.distributed import Ranks
from hoptim.problem.random_stream import global_states, set_generators
from hoptim.problem.sharding import Sharding, local
from hoptim.training.checkpoint import KEY, check_loadable, held_shards, held_weights
from hoptim.training.files import to_bytes
from hoptim.training.optimizer import BilevelOptimizer
from hoptim.training.training_optimizer import check_kinds, load_stateful, stateful_states

DAMAGED = "the checkpoint is damaged, so load an earlier one"
SHARED = "shared"  # plain values that are the same on all ranks
States = dict[Any, dict[Any, Any]]  # of the inner optimizer, by the number of the weight
OWN = ("trajectory", "val_batches", "train_batches")  # the parts of the optimizer's own entry that differ between ranks


def save_checkpoint(folder: str | os.PathLike[str], optimizer: BilevelOptimizer, *stateful: Any) -> None:
    """Save a training by ``torch.distributed.checkpoint``, whether or not its weights are sharded. Every rank calls this.

    It holds the model, all that ``optimizer.state_dict()`` holds, the states of ``stateful``, and the random generators of
    each rank. The folder appears once it is complete: a save that is cut short leaves only a hidden folder beside it.

    Args:
        folder: a new folder for each checkpoint, on a disk that all ranks see.
        optimizer: the optimizer; its model is saved too.
        stateful: what else changes in the loop and is not sharded, such as a scheduler: objects with ``state_dict`` and
            ``load_state_dict``, or a ``torch.Generator``.

    Raises:
        AttributeError: an object of ``stateful`` has no state.
        TypeError: its state is sharded.
        FileExistsError: there is such a folder already.
        RuntimeError: the disk is full, or can't be written to.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = Path(folder)
    ranks, part = optimizer.problem.ranks, folder.with_name(f".{folder.name}.part")
    tree = _saved(optimizer, stateful)
    _on_first(ranks, lambda: _make_room(folder, part))
    _call(save, tree, part, ranks, "the checkpoint could not be written")
    _on_first(ranks, lambda: os.rename(part, folder))


def load_checkpoint(folder: str | os.PathLike[str], optimizer: BilevelOptimizer, *stateful: Any) -> None:
    """Restore what :func:`save_checkpoint` has saved, also on another number of ranks. Every rank calls this.

    On the same number of ranks the training goes on to the bit. On another one, a warning says that the random generators
    stay as they are, and that a pass through shuffled ``val_batches`` begins again, at the same position. If the checkpoint
    is of another model, nothing changes.

    Args:
        folder: the folder.
        optimizer: built as it was, around a model that is built and sharded.
        stateful: those that were saved, in the same order.

    Raises:
        FileNotFoundError: there is no complete checkpoint in the folder.
        ValueError: it is of another model or of a newer version, or other ``stateful`` objects were saved.
        RuntimeError: a file is damaged.
    """
    folder = Path(folder)
    problem, ranks = optimizer.problem, optimizer.problem.ranks
    _on_first(ranks, lambda: _check_is_one(folder))
    shared = _decoded(_read({SHARED: b""}, folder, ranks)[SHARED], "cpu")
    check_loadable(
        {KEY: {**shared[KEY], **dict.fromkeys(OWN), "solver_state": {}, **held_shards(problem)}},
        held_weights(optimizer.inner, problem),
        optimizer._required,
        held_shards(problem),
    )
    live = _model_state(optimizer)
    _check_model(shared["model"], _shapes(live))
    check_kinds("load_checkpoint", shared["stateful"], stateful)
    is_same = shared["ranks"] == ranks.size
    if not is_same:
        _check_own(shared, None, optimizer)
    rank, places = f"rank{ranks.rank if is_same else 0}", _Places.of(optimizer)
    template = {
        rank: b"",
        "model": {name: torch.empty_like(t) if isinstance(t, Tensor) else t for name, t in live.items()},
        "inner": {str(number): places.like(number, kinds) for number, kinds in shared["inner"].items()},
        "solver": {name: places.empty_rows(*kind) for name, kind in shared["solver"].items()},
    }
    found = _read(template, folder, ranks)
    own, own_state = _decoded(found[rank], None if is_same else "cpu"), {}
    if is_same:
        _check_own(shared, own["shards"], optimizer)
        own_state = _decoded(own["inner"], None)
    for name in OWN if not is_same else ():
        own[KEY][name] = _begun_again(own[KEY][name]) if name.endswith("batches") else None
    vectors = {name: _flat(found["solver"][name], lead) for name, (_, _, lead) in shared["solver"].items()}
    entry = {**shared[KEY], **own[KEY], "solver_state": vectors, **held_shards(problem)}
    state = {
        number: {**shared["inner_rest"][number], **found["inner"][str(number)], **own_state.get(number, {})}
        for number in shared["inner"]
    }
    optimizer.load_state_dict({**shared["rest"], "state": state, KEY: entry})
    problem.model.load_state_dict({**found["model"], **own["buffers"]})
    load_stateful(own["stateful"], stateful, with_generators=is_same)
    if is_same:
        set_generators(own["random"])
    else:
        warnings.warn(
            f"the checkpoint is of {shared['ranks']} ranks, and this training has {ranks.size}: random generators stay as "
            "they are, so seed them otherwise than at the start, and a pass through shuffled val_batches begins again",
            stacklevel=2,
        )


def _saved(optimizer: BilevelOptimizer, stateful: tuple[Any, ...]) -> dict[str, Any]:
    """The training as torch.distributed.checkpoint takes it: sharded tensors by name, and bytes."""
    problem, rest = optimizer.problem, optimizer.state_dict()
    entry, places = rest.pop(KEY), _Places.of(optimizer)
    state, own_state = _without_own(rest.pop("state"), places.held, problem.ranks)
    names, states = entry["solver_weights"], stateful_states(stateful)
    vectors = places.fitting(names, entry.pop("solver_state"))
    model, generators = _model_state(optimizer), global_states()
    buffers = {name: model[name].detach() for name, _ in problem.model.named_buffers() if name in model}
    own = {
        KEY: {name: entry.pop(name) for name in OWN},
        "stateful": states,
        "buffers": buffers,
        "random": generators,
        "inner": _encoded(own_state, "the inner optimizer"),
        "shards": entry.pop("shards", None),
    }
    tensors = {number: {key: t for key, t in entries.items() if _is_large(t)} for number, entries in state.items()}
    shared = {
        KEY: entry,
        "ranks": problem.ranks.size,
        "inner_own": sorted({key for entries in own_state.values() for key in entries}),
        "rest": rest,
        "model": _shapes(model),
        "stateful": [kind for kind, _ in states],
        "inner": {number: {key: _kind(t) for key, t in entries.items()} for number, entries in tensors.items()},
        "inner_rest": {
            number: {key: value for key, value in entries.items() if not _is_large(value)}
            for number, entries in state.items()
        },
        "solver": {name: (names, vector.dtype, list(vector.shape[:-1])) for name, vector in vectors.items()},
    }
    return {
        SHARED: _encoded(shared, "the inner optimizer"),
        f"rank{problem.ranks.rank}": _encoded(own, "a stateful object"),
        "model": model,
        "inner": {str(number): entries for number, entries in tensors.items()},
        "solver": {name: places.rows(names, vector) for name, vector in vectors.items()},
    }


def _without_own(state: States, held: list[Any], ranks: Ranks) -> tuple[States, States]:
    """The inner optimizer's state without what each rank has of its own, and that.

    Its own is what belongs to a sharded weight and is no ``DTensor``, such as the codes of an 8-bit optimizer; unless it is
    a number that all ranks have, such as a count of steps.
    """
    plain: States = {
        number: {key: value for key, value in entries.items() if not hasattr(value, "device_mesh")}
        for number, entries in state.items()
        if isinstance(number, int) and hasattr(held[number], "device_mesh")
    }
    rows = [(number, key, value) for number, entries in plain.items() for key, value in entries.items()]
    numbers = {
        (number, key): value.item() if isinstance(value, Tensor) else value
        for number, key, value in rows
        if _is_number(value)
    }
    everywhere = ranks.gathered(numbers) if ranks.size > 1 else [numbers]
    alike = {
        place for place, value in numbers.items() if all(place in there and there[place] == value for there in everywhere)
    }
    own: States = {}
    for number, key, value in rows:
        if (number, key) not in alike:
            own.setdefault(number, {})[key] = value
    rest = {n: {key: value for key, value in entries.items() if key not in own.get(n, ())} for n, entries in state.items()}
    return rest, own


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and value.ndim == 0)


def _check_own(shared: Mapping[str, Any], shards: object, optimizer: BilevelOptimizer) -> None:
    """Raise ``ValueError`` on all ranks if the inner optimizer's state has parts of each rank's own that fit none here.

    ``shards`` is how those of this rank were cut, ``None`` if there were more or fewer ranks.
    """
    keys, ranks = shared.get("inner_own"), optimizer.problem.ranks
    if not keys or all(ranks.gathered(shards is not None and shards == held_shards(optimizer.problem).get("shards"))):
        return
    raise ValueError(
        f"the state of {type(optimizer.inner).__name__} has {listed(keys)} as plain tensors, not as torch's DTensor, so "
        f"that only the same rank of as many can load them: the checkpoint is of {shared['ranks']} ranks, and this training "
        f"has {ranks.size}, or cuts its weights otherwise. Go on as it was, on {shared['ranks']}"
    )


def _is_large(value: object) -> bool:
    """Whether it is saved as a tensor of its own; counters are not."""
    return isinstance(value, Tensor) and (value.ndim > 0 or hasattr(value, "device_mesh"))


def _model_state(optimizer: BilevelOptimizer) -> dict[str, Any]:
    problem = optimizer.problem
    problem.named_parameters()  # puts FSDP2's shards in their places
    return dict(problem.model.state_dict())


def _shapes(model: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(t.shape) if isinstance(t, Tensor) else [] for name, t in model.items()}


def _check_model(there: dict[str, list[int]], here: dict[str, list[int]]) -> None:
    """Raise ``ValueError`` unless names and shapes are those of the model here, frozen weights and buffers included."""
    if names := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        raise ValueError(
            f"the checkpoint is another model's: {listed(names)} differ in name or shape. Build the model as it was"
        )


def _kind(t: Tensor) -> tuple[list[int], torch.dtype, bool]:
    """Shape and type of a tensor, and whether it is sharded, as plain values."""
    return list(t.shape), t.dtype, hasattr(t, "device_mesh")


@dataclass(frozen=True)
class _Places:
    """Where the tensors of a checkpoint belong here: on which device, and sharded in which way.

    Attributes:
        weights: the live weights by name.
        held: the tensors of the inner optimizer, in its order.
        sharding: how the weights are sharded; ``None`` where they are not.
    """

    weights: Tensors
    held: list[Any]
    sharding: Sharding | None

    @classmethod
    def of(cls, optimizer: BilevelOptimizer) -> _Places:
        problem = optimizer.problem
        live = dict(problem.named_parameters())
        sharding = Sharding.of(problem.model, live, problem.ranks) if problem.is_sharded else None
        return cls(live, [p for group in optimizer.inner.param_groups for p in group["params"]], sharding)

    def like(self, number: int, kinds: Mapping[str, Any]) -> Tensors:
        """Empty tensors for the state of the inner optimizer's weight of this number."""
        return {key: self._like(self.held[number], *kind) for key, kind in kinds.items()}

    def _like(self, weight: Any, shape: list[int], dtype: torch.dtype, was_sharded: bool) -> Tensor:
        if list(weight.shape) == shape:
            return torch.empty_like(weight, dtype=dtype, requires_grad=False)
        found = torch.empty(shape, dtype=dtype, device=weight.device)
        if not (was_sharded and hasattr(weight, "device_mesh")):
            return found
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(found, weight.device_mesh, [Replicate()] * weight.device_mesh.ndim, run_check=False)

    def fitting(self, names: list[str], vectors: Tensors) -> Tensors:
        """Those of a solver's vectors that are of these weights: the model may have changed since."""
        if any(name not in self.weights for name in names):
            return {}
        size = self._layout(names).size
        return {name: vector for name, vector in vectors.items() if vector.shape[-1:] == (size,)}

    def _layout(self, names: list[str]) -> Layout:
        return Layout.of({name: local(self.weights[name]) for name in names})

    def rows(self, names: list[str], vector: Tensor) -> dict[str, Tensors]:
        """A solver's vector of these weights, or each row of several, by the names of the weights."""
        layout = self._layout(names)
        rows = vector.reshape(-1, layout.size)
        return {str(number): self._tensors(layout.views(row)) for number, row in enumerate(rows)}

    def empty_rows(self, names: list[str], dtype: torch.dtype, lead: list[int]) -> dict[str, Tensors]:
        """The same for a vector that shall be read, ``lead`` being its shape without the last axis."""
        layout = self._layout(names)
        vector = torch.empty((*lead, layout.size), dtype=dtype, device=layout.device)
        return self.rows(names, vector)

    def _tensors(self, shards: Tensors) -> Tensors:
        return shards if self.sharding is None else self.sharding.tensors(shards)


def _flat(rows: Mapping[str, Tensors], lead: list[int]) -> Tensor:
    """The flat vector of a solver, or several as rows, from its tensors by row and weight."""
    found = [torch.cat([local(t).reshape(-1) for t in rows[str(number)].values()]) for number in range(len(rows))]
    return torch.stack(found).reshape(*lead, -1)


def _begun_again(batches: dict[str, Any] | None) -> dict[str, Any] | None:
    """The position in a source of batches, without the random numbers of the rank that was there."""
    return None if batches is None else {**batches, "begun": None}


# Files


def _on_first(ranks: Ranks, action: Callable[[], None]) -> None:
    """Do this on the first rank, while the others wait; an error is raised on all, or the others would wait for ever."""
    error: Exception | None = None
    if ranks.rank == 0:
        try:
            action()
        except Exception as found:
            error = found
    if (error := ranks.gathered(error)[0]) is not None:
        raise error


def _make_room(folder: Path, part: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: give each checkpoint a folder of its own, named by its step")
    if part.exists():
        shutil.rmtree(part)  # left by a save that was cut short
    folder.parent.mkdir(parents=True, exist_ok=True)


def _check_is_one(folder: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not (folder / ".metadata").exists():
        raise FileNotFoundError(f"there is no checkpoint in {folder}: give a folder that hoptim.save_checkpoint has made")
    try:
        names = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise RuntimeError(f"{DAMAGED} ({folder}): {error}") from None
    if SHARED not in names:
        raise FileNotFoundError(f"the checkpoint in {folder} is not of hoptim.save_checkpoint: read it with what wrote it")


def _read(template: dict[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_loader import load

    _call(load, template, folder, ranks, DAMAGED)
    return template


def _call(action: Callable[..., Any], tree: dict[str, Any], folder: Path, ranks: Ranks, failure: str) -> None:
    """Save or load on these ranks, without a warning that a single process is alone; if it fails, raise ``RuntimeError``."""
    from torch.distributed.checkpoint.api import CheckpointException

    where: dict[str, Any] = {"process_group": ranks.group} if ranks.size > 1 else {"no_dist": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            action(tree, checkpoint_id=folder, **where)
        except CheckpointException as error:  # no Exception, so that who expects errors would not see it
            raise RuntimeError(f"{failure} ({folder}): {error}") from error


def _encoded(value: Any, what: str) -> bytes:
    """Plain values as bytes, which torch.distributed.checkpoint writes as they are."""
    if any(hasattr(t, "device_mesh") for t in pytree.tree_leaves(value)):
        raise TypeError(
            f"the state of {what} holds sharded tensors where they can't be saved: save a sharded model, such as an "
            "average, beside it by torch.distributed.checkpoint.save"
        )
    return to_bytes(value)


def _decoded(data: bytes, device: str | None) -> Any:
    # torch.distributed.checkpoint has unpickled the bytes already, so that a stricter load would protect nobody.
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)
