"""The HF Trainer with what this family's extra parameters need, and runs that survive."""

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from modeling_entropy_gpt.layers import LEARNED_SCALARS

from .arguments import EntropyTrainingArguments
from .callbacks import TOKENS_PER_SECOND, find_callback, peak_memory
from .checkpoints import STAGING, seal
from .divergence import MOST_ROLLBACKS, DivergenceGuard, base_model, find_first_bad_layer
from .files import delete, give_usual_mode
from .model_loss import ModelLoss
from .storage import storing


# Scalars and vectors that weight decay would pull away from what they mean, and the argument with the multiple of the
# learning rate that they have.
LEARNING_RATE_MULTIPLIERS = {
    **{scalar.parameter: scalar.lr_multiplier for scalar in LEARNED_SCALARS if scalar.lr_multiplier},
    "gain": "gain_lr_multiplier",
}
NOT_DECAYED = (
    *(scalar.parameter for scalar in LEARNED_SCALARS),
    *("gain", "ln_1.weight", "ln_2.weight", "ln_f.weight"),
)
# Outputs of the model that are logged with its loss.
LOGGED = ("cross_entropy_loss", "entropy_loss", "penalized_share", "log_sum_loss")
# What the guard looks at where there is no cross-entropy.
OTHER_LOSS = "other_loss"


class EntropyTrainer(ModelLoss, Trainer):
    """
    A `Trainer` for this family. The loss, with its entropy penalty, is the model's own, so a plain `Trainer` works
    too; this one adds:
    - no weight decay on temperatures, thresholds, shifts, residual scales and gains, nor on norms of any kind, and
      multiples of the learning rate for them;
    - `cross_entropy_loss`, `entropy_loss`, `penalized_share` and `log_sum_loss` in the logs, means over the steps
      since the last log and over all ranks, with the tokens a second of all ranks and the peak memory of this one;
    - labels that `label_smoothing_factor` smooths in the model's own loss, together with the penalty ([`ModelLoss`]);
    - embeddings that stay as they are, if `freeze_embeddings` says so;
    - a [`DivergenceGuard`], which stops a run whose loss is not finite or explodes, or takes it back to the last
      checkpoint's state (or the run's beginning) at half the learning rate, and reports where it began;
    - checkpoints that get their name once they are whole, sealed by hashes.

    Args:
        guard ([`DivergenceGuard`], *optional*): One that does more. Else one that does what `on_divergence` says.

    Raises:
        `ValueError`: If the loss of a model with a penalty on attention rows would be the `Trainer`'s, without the
            penalty: by `compute_loss_func`, or by `label_smoothing_factor` for another head than a language model's.
    """

    args: EntropyTrainingArguments

    def __init__(self, model=None, *args, guard: DivergenceGuard | None = None, **kwargs):
        cached = None if model is None else base_model(model).config.use_cache
        super().__init__(model, *args, **kwargs)
        self._freeze(self.model)
        self._refuse_other_losses()
        self.add_callback(guard or DivergenceGuard(self.args.on_divergence))
        self._forget_steps()
        self._staging: Path | None = None
        # What training changes in the configuration, as it was given: the `Trainer` switches the cache off.
        self._given = {} if cached is None else {"use_cache": cached}
        if self.accelerator.num_processes > 1:
            # It would stop one process alone while the others wait for it; the guard looks at the loss of all.
            config = base_model(self.model).config
            self._given["detect_divergence"], config.detect_divergence = config.detect_divergence, False

    @property
    def guard(self) -> DivergenceGuard:
        """What watches the loss."""
        return find_callback(self, DivergenceGuard)

    def call_model_init(self, trial=None) -> nn.Module:
        """A new model, in each training anew, as `model_init` makes it."""
        return self._freeze(super().call_model_init(trial))

    def _freeze(self, model: nn.Module) -> nn.Module:
        if self.args.freeze_embeddings:
            freeze_embeddings(model)
        return model

    # Optimiser

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(NOT_DECAYED)]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        names = {parameter: name for name, parameter in (model or self.model).named_parameters()}
        for group in [*optimizer.param_groups]:
            by_factor: dict[float, list] = {}
            for parameter in group["params"]:
                by_factor.setdefault(self._multiplier(names[parameter]), []).append(parameter)
            group["params"] = by_factor.pop(1.0, [])
            for factor, parameters in by_factor.items():
                optimizer.add_param_group({**group, "params": parameters, "lr": factor * group["lr"]})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.guard.action == "rollback":
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                raise ValueError(
                    f"on_divergence=rollback slows the learning rate down, which lr_scheduler_type="
                    f"{self.args.lr_scheduler_type} does not allow: take linear, cosine, polynomial or constant."
                )
            scheduler.lr_lambdas = [self._slowed(factor) for factor in scheduler.lr_lambdas]
        return scheduler

    def _multiplier(self, name: str) -> float:
        argument = LEARNING_RATE_MULTIPLIERS.get(name.rpartition(".")[2])
        return 1.0 if argument is None else getattr(self.args, argument)

    def _slowed(self, factor):
        return lambda step: factor(step) * self.guard.slowdown

    # Steps

    def train(self, *args, **kwargs):
        self._forget_steps()
        config = base_model(self.model).config
        config.use_cache = self.args.use_cache
        try:
            return super().train(*args, **kwargs)
        finally:
            config.use_cache = self._given.get("use_cache", config.use_cache)

    def _forget_steps(self):
        self._good_state: dict | None = None
        self._step_sums: dict[str, torch.Tensor] = {}
        self._logged_sums: dict[str, torch.Tensor] = {}
        self._tokens, self._counted_from = 0, time.perf_counter()
        self._logged_steps = 0
        self._step_is_void = False

    def _run_epoch(self, **kwargs):
        """Not where a checkpoint of the last step is resumed: the `Trainer` would take one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
            share = 1.0 if num_items_in_batch is not None else 1 / self.current_gradient_accumulation_steps
            for name in LOGGED:
                if (value := outputs.get(name)) is not None:
                    self._add(name, value, share)
            if "cross_entropy_loss" not in outputs:  # of another head: a mean, which adding up over ranks is to keep
                ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                self._add(OTHER_LOSS, loss, share / ranks)
        return (loss, outputs) if return_outputs else loss

    def _add(self, name: str, value: torch.Tensor, share: float):
        self._step_sums[name] = self._step_sums.get(name, 0.0) + value.detach().float().sum() * share

    def training_step(self, model, inputs, num_items_in_batch=None):
        is_last_part = self.accelerator.sync_gradients
        if self._step_is_void:  # an earlier part of its batch diverged
            self._step_is_void = not is_last_part
            return torch.tensor(math.nan, device=self.args.device)
        if self._good_state is None and self.guard.action == "rollback":
            self._keep_good_state()
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except FloatingPointError as error:  # of a model with detect_divergence
            self._diverge(str(error))
            self._step_is_void = not is_last_part
            return torch.tensor(math.nan, device=self.args.device)
        own_sums = self._step_sums  # before they are those of all ranks
        if is_last_part and (reason := self._find_divergence()):
            part = "" if self.current_gradient_accumulation_steps == 1 else "in the last part of the batch, "
            self._diverge(f"{reason}; {part}{self._find_place(model, inputs, _loss_of(own_sums))}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # A scaler of half precision skips such steps itself.
        if self.accelerator.scaler is None and not math.isfinite(norm):
            self._diverge("a gradient is not finite")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= {name: value.item() / self._logged_steps for name, value in self._logged_sums.items()}
            self._logged_sums, self._logged_steps = {}, 0
            logs[TOKENS_PER_SECOND] = self._tokens / (time.perf_counter() - self._counted_from)
            logs |= peak_memory(self.args.device)
        if "divergence" not in logs:  # evaluations, which log too, are left out of the speed
            self._tokens, self._counted_from = 0, time.perf_counter()
        if "eval_loss" in logs and self.is_language_model:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
        super().log(logs, start_time)

    def _refuse_other_losses(self):
        loss_of_its_own = {
            "label_smoothing_factor": self.label_smoother,
            "compute_loss_func": self.compute_loss_func,
        }
        given = [name for name, value in loss_of_its_own.items() if value is not None]
        if given and (penalty := getattr(self.model.config, "penalty", None)):
            raise ValueError(
                f"With {given[0]} the Trainer computes a loss of its own, without the {penalty} asks for: leave it "
                "out, or train a model without the penalty."
            )

    # Divergence

    def _find_divergence(self) -> str | None:
        """Takes up what this step's batches gave; why they can't be trusted, or `None` if they can."""
        sums, self._step_sums = self._over_ranks(self._step_sums), {}
        reason = self.guard.observe(_loss_of(sums).item())
        if reason is None:
            for name in LOGGED:
                if name in sums:
                    self._logged_sums[name] = self._logged_sums.get(name, 0.0) + sums[name]
            self._logged_steps += 1
        return reason

    def _find_place(self, model, inputs, own_loss: torch.Tensor) -> str:
        """Where this step's batches go wrong, in words, by the rank that has the worst of them."""
        scale, place = find_first_bad_layer(model, self._prepare_inputs(inputs))
        if self.accelerator.num_processes == 1:
            return place
        own = (scale == math.inf, not math.isfinite(own_loss), scale, f"on rank {self.args.process_index}, {place}")
        return max(gather_object([own]))[-1]

    def _over_ranks(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parts of all ranks together: they add up where each is divided by the tokens of all."""
        if self.accelerator.num_processes == 1 or not sums:
            return sums
        reduction = "sum" if self.args.average_tokens_across_devices else "mean"
        reduced = self.accelerator.reduce(torch.stack([*sums.values()]), reduction)
        return dict(zip(sums, reduced.unbind(), strict=True))

    def _diverge(self, reason: str):
        """Takes the run back to the last good state, or stops it; its step then changes nothing."""
        guard = self.guard
        self._step_sums = {}
        if guard.action == "rollback" and guard.rollbacks < MOST_ROLLBACKS:
            self._restore_good_state()
            event = f"back to the last good state: {reason}"
        else:
            guard.diverged = event = f"stopped: {reason}"
            self.control.should_training_stop = True
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.scaler is not None:  # which skips a step by itself, but has to see why
            parameter = next(each for group in self.optimizer.param_groups for each in group["params"])
            self.accelerator.scaler.scale(parameter.new_zeros(()))  # nothing was scaled yet if no step came so far
            parameter.grad = torch.full_like(parameter, math.inf)
        guard.events.append([self.state.global_step + 1, event])
        self.log({"divergence": event})

    def _keep_good_state(self):
        self._good_state = {
            "model": {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "guard": self.guard.keep(),
        }

    def _restore_good_state(self):
        self.model.load_state_dict(self._good_state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(self._good_state["optimizer"]))
        self.guard.go_back(self._good_state["guard"], self.state)

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        with self.given_configuration():
            super()._save(output_dir, state_dict)

    @contextlib.contextmanager
    def given_configuration(self) -> Iterator[None]:
        """Within, the model has the configuration that it was given, and not what training needs."""
        config = base_model(self.model).config
        changed = {name: getattr(config, name) for name in self._given}
        vars(config).update(self._given)
        try:
            yield
        finally:
            vars(config).update(changed)

    def _save_checkpoint(self, model, trial):
        """Writes a checkpoint aside, and gives it its name and place when it is whole. None of a run that diverged."""
        if self.guard.diverged is not None:
            return
        if self.guard.action == "rollback":
            self._keep_good_state()
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = folder / STAGING
        if self.args.should_save:
            delete(self._staging)
        self.accelerator.wait_for_everyone()
        try:
            with storing(folder / name):
                super()._save_checkpoint(model, trial)
                written = self._staging / name
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._name_best_checkpoint(written, folder)
                    give_usual_mode(written)
                    seal(written)
                    delete(folder / name)
                    written.replace(folder / name)
        finally:
            self._staging = None
            if self.args.should_save:
                delete(folder / STAGING)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            if self.args.should_save:
                for path in (folder / name).glob("*.py"):  # the `Trainer` would send weights without their code
                    shutil.copy(path, self.args.output_dir)
            super()._push_from_checkpoint(str(folder / name))

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Not while it is being written: what is uploaded has its name."""

    def _name_best_checkpoint(self, written: Path, folder: Path):
        """Where the best checkpoint is the one being written, the state is to name the place that it will have."""
        if self.state.best_global_step and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder / written.name)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))


def freeze_embeddings(model: nn.Module):
    """Leaves the embeddings of tokens and positions without gradients, and with them a head that is tied to them."""
    base = base_model(model)
    for embedding in (base.wte, base.wpe):
        embedding.requires_grad_(False)


def _loss_of(sums: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the guard looks at, of a step's sums."""
    return sums[LOGGED[0]] if LOGGED[0] in sums else sums[OTHER_LOSS]
