"""A literal twin of PROPS' behavior update on linear Gaussian policies: closed forms, loops, and Adam written out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Linear:
    """`mu(s) = w . s + b`, log sigma; one action number. A row of `flat` is [w..., b, log_std]."""

    w: list[float]
    b: float
    log_std: float

    def flat(self) -> list[float]:
        return [*self.w, self.b, self.log_std]

    @classmethod
    def of(cls, flat: list[float]) -> Linear:
        return cls(flat[:-2], flat[-2], flat[-1])

    def mean(self, s: list[float]) -> float:
        return sum(w * x for w, x in zip(self.w, s)) + self.b

    def logp(self, s: list[float], a: float) -> float:
        z = (a - self.mean(s)) / math.exp(self.log_std)
        return -0.5 * z * z - self.log_std - 0.5 * math.log(2 * math.pi)

    def score(self, s: list[float], a: float) -> list[float]:
        sigma = math.exp(self.log_std)
        z = (a - self.mean(s)) / sigma
        return [*(z / sigma * x for x in s), z / sigma, z * z - 1]


@dataclass
class Adam:
    """Kingma and Ba's Adam, one list of numbers."""

    size: int
    lr: float
    eps: float = 1e-5
    t: int = 0
    m: list[float] = field(default_factory=list)
    v: list[float] = field(default_factory=list)

    def step(self, x: list[float], g: list[float]) -> list[float]:
        self.m, self.v, self.t = self.m or [0.0] * self.size, self.v or [0.0] * self.size, self.t + 1
        self.m = [0.9 * m + 0.1 * y for m, y in zip(self.m, g)]
        self.v = [0.999 * v + 0.001 * y * y for v, y in zip(self.v, g)]
        grown, spread = 1 - 0.9**self.t, 1 - 0.999**self.t
        return [p - self.lr * (m / grown) / (math.sqrt(v / spread) + self.eps) for p, m, v in zip(x, self.m, self.v)]


def behavior(
    theta: Linear, rows: list[tuple[list[float], float]], adam: Adam, *,
    eps: float, kl_coef: float, limit: float, epochs: int, clip: float,
) -> tuple[Linear, int]:  # fmt: skip
    """phi after one update on `rows` (state, action), and how many steps it took; one minibatch an epoch."""
    phi = theta
    for made in range(epochs):
        if not rows:
            return phi, made
        gradient, kl = [0.0] * adam.size, 0.0
        s_t, s_p = math.exp(theta.log_std), math.exp(phi.log_std)
        for s, a in rows:
            log_rho = phi.logp(s, a) - theta.logp(s, a)
            rho = math.exp(log_rho)
            kl += ((rho - 1) - log_rho) / len(rows)
            if rho >= 1 - eps:
                gradient = [g + rho * x / len(rows) for g, x in zip(gradient, phi.score(s, a))]
            apart = (phi.mean(s) - theta.mean(s)) / s_t**2
            pull = [*(apart * x for x in s), apart, s_p**2 / s_t**2 - 1]
            gradient = [g + kl_coef * x / len(rows) for g, x in zip(gradient, pull)]
        if kl > limit:
            return phi, made
        norm = math.sqrt(sum(g * g for g in gradient))
        gradient = [g * min(1.0, clip / (norm + 1e-6)) for g in gradient]
        phi = Linear.of(adam.step(phi.flat(), gradient))
    return phi, epochs


def away(theta: Linear, rows: list[tuple[list[float], float]], *, lr: float) -> Linear:
    """ROS: `phi = theta - lr mean grad log pi_theta(a|s)`, away from what was done; theta where nothing was."""
    phi = theta.flat()
    for s, a in rows:
        phi = [p - lr * g / len(rows) for p, g in zip(phi, theta.score(s, a))]
    return Linear.of(phi)
