"""What happens beside the training steps: the record of them, the progress bar, and Ctrl-C."""

import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_kernels.cli.finetune.memory import peak_bytes


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    loss: float
    tokens: int
    seconds: float


class StepRecorder(TrainerCallback):  # type: ignore[misc]
    """Writes each step into a list and shows it in a progress bar.

    The bar is the callback's own because Trainer's shows neither the speed in tokens nor the memory.
    """

    def __init__(self, steps: list[Step], title: str, device: torch.device) -> None:
        self.steps = steps
        self.title = title
        self.device = device
        self.started = 0.0
        self.tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", dynamic_ncols=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the step's clock."""
        self.started = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Records a step. Trainer has just read its loss, so that the device has finished it."""
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self.started
        tokens = int(state.num_input_tokens_seen) - self.tokens_before
        self.tokens_before += tokens
        self.steps.append(Step(loss=logs["loss"], tokens=tokens, seconds=seconds))
        self.bar.set_postfix_str(
            f"loss {logs['loss']:.3f}, {tokens / seconds:,.0f} tokens/s, "
            f"{peak_bytes(self.device) / 2**30:.2f} GiB",
            refresh=False,
        )
        self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        self.bar.close()


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """Inside a `with`, the first Ctrl-C ends training after the step under way, the second at once.

    An exception in the middle of an optimizer step would leave some adapters one step ahead of others.
    """

    def __init__(self) -> None:
        self.stopped = False

    def __enter__(self) -> "StopOnInterrupt":
        self._previous = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("Ctrl-C: stopping after this step (again: at once)", file=sys.stderr)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells Trainer to stop."""
        if self.stopped:
            control.should_training_stop = True
