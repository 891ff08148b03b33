"""What vLLM is told and how its answers are read, against a stand-in of the few calls that are made to it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trimtab
from trimtab.engines.vllm import EngineError, VLLMSampler, merged
from trimtab.methods.cases import case
from trimtab.policies.builtin import load_policy
from trimtab.policies.draws import Sampling, SamplingError
from trimtab.stages.annotate import sampler_mismatch


class StandIn:
    """Answers as vLLM does, with the policy's own sampler; `off` is added to what it reports."""

    def __init__(self, policy: Any, off: float = 0.0) -> None:
        self.local, self.off, self.resets = policy.sampler, off, 0
        self.loaded: dict[str, torch.Tensor] = {}
        model = SimpleNamespace(load_weights=lambda pairs: self.loaded.update(pairs))
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, asked: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
        out = []
        for one, p in zip(asked, params, strict=True):
            sampling = Sampling(p.max_tokens, p.temperature, 0 if p.top_k == -1 else p.top_k, p.top_p)
            seed = None if p.seed is None else torch.tensor([p.seed])
            made = self.local.sample([one["prompt_token_ids"]], 1, seed, sampling)
            tokens = made.tokens[0][made.mask[0]].tolist()
            logp = [{t: SimpleNamespace(logprob=float(x) + self.off)} for t, x in zip(tokens, made.logp[0])]
            out.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logp)]))
        return out


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.SamplingParams = lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", module)


PROMPTS = [[5, 6, 7], [8, 9]]


def test_rows_come_as_from_the_local_sampler() -> None:
    policy = load_policy("nano", dtype="float64")
    seeds, how = torch.arange(4), Sampling(new_tokens=5, top_k=9, temperature=0.8)
    ours, theirs = policy.sampler.sample(PROMPTS, 2, seeds, how), VLLMSampler(policy, StandIn(policy))
    made = theirs.sample(PROMPTS, 2, seeds, how)
    assert torch.equal(made.mask, ours.mask)
    assert torch.equal(made.tokens[made.mask], ours.tokens[ours.mask])
    assert torch.equal(made.finished, ours.finished)
    torch.testing.assert_close(made.logp.double(), ours.logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [0, 2])
def test_weights_are_handed_over_when_they_changed_and_adapters_are_merged(lora: int) -> None:
    policy = load_policy("nano", dtype="float64", lora=lora)
    engine = StandIn(policy)
    sampler = VLLMSampler(policy, engine)
    assert sampler.hand_over()
    assert not sampler.hand_over()
    with torch.no_grad():
        next(p for p in policy.parameters() if p.requires_grad).add_(1e-3)
    assert sampler.hand_over()
    assert engine.resets == 2
    plain = AutoModelForCausalLM.from_config(policy.causal.config).double().eval()
    missing, unexpected = plain.load_state_dict(engine.loaded, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    ids = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(plain(ids).logits, policy.causal(ids).logits, atol=1e-6, rtol=1e-6)
    assert not any("lora" in name or "base_layer" in name for name, _ in merged(policy.causal))


def test_a_run_samples_through_it_and_reports_how_far_it_is_off() -> None:
    made = case("text")
    method = made.shrink(trimtab.parse("grpo")).then(sampler_mismatch())
    (step,) = trimtab.run(method, made.environment, made.models, until=1)
    assert step.logs["mismatch_max"] < 1e-9  # the local sampler is the trainer's policy
    made = case("text")
    policy: Any = made.models["policy"]
    policy.sampler = VLLMSampler(policy, StandIn(policy, off=0.25))
    (step,) = trimtab.run(method, made.environment, made.models, until=1)
    assert step.logs["mismatch"] == pytest.approx(0.25, abs=1e-5)
    assert step.logs["mismatch_kl"] == pytest.approx(2.718281828**-0.25 - 1 + 0.25, abs=1e-5)


def test_what_cannot_be_answered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("nano", dtype="float64")
    sampler = VLLMSampler(policy, StandIn(policy))
    with pytest.raises(SamplingError, match="needs a token"):
        sampler.sample([[]], 1, torch.arange(1), Sampling())
    with pytest.raises(SamplingError, match="seed"):
        sampler.sample(PROMPTS, 1, None, Sampling())
    broken = VLLMSampler(policy, StandIn(policy, off=float("nan")))
    with pytest.raises(EngineError, match="row 0"):
        broken.sample(PROMPTS, 1, torch.arange(2), Sampling())
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match="not installed"):
        VLLMSampler.beside(policy)


def test_a_temperature_of_each_decisions_own_is_refused() -> None:
    policy = load_policy("nano")
    sampler = VLLMSampler(policy, StandIn(policy))
    adapted = Sampling(2, adapt=lambda logits: torch.ones(len(logits)))
    with pytest.raises(SamplingError, match=r"hapo\(swing=None\)"):
        sampler.sample([[5]], 1, torch.arange(1), adapted)
