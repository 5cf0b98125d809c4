"""Post-training quantization with several recipes or runtimes: a member for each, and what they share made once."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_quant.artifact.folder import fleeting_folder
from lightning_quant.calibrate.distributed import Group
from lightning_quant.callbacks import refusals
from lightning_quant.callbacks.announce import warn
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.directions import watched
from lightning_quant.callbacks.loggers import write_table
from lightning_quant.callbacks.ptq import CalibrationSettings, PostTrainingQuantization
from lightning_quant.callbacks.publish import tell
from lightning_quant.callbacks.recovery import recovery
from lightning_quant.callbacks.refusals import refused_in_callback
from lightning_quant.callbacks.shared import Shared
from lightning_quant.doors.several import several
from lightning_quant.errors import QuantizationError
from lightning_quant.recipe import recipe as recipes
from lightning_quant.search.judge import Judge
from lightning_quant.search.pareto import Point, point_of
from lightning_quant.search.sweep import Sweep, swept, why

_OURS = (QuantizationError, MisconfigurationException)


class SweepingQuantization(PostTrainingQuantization):
    """What `PostTrainingQuantization` is where `recipe` or `runtime` is a list.

    Each member is a `PostTrainingQuantization` with a folder of its own. One that cannot be planned is told before
    training, one that fails at the end is a row of the table, and neither costs the others.

    Attributes:
        members: by the names of their folders, from `setup` on.
        reasons: why members have no artifact.
    """

    def begin(self, given: Mapping[str, Any]) -> None:
        """Take the arguments of `PostTrainingQuantization`, one of which is a list.

        Raises:
            MisconfigurationException: one is wrong.
        """
        every = refused_in_callback(several, CalibrationSettings, given)
        QuantizationCallback.__init__(self, next(iter(every.values())))
        # As they were given: the settings of members are made of them.
        self.recipe, self.runtime = given["recipe"], given["runtime"]
        self.output_dir, self.name = given["output_dir"], given["name"]
        self.measured = None
        self.members: dict[str, PostTrainingQuantization] = {}
        self.reasons: dict[str, str] = {}

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "members": {}, "reasons": {}}

    @property
    @override
    def settings(self) -> CalibrationSettings:
        """Those that members have in common, with the recipe and the runtime of the first."""
        first = next(iter(self._settings().values()))
        return dataclasses.replace(first, output_dir=self.output_dir, name=self.name)

    @property
    @override
    def state_key(self) -> str:
        first = [given[0] if isinstance(given, list | tuple) else given for given in (self.recipe, self.runtime)]
        return self._generate_state_key(
            recipe=recipes.get(first[0]).name, module=vars(self)["module"], runtime=first[1]
        )

    @override
    def __repr__(self) -> str:
        return f"PostTrainingQuantization({self._code()})"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit begins: refuse what names alone can tell."""
        if stage != "fit":
            return
        refused_in_callback(refusals.check_strategy, trainer)
        self.group = Group(trainer.world_size, trainer.strategy.root_device)
        others = [c for c in trainer.callbacks if isinstance(c, QuantizationCallback) and c is not self]  # type: ignore[attr-defined]
        refused_in_callback(refusals.check_own_folder, self.folder(trainer), [o.folder(trainer) for o in others])
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        self.last_folder = self.group.on_first(fleeting_folder) if is_trial else self.folder(trainer)
        self.shared, self.reasons, self.members = Shared(), {}, {}
        for name, settings in refused_in_callback(self._settings).items():
            arguments = {**vars(settings), "output_dir": self.last_folder / name, "name": f"{self._key(trainer)}{name}"}
            member = self.members[name] = PostTrainingQuantization(**arguments)
            member.shared = self.shared
        self._each(lambda member: member.setup(trainer, pl_module, stage))
        self._require_one()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins, after restore and device placement: plan every member, and export it on trial."""
        self.artifact = None
        for member in self.members.values():
            member._checkpoint, member.notes = self._checkpoint, self.notes
        self._each(lambda member: member.on_fit_start(trainer, pl_module))
        self._require_one()
        self._begun = True

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins: see whether it is to be scored."""
        self._each(lambda member: member.on_validation_start(trainer, pl_module))
        self._num_validations = max(member._num_validations for member in self.members.values())

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a batch of validation: run every member's twin on a copy of it."""
        given = (trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._each(lambda member: member.on_validation_batch_start(*given))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when all batches are through: log the scores behind what the module itself logs now."""
        self._each(lambda member: member.on_validation_epoch_end(trainer, pl_module))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for member in self.members.values():
            member.load_state_dict(state_dict)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: warn, the first time, of limits on what it does not log."""
        next(member for name, member in self.members.items() if name not in self.reasons).on_validation_end(
            trainer, pl_module
        )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends: make and measure every artifact, and compare them."""
        end: Callable[[PostTrainingQuantization], None] = lambda member: member.on_fit_end(trainer, pl_module)  # noqa: E731
        # What one process alone fails in would keep the others waiting.
        self._each(end, (*_OURS, Exception, KeyboardInterrupt) if self.group.size == 1 else _OURS, at_end=True)
        points = [self._point(name, member) for name, member in self.members.items()]
        self.shared.clear()
        judge = Judge(self.settings.limits, self._directions(trainer))
        known = {name: judge.direction(name) for point in points for name in point.metrics}
        compare = (self.last_folder, points, known, self.settings.objective)
        made: Sweep = refused_in_callback(self.group.on_first, swept, *compare)
        self.artifact = made
        self._publish(trainer, made)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit ends, however it ends: give the module its own forward back."""
        self._begun = False
        for member in self.members.values():
            member.teardown(trainer, pl_module, stage)
        self.shared.clear()

    @override
    def way_back(self, trainer: Trainer) -> str:
        """Return what to run to get the artifacts from the newest checkpoint of this run, without training on."""
        return recovery(f"PostTrainingQuantization({self._code(output_dir=self.last_folder)})", trainer)

    def _settings(self) -> dict[str, CalibrationSettings]:
        return several(CalibrationSettings, vars(self))

    def _code(self, **known: Any) -> str:
        every = self._settings().values()
        named: list[Any] = []
        for settings in every:
            if (spelled := recipes.spelled(settings.recipe)) not in named:
                named.append(spelled)
        return self.settings.as_code(recipe=named, runtime=list(dict.fromkeys(s.runtime for s in every)), **known)

    def _key(self, trainer: Trainer) -> str:
        """Return what the names of members begin with: nothing where there is no other callback of ours."""
        if self.name is not None:
            return f"{self.name}-"
        every = [c for c in trainer.callbacks if isinstance(c, QuantizationCallback)]  # type: ignore[attr-defined]
        sweeps = [c for c in every if isinstance(c, SweepingQuantization)]
        return "" if len(every) == 1 else f"sweep{sweeps.index(self) + 1}-"

    def _each(
        self,
        act: Callable[[PostTrainingQuantization], None],
        failing: tuple[type[BaseException], ...] = _OURS,
        *,
        at_end: bool = False,
    ) -> None:
        """Do something with every member that is not out of it by now; note why one fails, and go on."""
        for name, member in self.members.items():
            if name in self.reasons:
                continue
            try:
                act(member)
            except failing as error:
                is_stop = isinstance(error, KeyboardInterrupt)
                self.reasons[name] = "interrupted" if is_stop else str(error) or repr(error)
                warn(f"{name}: {self.reasons[name]}")
                if is_stop:
                    self.reasons |= {n: "interrupted" for n, m in self.members.items() if m.artifact is None}
            if at_end and member.prepared is not None:
                # What the others are measured beside.
                member.prepared.detach()
                member.prepared = None

    def _require_one(self) -> None:
        if len(self.reasons) == len(self.members):
            every = [Point(name, "", "", reason=reason) for name, reason in self.reasons.items()]
            raise MisconfigurationException(why(every))

    def _point(self, name: str, member: PostTrainingQuantization) -> Point:
        reason = self.reasons.get(name, "")
        if member.artifact is None:
            return Point(name, member.settings.recipe.name, member.settings.runtime, reason=reason)
        return point_of(name, member.artifact, member.measured, reason)

    def _directions(self, trainer: Trainer) -> dict[str, bool | None]:
        known: dict[str, bool | None] = {**watched(trainer, self._checkpoint)}
        for member in self.members.values():
            rows = ((member.artifact.report or {}) if member.artifact else {}).get("metrics", [])
            known |= {row["name"]: row["higher_is_better"] for row in rows if row["name"] not in known}
        return known

    def _publish(self, trainer: Trainer, made: Sweep) -> None:
        tell(made.text(), f"Artifacts: {made.folder}")
        prefix = f"quant/{self._key(trainer).rstrip('-') or 'sweep'}"
        scalars = {f"{prefix}/{name}": value for name, value in made.scalars().items()}
        for logger in trainer.loggers:
            try:
                logger.log_metrics(scalars, step=trainer.global_step)
                write_table(logger, f"{prefix}/table", made.text(), made.figures(), trainer.global_step)
            # A service that is away costs no artifact.
            except Exception as error:
                warn(f"{type(logger).__name__} did not take all of the table of {made.folder}: {error!r}.")
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
