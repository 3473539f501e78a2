"""A training, built from its config: the task's problem, the optimizer, the batches, and the loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import hoptim
from hoptim.problem.outer_adam import outer_adam
from hoptim.tracking import Board
from hoptim.training.record import natural_values
from tasks.processes import Processes
from tasks.task import Task, TrainingBatches, batches_of

log = logging.getLogger("hoptim.train")


@dataclass(kw_only=True)
class Run:
    """The parts of a training; ``state_dict`` has all that its rest depends on, except the random number generators.

    Attributes:
        records: the records of the hypersteps since the last row of figures.
    """

    cfg: DictConfig
    task: Task
    parts: Mapping[str, Tensor]
    processes: Processes
    problem: hoptim.Problem
    optimizer: hoptim.BilevelOptimizer
    scheduler: Any
    batches: TrainingBatches
    trackers: list[Any]
    records: list[hoptim.Record] = field(default_factory=list)

    @classmethod
    def of(cls, cfg: DictConfig) -> Run:
        """Build it from a config. The order matters, since its parts draw random numbers."""
        torch.manual_seed(cfg.seed)
        task, processes = instantiate(cfg.task), Processes.join(cfg.sharded)
        parts = task.setup(cfg.seed)
        problem = task.problem()
        problem = processes.wrap(problem, task.blocks(problem.model))
        if processes.rank:
            torch.manual_seed(cfg.seed + 1_000_003 * processes.rank)  # so that each process has its own dropout masks
        if cfg.hyperparameters:
            set_hyperparameters(problem, load_file(cfg.hyperparameters))
        trackers = [instantiate(options) for options in (cfg.hoptim.get("tracker") or {}).values()]
        records: list[hoptim.Record] = []
        optimizer = hoptim.BilevelOptimizer(
            instantiate(cfg.inner)(problem.model.parameters()),
            outer_of(cfg, problem.hparams, len(parts["val"])),
            problem,
            val_batches=batches_of(processes.share(parts["val"]), processes.share_of(cfg.val_batch_size)),
            options=dict(cfg.options) or None,
            hypergradient=instantiate(cfg.hoptim.method),
            every=cfg.every if cfg.learn else None,
            warmup=cfg.warmup,
            hooks=[records.append, *(tracker for tracker in trackers if not isinstance(tracker, Board))],
        )
        return cls(
            cfg=cfg, task=task, parts=parts, processes=processes, problem=problem, optimizer=optimizer,
            scheduler=scheduler_for(cfg, optimizer),
            batches=batches_for(cfg, parts["train"], processes), trackers=trackers, records=records,
        )  # fmt: skip

    @property
    def total_steps(self) -> int:
        """How many steps the training has: ``outer_steps`` times ``inner_steps``, or the steps of its epochs."""
        cfg = self.cfg
        return cfg.outer_steps * cfg.inner_steps if cfg.epochs is None else max(1, round(cfg.epochs * len(self.batches)))

    @property
    def outer_steps(self) -> int:
        """How many rows of figures the run has. The last one may have fewer steps."""
        return -(-self.total_steps // self.cfg.inner_steps)

    def advance(self) -> float:
        """Take the inner steps of one row; return the seconds that they took, hypersteps included."""
        done = self.optimizer.inner_steps
        self.task.progress(self.problem.hparams, done / self.total_steps)
        begun = time.perf_counter()
        steps(self.optimizer, self.batches, min(self.cfg.inner_steps, self.total_steps - done), self.scheduler)
        return time.perf_counter() - begun

    def retrained(self) -> nn.Module:
        """A new model, trained for as many steps on training and validation data, with the hyperparameters as they are."""
        cfg, joined = self.cfg, torch.cat([self.parts["train"], self.parts["val"]]).unique()

        def train(model: nn.Module, optimizer: hoptim.BilevelOptimizer, examples: Tensor) -> None:
            steps(optimizer, batches_for(cfg, examples, self.processes), self.total_steps, scheduler_for(cfg, optimizer))

        def make() -> nn.Module:
            model = self.task.final_model(self.problem.hparams)
            return self.processes.wrapped(model, self.task.blocks(model))

        def inner(model: nn.Module) -> torch.optim.Optimizer:
            return instantiate(cfg.inner)(model.parameters())

        return hoptim.retrain(self.problem, make, train, joined, inner=inner, options=dict(cfg.options) or None)

    def state_dict(self) -> dict[str, Any]:
        state = {"model": self.problem.model, "optimizer": self.optimizer, "batches": self.batches}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler
        return {name: part.state_dict() for name, part in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.problem.model.load_state_dict(state["model"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])


def steps(optimizer: hoptim.BilevelOptimizer, batches: TrainingBatches, count: int, scheduler: Any) -> None:
    """A training loop as a user writes it."""
    for _ in range(count):
        optimizer.zero_grad()
        loss = optimizer.loss(batches.draw())
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def batches_for(cfg: DictConfig, examples: Tensor, processes: Processes) -> TrainingBatches:
    """This process's share of the training batches."""
    return TrainingBatches(processes.share(examples), processes.share_of(cfg.batch_size))


def scheduler_for(cfg: DictConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler of the learning rate, or ``None``."""
    return instantiate(cfg.scheduler)(optimizer) if cfg.scheduler else None


def outer_of(cfg: DictConfig, hparams: nn.Module, validation: int) -> torch.optim.Optimizer:
    """The outer optimizer for so many validation examples: hoptim's, with rates by constraint, or one of torch's."""
    make = instantiate(cfg.outer)
    return make(hparams, validation=validation) if make.func is outer_adam else make(hparams.parameters())


def set_hyperparameters(problem: hoptim.Problem, values: Mapping[str, Tensor]) -> None:
    """Start from the values that an earlier run has learned, and warn of hyperparameters that are not among them."""
    for name, value in values.items():
        set_hyperparameter(problem.hparams, name, value)
    if missing := sorted(natural_values(problem).keys() - values.keys()):
        log.warning("hyperparameters: the file has no %s, which keep their start", ", ".join(missing))


def set_hyperparameter(hparams: nn.Module, name: str, value: Tensor) -> None:
    """Set a hyperparameter, by its name in hyperparameters.safetensors."""
    for path, module in hparams.named_modules():
        own = name.removeprefix(f"{path}." if path else "")
        if isinstance(module, hoptim.HyperParameters) and own in module and name == f"{path}.{own}".lstrip("."):
            module[own] = value
            return
    with torch.no_grad():
        try:
            hparams.get_parameter(name).copy_(value)
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"hyperparameters: {name!r} of shape {tuple(value.shape)} is none of this task's") from error
