"""AdamW with moments in the host's memory, for a model whose optimizer state does not fit on its GPUs.

DeepSpeed's ``offload_optimizer`` is not used, because it sums the gradients of micro-batches in 16 bits, and
because it steps an expert that no token chose with the gradient of an earlier step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lsmoe_ds.parallel.deepspeed_engine import state_device

HOST = torch.device("cpu")
PART = 2**25  # values copied at once; the extra memory is two such parts of weights and gradient
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW names them


class OffloadedAdam(torch.optim.AdamW):
    """Step like fused ``torch.optim.AdamW``, on the host's CPU.

    Gradient and weights are copied to the host part by part, and the weights back. With a GPU, the next part
    is copied while one is stepped.
    """

    on_host = ("step", *MOMENTS)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._buffers: list[tuple[Tensor, Tensor]] = []  # pinned: weights and gradient of a part

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all parameters that have a gradient, one after another."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            for key in MOMENTS:
                state[key] = torch.zeros(parameter.shape, dtype=torch.float32, device=HOST)
        assert parameter.grad is not None
        values, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        moments = [state[key].view(-1) for key in MOMENTS]
        parts = [slice(*ends) for ends in pairwise([*range(0, len(values), PART), len(values)])]

        def step_part(part: slice, own_values: Tensor, own_gradient: Tensor) -> None:
            first, second = (moment[part] for moment in moments)
            adamw(
                [own_values],
                [own_gradient],
                [first],
                [second],
                [],
                [state["step"].clone()],  # AdamW increments it
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

        if self._is_apart(values):
            self._step_copies(values, gradient, parts, step_part)
        else:
            for part in parts:
                step_part(part, values[part], gradient[part])
        state["step"] += 1

    def _is_apart(self, values: Tensor) -> bool:
        """Tell whether the weights must be copied to the host to be stepped."""
        return values.is_cuda

    def _step_copies(
        self,
        values: Tensor,
        gradient: Tensor,
        parts: list[slice],
        step_part: Callable[[slice, Tensor, Tensor], None],
    ) -> None:
        """Step a copy of each part on the host, while the next part is copied there."""
        if not self._buffers:
            weights, gradients = torch.empty(4, PART, dtype=torch.float32, pin_memory=True).split(2)
            self._buffers = list(zip(weights, gradients, strict=True))
        copies = torch.cuda.Stream(values.device)
        copies.wait_stream(torch.cuda.current_stream(values.device))
        arrived: list[torch.cuda.Event] = []

        def fetch(number: int) -> None:
            part = parts[number]
            with torch.cuda.stream(copies):
                for buffer, own in zip(self._buffers[number % 2], (values, gradient), strict=True):
                    buffer[: part.stop - part.start].copy_(own[part], non_blocking=True)
                arrived.append(copies.record_event())

        if parts:
            fetch(0)
        for number, part in enumerate(parts):
            if number + 1 < len(parts):
                fetch(number + 1)  # into the other buffers, after their weights are back on the device
            arrived[number].synchronize()
            own = [buffer[: part.stop - part.start] for buffer in self._buffers[number % 2]]
            step_part(part, *own)
            with torch.cuda.stream(copies):
                values[part].copy_(own[0], non_blocking=True)
        copies.synchronize()  # the next parameter uses the same buffers

    def load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        """Load only the state tensors: learning rates and settings come from the recipe.

        torch's own method would put the moments on the device. DeepSpeed passes ``load_optimizer_states``.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            for key, value in state_dict["state"].get(number, {}).items():
                device = state_device(self, key, parameter.device)
                self.state[parameter][key] = value.to(device, copy=True)
