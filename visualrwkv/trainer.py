"""What all training stages share: transformers' Trainer with our parameter groups, data order, resume and interruption.

The Trainer's habits that cost time or exactness are switched off here: one pass over one numbered sequence of samples
(no epoch ends), no per-step NaN tests or FLOP counts, autocast around the loss alone (accelerate's would copy all
logits to float32), parameters grouped by part of the model.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from visualrwkv.errors import InputError
from visualrwkv.loading import quiet_transformers
from visualrwkv.ops.wide import slow_in_bfloat16
from visualrwkv.recipe import save_recipe
from visualrwkv.runs import (
    is_main_process,
    newest_checkpoint,
    note_step_size,
    resume_from,
    samples_per_step,
    world_size,
    writing,
)

_IN_WORKER = "in DataLoader worker process"
# arrays of one number per channel, whatever shape they are stored in: weight decay is not for them
_VECTORS = ("time_faaaa", "time_decay", "pos_embed", "positional_embedding", "class_embedding", "cls_token")


class StageTrainer(Trainer):
    """The Trainer of every stage.

    Args:
        recipe: `recipe.Recipe`.
        groups: parameter groups of `parameter_groups`.
    """

    def __init__(self, recipe, groups, **kwargs):
        super().__init__(**kwargs)
        self.recipe, self.groups = recipe, groups
        self._loader = None
        self.skipped = {}  # name of a sample that could not be used -> why
        self._narrow = recipe.precision == "bf16"
        if self._narrow and self.args.device.type == "cpu" and slow_in_bfloat16():
            self._narrow = False
            if is_main_process():
                reason = "this processor has no units for bfloat16 and is several times as fast in float32"
                print(f"precision: {reason}, so the run computes in float32", file=sys.stderr)

    def get_train_dataloader(self):
        """The samples in the order of their numbers: shuffling and curriculum are in the dataset, and a resumed run
        goes on at the right number without drawing what it skips."""
        workers = min(self.recipe.workers, _cores())  # more would only wait for each other
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=self.args.device.type == "cuda",
        )
        self._loader = self.accelerator.prepare(loader)
        return self._loader

    def end_workers(self):
        """Let the processes that prepare samples end. They hear no signal, so Python, which ends what is left of them
        by one, would wait for them for ever where an error keeps their loader alive."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            fused = all(p.device.type in ("cpu", "cuda") for group in self.groups for p in group["params"])
            self.optimizer = torch.optim.AdamW(self.groups, betas=self.recipe.betas, eps=1e-8, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            share = rate_schedule(self.recipe.warmup, num_training_steps, self.recipe.final_rate)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The moments and the step of the checkpoint, the rates and decays of the recipe: who changes them for the rest
        of a run means it."""
        wanted = [dict(group) for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if checkpoint and "parameter group" in str(error):
                raise InputError(
                    f"{checkpoint}: other parts learned there than 'train' and 'weight_decay' name now; choose another "
                    "output, and model.from to begin with what was learned"
                ) from error
            raise
        scheduler = self.lr_scheduler
        scheduler.base_lrs = [group["initial_lr"] for group in wanted]
        shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
        for group, of_recipe, share in zip(self.optimizer.param_groups, wanted, shares, strict=True):
            kept = {name: of_recipe[name] for name in ("initial_lr", "weight_decay", "betas")}
            group.update(kept, lr=of_recipe["initial_lr"] * share)

    def autocast_smart_context_manager(self, cache_enabled=True):
        if self._narrow:
            return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=cache_enabled)
        return contextlib.nullcontext()

    def training_step(self, model, inputs, num_items_in_batch=None):
        for name, reason in inputs.pop("skipped", ()):
            if name not in self.skipped:
                self.skipped[name] = reason
                print(f"skipped {name}: {reason}", file=sys.stderr)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def floating_point_ops(self, inputs):
        return 0

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with writing(folder, self.args.output_dir):
            if is_main_process():  # first, since the checkpoint is complete with what is written last
                note_step_size(self.recipe, folder)
            super()._save_checkpoint(model, trial)


def _start_worker(worker):
    """Ctrl-C and job schedulers reach all processes of a group; only the main one may answer, the others must go on
    delivering until it has written its checkpoint (they end with it)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def rate_schedule(warmup, steps, final):
    """Share of the highest learning rate as a function of the step: a linear warm-up, then a cosine down to `final`.

    A plain function, since a checkpoint would keep the attributes of an object: a run that goes on with another number
    of steps shall follow the new schedule.
    """

    def share(step):
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return share


class Progress(TrainerCallback):
    """The recipe in the output folder, a bar on stderr, and one JSON line in log.jsonl for every logged step."""

    def __init__(self, recipe, evaluate=None):
        self.recipe, self.evaluate, self.bar = recipe, evaluate, None

    def on_train_begin(self, args, state, control, **kwargs):
        from tqdm import tqdm

        # those of a checkpoint would hold for the rest of the run
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        if state.is_world_process_zero:  # not before: what cannot be gone on with must not replace the recipe
            with writing(None, args.output_dir):
                save_recipe(self.recipe, Path(args.output_dir) / "recipe.yaml")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.recipe.stage,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not state.is_world_process_zero,
        )
        self.since, self.last_step = time.perf_counter(), state.global_step

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates = {group["part"]: group["lr"] for group in optimizer.param_groups}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bar.update(1)
        if control.should_save:  # no loss between two lines is lost with a stop, and none that is no number is saved
            control.should_log = True
        every = self.recipe.eval.every
        if self.evaluate and every and (state.global_step % every == 0 or state.global_step == state.max_steps):
            before = time.perf_counter()
            if state.is_world_process_zero:
                result = self.evaluate()
                self._write(args, {"step": state.global_step, "eval": result})
                line = ", ".join(f"{name} {value:.3g}" for name, value in result.items())
                self.bar.write(f"step {state.global_step}: {line}", file=sys.stderr)
            self.since += time.perf_counter() - before  # samples/s speaks of training alone

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name) or 0):
                last = newest_checkpoint(args.output_dir)
                raise InputError(
                    f"step {state.global_step}: {name} is {logs[name]}, nothing can be learned from here on; lower the "
                    "rates of 'train' or raise 'warmup'"
                    + (f"; resume={last} goes on from the last checkpoint before it" if last else "")
                )
        steps, now = state.global_step - self.last_step, time.perf_counter()
        samples = steps * samples_per_step(self.recipe)
        entry = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "lr": self.rates,
            "samples_per_s": round(samples / (now - self.since), 2),
        }
        self.since, self.last_step = now, state.global_step
        self.bar.set_postfix(loss=f"{entry['loss']:.4f}", per_s=entry["samples_per_s"], refresh=False)
        self._write(args, entry)

    def close(self):
        """Ends the bar's line, so that what follows on stderr starts a new one."""
        if self.bar is not None:
            self.bar.close()

    def _write(self, args, entry):
        with writing(None, args.output_dir), open(Path(args.output_dir) / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Interruption(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint and an orderly end; a second SIGINT stops at once.

    `signal` is the number of the signal that came, or None.
    """

    def __init__(self):
        self.signal, self._former = None, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere they stay as they are
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, self._former[number])

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # all processes stop at the same step, whichever of them the signal reached first
            number = torch.tensor(self.signal or 0, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.signal = int(number) or None
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
        return control


def parameter_groups(named_parameters, part_of, rates, weight_decay):
    """Marks what learns and groups it: one group for the matrices and one for the vectors of each part.

    Args:
        named_parameters: (name, parameter) pairs; `requires_grad` is set on each.
        part_of: name -> part, or None for what never learns.
        rates: part -> highest learning rate; 0 or missing is frozen.

    Returns:
        Groups for AdamW, each with its `part`.
    """
    groups = {}
    for name, parameter in named_parameters:
        rate = rates.get(part_of(name), 0.0)
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            decay = weight_decay if is_matrix(name, parameter) else 0.0
            key = (part_of(name), decay > 0)
            group = {"params": [], "lr": rate, "weight_decay": decay, "part": part_of(name)}
            groups.setdefault(key, group)["params"].append(parameter)
    if not groups:
        raise InputError(f"train: {rates} leaves no parameter that learns")
    return list(groups.values())


def is_matrix(name, parameter):
    """Whether weight decay may shrink it: two dimensions above 1 ((1, 1, C) is a vector), and no list of vectors."""
    return sum(size > 1 for size in parameter.shape) >= 2 and not name.endswith(_VECTORS)


def train(recipe, model, dataset, collator, groups, steps, processor=None, evaluate=None):
    """Runs the stage from its beginning or its newest checkpoint.

    Returns:
        0 when it ran to its end, 128 + the signal's number when it was interrupted (a checkpoint was written).
    """
    resume = resume_from(recipe)
    if resume and is_main_process():
        print(f"goes on from {resume}", file=sys.stderr)
    interruption, progress = Interruption(), Progress(recipe, evaluate)
    trainer = StageTrainer(
        recipe,
        groups,
        model=model,
        args=_arguments(recipe, steps),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=[interruption, progress],
    )
    _drop_printer(trainer)
    with interruption, quiet_transformers():
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except RuntimeError as error:
            if resume and "size mismatch" in str(error):
                raise InputError(
                    f"{resume}: the checkpoint is of another model; choose another output or resume=none"
                ) from error
            if "DataLoader worker" in str(error):
                raise InputError(
                    f"a process that prepares samples ended ({str(error).splitlines()[0]}); out of memory? Use fewer "
                    "workers, or a smaller batch_size and more accumulate, and go on from the newest checkpoint"
                ) from None
            raise
        except InputError as error:
            if _IN_WORKER in str(error):  # with the worker's traceback in front
                raise InputError(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
            raise
        finally:
            progress.close()
            trainer.end_workers()
    if trainer.skipped:
        print(f"{len(trainer.skipped)} samples could not be used and were skipped", file=sys.stderr)
    if interruption.signal is not None and trainer.state.global_step < steps:
        if is_main_process():
            kept = Path(recipe.output) / f"checkpoint-{trainer.state.global_step}"
            way = f"the same command resumes from {kept}" if recipe.resume == "auto" else f"resume={kept} goes on"
            print(f"stopped at step {trainer.state.global_step} of {steps}; {way}", file=sys.stderr)
        return 128 + interruption.signal
    return 0


def _cores():
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _arguments(recipe, steps):
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    args = TrainingArguments(
        output_dir=str(recipe.output),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        max_grad_norm=recipe.clip,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep,
        seed=recipe.seed,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and world_size() > 1 else None,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs are for several processes (torchrun), not for DataParallel
    return args


def _drop_printer(trainer):
    """Without the Trainer's own bar it prints every log entry on stdout, where nothing but results belongs."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
