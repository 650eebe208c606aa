"""Optimizers: turn gradients into new parameter values. Update rules and defaults are PyTorch's."""

import numpy as np

from .tensor import Tensor

__all__ = ["SGD", "AdamW", "Optimizer"]


class Optimizer:
    """Holds the parameters and what is remembered about each between steps.

    ``step`` replaces ``parameter.data`` by a new array, and skips parameters without a gradient.
    Raises: ValueError if there is nothing to optimize or ``lr`` is not above 0.
    """

    def __init__(self, parameters: list[Tensor], lr: float):
        self.parameters = list(parameters)
        if not self.parameters or not all(p.requires_grad for p in self.parameters):
            raise ValueError("parameters: expected at least one Tensor, all with requires_grad=True")
        if not lr > 0:
            raise ValueError(f"lr: expected a number above 0, got {lr}")
        self.lr = lr
        self.state: list[dict] = [{} for _ in self.parameters]

    def zero_grad(self) -> None:
        """Forget all gradients; call it before each backward."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for parameter, state in zip(self.parameters, self.state, strict=True):
            if parameter.grad is not None:
                parameter.data = self._updated(parameter.data, parameter.grad, state)

    def _updated(self, data: np.ndarray, grad: np.ndarray, state: dict) -> np.ndarray:
        raise NotImplementedError


class SGD(Optimizer):
    """Stochastic gradient descent: v = momentum · v + g, p = p - lr · v.

    v is a running sum of gradients: steps add up along directions that persist and cancel along
    those that flip (Sutskever et al. 2013, ICML). Memory: one array a parameter with momentum.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.0):
        super().__init__(parameters, lr)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        self.momentum = momentum

    def _updated(self, data: np.ndarray, grad: np.ndarray, state: dict) -> np.ndarray:
        if self.momentum:
            grad = state["v"] = self.momentum * state.get("v", 0.0) + grad
        return data - self.lr * grad


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Kingma and Ba 2015, ICLR; Loshchilov and Hutter 2019, ICLR).

    m and v are running means of g and g². They start at 0, so after t steps they hold only a
    fraction 1 - βᵗ of a full mean; dividing by that corrects the bias. The decay shrinks p itself
    and never enters m or v: that is what "decoupled" means. Memory: two arrays a parameter.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(parameters, lr)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def _updated(self, data: np.ndarray, grad: np.ndarray, state: dict) -> np.ndarray:
        beta1, beta2 = self.betas
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * grad
        v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * grad * grad
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        return data * (1 - self.lr * self.weight_decay) - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
