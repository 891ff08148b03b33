"""Sampling through vLLM, in this process and on its GPU; the trainer's weights are handed over whenever they changed.

    policy = load_policy("Qwen/Qwen3-0.6B", device="cuda")
    policy.sampler = VLLMSampler.beside(policy, gpu_memory_utilization=0.4)

vLLM computes with kernels of its own, so its log-probabilities are not those of the training pass to the last digit.
They come as `logp_behavior`; `stages.annotate.sampler_mismatch` reports how far they are from the trainer's, and a
method that weighs by `logp_old - logp_behavior` corrects for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.policies.decoders import is_linear, weight_of
from trimtab.policies.draws import Sampling, SamplingError
from trimtab.policies.sampler import Rollout


class EngineError(TrimtabError):
    """An engine is missing, or gave what cannot be used."""


class VLLMSampler:
    """A `Sampler` over a `vllm.LLM` that runs in this process.

    policy: the `LanguagePolicy` whose present weights answer; adapters are merged into what is handed over. llm: built
    with `logprobs_mode="processed_logprobs"`, or what it reports is not the distribution it sampled from.

    Each row has its own seed, but vLLM does not promise the same answer in another batch: a run that samples through
    it resumes exactly in its state, and its further rollouts may differ.
    """

    def __init__(self, policy: Any, llm: Any) -> None:
        self.policy, self.llm = policy, llm
        self._handed: tuple[Any, ...] | None = None

    @classmethod
    def beside(cls, policy: Any, **options: Any) -> VLLMSampler:
        """Open vLLM on the files the policy came from; options go to `vllm.LLM`. Raises EngineError without vLLM."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise EngineError(
                "vLLM is not installed here; pip install 'trimtab[scale]' on a machine with a GPU, or leave the "
                "policy its own sampler"
            ) from error
        if not policy.source:
            raise EngineError(f"{policy.name!r} has no files that vLLM could open; save it and load it from its folder")
        return cls(policy, LLM(model=policy.source, logprobs_mode="processed_logprobs", **options))

    def sample(self, prompts: list[list[int]], copies: int, seeds: Tensor | None, sampling: Sampling) -> Rollout:
        """As `LocalSampler.sample`: `len(prompts) * copies` rows, all copies of prompt 0 first.

        Raises SamplingError for no prompts, an empty one, missing seeds, or a temperature of each decision's own
        (`sampling.adapt`), EngineError for an answer without numbers.
        """
        from vllm import SamplingParams

        rows = len(prompts) * copies
        if not rows or not all(prompts):
            raise SamplingError(f"asked for {copies} copies of {len(prompts)} prompts; each needs a token and a copy")
        if seeds is None and not sampling.greedy:
            raise SamplingError(f"temperature={sampling.temperature} needs noise, so every row needs a seed")
        if sampling.adapt is not None and not sampling.greedy:
            raise SamplingError(
                "vLLM draws a whole answer at one temperature, and this method adapts it to every decision; leave the "
                "policy its own sampler, or switch that part off (hapo(swing=None))"
            )
        self.hand_over()
        each = [None] * rows if seeds is None else [int(s) & (2**63 - 1) for s in seeds.tolist()]
        asked = [{"prompt_token_ids": p} for p in prompts for _ in range(copies)]
        ends = self.policy.ends
        params = [
            SamplingParams(
                max_tokens=sampling.new_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                top_k=sampling.top_k or -1, seed=seed, logprobs=0, stop_token_ids=list(ends), detokenize=False,
            )
            for seed in each
        ]  # fmt: skip
        answers = [output.outputs[0] for output in self.llm.generate(asked, params, use_tqdm=False)]
        said = [[int(t) for t in answer.token_ids] for answer in answers]
        logp = [[step[t].logprob for t, step in zip(tokens, a.logprobs)] for tokens, a in zip(said, answers)]
        bad = [i for i, line in enumerate(logp) if not line or not all(math.isfinite(x) for x in line)]
        if bad:
            raise EngineError(f"vLLM gave row {bad[0]} no finite log-probabilities: {logp[bad[0]][:3]}")
        width = max(map(len, said))
        short = [width - len(t) for t in said]
        return Rollout(
            torch.tensor([t + [self.policy.fill] * s for t, s in zip(said, short)]),
            torch.tensor([[True] * len(t) + [False] * s for t, s in zip(said, short)]),
            torch.tensor([line + [0.0] * s for line, s in zip(logp, short)], dtype=torch.float32),
            torch.tensor([t[-1] in ends for t in said]),
        )

    def hand_over(self) -> bool:
        """Give vLLM the trainer's weights if they changed since the last time; whether they had."""
        stamp = self.policy.stamp()
        if stamp == self._handed:
            return False
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        for name, weight in merged(self.policy.causal):
            model.load_weights([(name, weight)])
        self.llm.reset_prefix_cache()
        self._handed = stamp
        return True


@torch.no_grad()
def merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a model's weights as in a checkpoint without adapters, one at a time; tied ones once."""
    linear = {name: layer for name, layer in model.named_modules() if is_linear(layer) and ".lora_" not in name}
    adapted = {name for name, layer in linear.items() if hasattr(layer, "base_layer")}
    for name, value in model.named_parameters():
        owner, _, leaf = name.replace(".base_layer", "").rpartition(".")
        if ".lora_" in name:
            continue
        plain = f"{owner}.{leaf}" if owner else leaf
        yield plain, weight_of(linear[owner]) if owner in adapted and leaf == "weight" else value
