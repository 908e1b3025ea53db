"""The models that a run compares its model with, in the precision of that model.

Preference training (DPO, KTO, GRPO) compares the log-probabilities of the trained model with those
of a reference, a copy of it from before the training. If only one of them is converted, their
difference is not zero at the first step: it holds the error of quantisation. So a reference is
converted as the model is, in every phase, and computes in the recipe that the model computes in at
that time, although it is in `eval()` itself.

A teacher with other layers is no reference, and keeps its precision.
"""

import hashlib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from lowprec.errors import UserError
from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.trainer_facts import is_sharded

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger("lowprec")


class References:
    """The references of a run, converted whenever its controller converts the model.

    Args:
        controller: controls the model that the references are compared with.
        given: references that the user names. They are converted before the Trainer prepares them.
    """

    def __init__(self, controller: PrecisionController, given: Iterable[nn.Module]) -> None:
        self.controller = controller
        self.given = tuple(given)
        self._models: list[nn.Module] = []
        self._as_training = True
        """Flag: the references compute as the model does in training."""
        controller.after_conversion = self._convert
        for reference in self.given:
            if not isinstance(reference, nn.Module):
                raise UserError(
                    f"references: expected models (nn.Module), got {type(reference).__name__}"
                )

    def begin(self) -> None:
        """Forget the references of another Trainer; take those that the user names."""
        self._models = []
        for reference in self.given:
            self._take(reference)

    def find(self, trainer: "Trainer | None", model: nn.Module) -> list[str]:
        """Take the references among the attributes of the Trainer, too: models with the same
        parameters as `model`, which nothing trains. Return the names of the new ones.

        Raises:
            UserError: a reference can't be converted any more.
        """
        if trainer is None:
            return []
        wanted = _shapes(model)
        trained = {id(parameter) for parameter in model.parameters()}
        if trainer.optimizer is not None:
            groups = trainer.optimizer.param_groups  # pyright: ignore[reportAttributeAccessIssue]
            trained |= {id(parameter) for group in groups for parameter in group["params"]}
        names: list[str] = []
        for name, module in _modules(trainer):
            module = getattr(module, "_orig_mod", module)
            if any(module is known for known in self._models):
                continue
            if any(id(parameter) in trained for parameter in module.parameters()):
                continue
            if _shapes(module) != wanted:
                continue
            self._check(trainer, name, module)
            self._take(module)
            names.append(name)
        return names

    def _take(self, reference: nn.Module) -> None:
        self._models.append(reference.eval().requires_grad_(False))
        if self.controller.config.evaluation != "training":
            reference.register_forward_pre_hook(self._follow_mode)

    def _convert(self) -> None:
        for reference in self._models:
            self.controller.convert_alike(reference, as_training=self._as_training)

    def _follow_mode(self, reference: nn.Module, inputs: Any) -> None:
        """Give the references the recipes of evaluation while the model evaluates."""
        is_training = self.controller.model.training
        if is_training != self._as_training:
            self._as_training = is_training
            self._convert()

    def _check(self, trainer: "Trainer", name: str, module: nn.Module) -> None:
        reason = None
        if is_sharded(module):
            reason = "it is sharded already, and can't be converted then"
        elif getattr(trainer.args, "precompute_ref_log_probs", False):
            reason = "its log-probabilities were computed before it could be converted"
        if reason is not None:
            raise UserError(
                f"{name}, with which the converted model is compared: {reason}; load that model "
                f"yourself, and give it to the Trainer ({name}=model) and to the callback "
                "(LowPrecisionCallback(..., references=[model]))"
            )


def check_precomputed(trainer: "Trainer | None", controller: PrecisionController) -> None:
    """Let log-probabilities that TRL computes once, and keeps on disk by the weights and the data
    alone, be those of this precision.

    Raises:
        UserError: they would be of another precision than the training.
    """
    if trainer is None or not getattr(trainer.args, "precompute_ref_log_probs", False):
        return
    if controller.config.evaluation != "training":
        raise UserError(
            "precompute_ref_log_probs: the reference would be computed in the precision of "
            "evaluation, and compared with the one of training; leave precision.evaluation out"
        )
    given: Any = trainer.eval_dataset
    held_out = list(given.values()) if isinstance(given, dict) else [given]
    for dataset in (trainer.train_dataset, *held_out):
        fingerprint = getattr(dataset, "_fingerprint", None)
        if fingerprint is not None:
            text = f"{fingerprint} {controller.phases[0]!r}"
            vars(dataset)["_fingerprint"] = hashlib.sha256(text.encode()).hexdigest()[:16]


def _modules(trainer: "Trainer") -> list[tuple[str, nn.Module]]:
    """Return the models among the Trainer's attributes, and in its lists of models."""
    found: list[tuple[str, nn.Module]] = []
    for name, value in vars(trainer).items():
        members = value if isinstance(value, list | tuple) else [value]
        found += [(name, member) for member in members if isinstance(member, nn.Module)]
    return found


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
