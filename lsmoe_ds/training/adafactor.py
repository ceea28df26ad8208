"""Adafactor on whole parameters, in any parallel layout, in float32 or bfloat16.

``torch.optim.Adafactor`` has no momentum, always scales by the parameter, and updates bfloat16 weights in
bfloat16. That of ``transformers`` does not support tensor parallelism and keeps no float32 weights; this one
computes the same steps.

G gradient [..., n, m], R means of its squares over rows [..., n], C over columns [..., m].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lsmoe_ds.config.optimizer import Adafactor as Settings
from lsmoe_ds.config.optimizer import averaged_shape
from lsmoe_ds.parallel.deepspeed_engine import VALUES
from lsmoe_ds.parallel.parameters import partition_dimension
from lsmoe_ds.parallel.topology import Topology

ROW, COLUMN = Settings.averaged  # the names of R and C among the state tensors
WHOLE = "exp_avg_sq"  # the second moment of a vector
MOMENTUM = "exp_avg"
EPSILON = 1e-30  # added to squares ("Adafactor", section 7: epsilon_1)
SMALLEST_SCALE = 1e-3  # the least root mean square of a parameter that scales its step (epsilon_2)


class Adafactor(torch.optim.Optimizer):
    """Step each parameter by

        v = 1 - t^-c                                 beta_2 in step t
        R = v R + (1 - v) mean_m(G^2 + epsilon)      C likewise, over n; of a vector V, whole
        U = G / sqrt(R C / mean(R))                  of a vector G / sqrt(V)
        X = X - a U / max(1, RMS(U) / d)             a: learning rate, or max(epsilon_2, RMS(X)) times it

    "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", algorithms 4 and 5. With momentum beta_1,
    X moves by the running mean of the updates. Weight decay w subtracts w a X from X.

    Means and root mean squares are those of the whole parameter: tensor-parallel ranks add up their parts, so
    that all layouts take the same steps. Gradients must be those of the whole step.

    16-bit parameters are copies of float32 values in the state. Without ``master_weights`` they are instead
    rounded up or down at random, so that the mean is kept; the random numbers depend only on the seed, the
    step and the parameter's global name.
    """

    averaged = Settings.averaged  # which state tensors lack a dimension: see OptimizerSettings

    def __init__(
        self,
        groups: list[dict[str, Any]],
        settings: Settings,
        weight_decay: float,
        names: Mapping[nn.Parameter, str],
        seed: int,
        topology: Topology,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "eps": EPSILON, "weight_decay": weight_decay})
        self.settings, self.names, self.seed, self.topology = settings, names, seed, topology
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._new_state(parameter)

    def _new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=parameter.device)

        kept = self.averaged if parameter.dim() > 1 else {WHOLE: None}
        state = {key: zeros(averaged_shape(parameter.shape, over)) for key, over in kept.items()}
        if self.settings.momentum:
            state[MOMENTUM] = zeros(tuple(parameter.shape))
        if self.settings.master_weights and parameter.dtype != torch.float32:
            state[VALUES] = parameter.detach().float()
        return {"step": torch.tensor(0.0), **state}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all parameters that have a gradient, one after another."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, settings = self.state[parameter], self.settings
        state["step"] += 1
        values = state.get(VALUES, parameter).float()  # not a copy if it is float32 already
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        rate = values.new_full((), group["lr"])  # torch.tensor would wait for the device
        if settings.scale_parameters:
            rate *= self._root_mean_square(values, parameter).clamp_(min=SMALLEST_SCALE)
        update = self._scaled(gradient, state, parameter, group["eps"])
        largest = self._root_mean_square(update, parameter) / settings.clip_threshold
        update.mul_(rate / largest.clamp_(min=1.0))
        if settings.momentum:
            update = state[MOMENTUM].lerp_(update, 1 - settings.momentum)
        if group["weight_decay"]:
            values.mul_(1 - group["weight_decay"] * rate)
        values.sub_(update)
        if values.dtype == parameter.dtype:
            return
        if VALUES not in state:
            self._shake(values, parameter, int(state["step"]))
        parameter.copy_(values)

    def _scaled(
        self, gradient: Tensor, state: dict[str, Tensor], parameter: nn.Parameter, epsilon: float
    ) -> Tensor:
        """Update the second moments, and return the gradient divided by their square roots."""
        new = float(state["step"]) ** -self.settings.decay
        squares = gradient.square().add_(epsilon)
        if WHOLE in state:
            moments = state[WHOLE].lerp_(squares, new)
            return torch.rsqrt(moments, out=squares).mul_(gradient)
        means = self._means(squares, parameter)
        rows, columns = (state[key].lerp_(means[key], new) for key in (ROW, COLUMN))
        # Rows and columns have the same overall mean, but a factor whose dimension is spread over ranks holds
        # only a part: use the other one.
        spread = partition_dimension(parameter)
        all_values = columns if spread == gradient.dim() - 2 else rows
        by_row = (rows / all_values.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        return torch.mul(by_row, columns.rsqrt().unsqueeze(-2), out=squares).mul_(gradient)

    def _means(self, squares: Tensor, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Average the squares of a matrix over columns and over rows, including other ranks' parts."""
        means = {key: squares.mean(over) for key, over in self.averaged.items()}
        spread = partition_dimension(parameter)
        for key, over in self.averaged.items():
            if spread == squares.dim() + over:
                dist.all_reduce(means[key], group=self.topology.tensor_group)
                means[key] /= self.topology.tensor
        return means

    def _root_mean_square(self, values: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the root mean square over the whole parameter; ``values`` is this rank's part."""
        squares, count = torch.linalg.vector_norm(values).square(), values.numel()
        if partition_dimension(parameter) is not None:
            dist.all_reduce(squares, group=self.topology.tensor_group)
            count *= self.topology.tensor
        return (squares / count).sqrt_()

    def _shake(self, values: Tensor, parameter: nn.Parameter, step: int) -> None:
        """Round float32 values to bfloat16 at random: up with a probability equal to the cut-off fraction.

        All ranks draw the noise of the whole parameter, so that ranks with the same values round alike.
        """
        digest = hashlib.sha256(f"{self.seed} {step} {self.names[parameter]}".encode()).digest()
        generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest[:7], "little"))
        dimension, shape = partition_dimension(parameter), list(values.shape)
        if dimension is not None:
            shape[dimension] *= self.topology.tensor
        noise = torch.randint(2**16, shape, dtype=torch.int32, generator=generator, device=values.device)
        if dimension is not None:
            noise = noise.chunk(self.topology.tensor, dimension)[self.topology.tensor_rank]
        values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))  # bfloat16 is the upper 16 bits

    def load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        """Load only the state tensors: learning rates and settings come from the recipe.

        Those that are not Adafactor's own, such as the moving average of the weights, are kept beside its
        own. torch's own method would round the tensors to the parameter's 16 bits. DeepSpeed passes
        ``load_optimizer_states``.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            own = self.state[parameter]
            for key, value in state_dict["state"][number].items():
                if key in own:
                    own[key].copy_(value)
                else:
                    own[key] = value.to(parameter.device, copy=True)
