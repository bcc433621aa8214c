"""What the training scripts share: a phase on the clock with checkpoints to resume from, its optimizer, the export."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from draftdiff.cli.options import Parser, made_folder
from draftdiff.errors import UserError
from draftdiff.files import prepare_folder, replacing
from draftdiff.pipelines.mini.weights import DEFAULTS_FILE

WORK = Path(__file__).resolve().parents[2] / ".train"


class Optimizer:
    """Muon for the hidden matrices (kernels are taken as matrices too) and Adam for everything else.

    Muon needs far fewer steps than Adam alone, which is what makes training on a CPU feasible.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        adam_rate: float,
        matrices: Sequence[nn.Parameter] = (),
        muon_rate: float = 0.02,
    ) -> None:
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in parameters if id(parameter) not in chosen]
        self.matrices = matrices
        self.flat = [nn.Parameter(parameter.data.view(len(parameter), -1)) for parameter in matrices]
        adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [(adam, adam_rate)]
        if matrices:
            self.parts.append((torch.optim.Muon(self.flat, lr=muon_rate, momentum=0.95, weight_decay=0.01), muon_rate))

    def step(self, factor: float) -> None:
        """One step at `factor` of the peak learning rates."""
        for flat, parameter in zip(self.flat, self.matrices, strict=True):
            flat.grad = None if parameter.grad is None else parameter.grad.reshape(flat.shape)
        for optimizer, rate in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for (optimizer, _), one in zip(self.parts, state, strict=True):
            optimizer.load_state_dict(one)


class Phase(ABC):
    """A model in training for a number of minutes rather than steps.

    A checkpoint, made once a minute, at the end and when interrupted, keeps its weights and their running average where
    there is one, its optimizer, its clock, and `kept`. A phase begins where its checkpoint ends.
    """

    warm_up = 50  # steps

    def __init__(self, file: Path, model: nn.Module, optimizer: Optimizer, average: bool = False) -> None:
        prepare_folder(file.parent)
        self.file, self.model, self.optimizer = file, model, optimizer
        self.average = copy.deepcopy(model).requires_grad_(False) if average else None
        self.step, self.seconds, self.loss, self.factor = 0, 0.0, 0.0, 1.0
        self.kept: dict[str, Any] = {}
        if file.exists():
            saved = torch.load(file)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            self.step, self.seconds, self.kept = saved["step"], saved["seconds"], saved["kept"]

    def save(self) -> None:
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "seconds": self.seconds, "kept": self.kept}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        with replacing(self.file) as partial:
            torch.save(state, partial)

    @abstractmethod
    def train_step(self, part: float) -> str:
        """One step at `part` of the time, 0 to 1; returns what to show."""

    def rate(self, part: float) -> float:
        """The learning rate as a share of its peak: a cosine to nearly zero."""
        return 0.01 + 0.495 * (1 + math.cos(math.pi * part))

    def decay(self) -> float:
        """How much of the running average stays in a step."""
        return min(0.995, (2 + self.step) / (11 + self.step))

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None:
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - self.decay())

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizer down a loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(self.factor)
        self.model.zero_grad(set_to_none=True)
        self._update_average()

    def smoothed(self, loss: float) -> float:
        self.loss = 0.98 * self.loss + 0.02 * loss if self.loss else loss
        return self.loss

    def run(self, minutes: float) -> None:
        """Train on the clock, after a short warm-up."""
        total = minutes * 60
        torch.manual_seed(self.step)
        self.model.train()
        saved, previous = self.seconds, time.time()
        try:
            with tqdm(total=round(total), initial=round(self.seconds), unit="s", mininterval=10) as bar:
                while self.seconds < total:
                    part = self.seconds / total
                    self.factor = min(1.0, (self.step + 1) / self.warm_up) * self.rate(part)
                    shown = self.train_step(part)
                    self.step += 1
                    now = time.time()
                    bar.update(round(self.seconds + now - previous) - round(self.seconds))
                    self.seconds, previous = self.seconds + now - previous, now
                    bar.set_postfix_str(f"step={self.step} {shown}", refresh=False)
                    if self.seconds - saved > 60:
                        self.save()
                        saved = self.seconds
        finally:
            self.save()


def existing(file: Path, phase: str) -> Path:
    """A file that a phase has left. Raises UserError if it has not been run."""
    if not file.exists():
        raise UserError(f"there is no {file}: run the phase {phase!r} first")
    return file


def spent(file: Path) -> dict[str, Any]:
    """How long a phase has trained, by its checkpoint."""
    saved = torch.load(file)
    return {"steps": saved["step"], "minutes": round(saved["seconds"] / 60, 1)}


def write_settings(folder: Path, settings: Mapping[str, Any], long: Mapping[str, Any] | None = None) -> None:
    """Write an export's settings, with the digests of its weights.  long: values that stay on one line."""
    digests = {}
    for file in sorted(folder.rglob("*.safetensors")):
        file.chmod(0o644)
        digests[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    text = json.dumps({**settings, "sha256": digests}, indent=2)
    for name, value in (long or {}).items():
        text = text.removesuffix("\n}") + f',\n  "{name}": {json.dumps(value)}\n}}'
    (folder / DEFAULTS_FILE).write_text(text + "\n", encoding="utf-8")


def parser(doc: str | None, phases: Iterable[str], minutes: float, threads: int) -> Parser:
    """The options that the scripts have."""
    made = Parser(description=(doc or "").split("\n\n")[0])
    made.add_argument("phase", choices=[*phases, "export"])
    made.add_argument(
        "--minutes", type=float, default=minutes, help=f"how long this phase trains in all (default {minutes:g})"
    )
    made.add_argument("--work", type=made_folder, default=str(WORK), help="folder for checkpoints (default .train)")
    made.add_argument("--threads", type=int, default=threads, help=f"CPU threads (default {threads})")
    return made
