"""Policy optimization methods as small named changes to one loop: composable, resumable, tested against their papers.

method = trimtab.parse("grpo")
policy = trimtab.load_policy("smollm2")
environment = trimtab.load_environment("reasoning-gym:chain_sum(min_terms=2,max_terms=2)")
for step in trimtab.run(method, environment, policy, until=60):
    print(step.turn, step.logs["reward"])
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Names are imported when first used: `trimtab --help` must not wait for torch.
_HOMES = {
    "Batch": "trimtab.core.batch",
    "Evaluator": "trimtab.evaluation",
    "Method": "trimtab.core.method",
    "Term": "trimtab.core.terms",
    "begin": "trimtab.core.loop",
    "diff": "trimtab.core.method",
    "evaluate": "trimtab.evaluation",
    "load": "trimtab.core.state",
    "load_environment": "trimtab.environments.text",
    "load_policy": "trimtab.policies.builtin",
    "method": "trimtab.core.registry",
    "parse": "trimtab.core.registry",
    "piece": "trimtab.core.piece",
    "run": "trimtab.core.loop",
    "save": "trimtab.core.state",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"trimtab has no {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)
