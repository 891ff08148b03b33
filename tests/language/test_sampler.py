"""Sampling: equal to transformers' generate, to the softmax, and to itself however rows are batched."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from trimtab.core.batch import Batch
from trimtab.policies.builtin import character_tokenizer, load_policy
from trimtab.policies.decoders import ModuleDecoder
from trimtab.policies.draws import draw, narrow, uniforms
from trimtab.policies.language import LanguagePolicy
from trimtab.policies.llama_decoder import LlamaDecoder
from trimtab.policies.sampler import LocalSampler, Rollout, Sampling, SamplingError, pad_left

PROMPTS = ["3 + 4 =", "a", "what is nine times nine?"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prompts_of(policy: LanguagePolicy) -> list[list[int]]:
    return [policy.encode(p) for p in PROMPTS]


def general(policy: LanguagePolicy) -> LocalSampler:
    """The sampler over transformers' own forward."""
    decoder = ModuleDecoder(policy.causal, policy.autocast)
    return LocalSampler(lambda: decoder, policy.ends, policy.fill, policy.wide)


def batch_of(
    policy: LanguagePolicy, prompts: list[list[int]], copies: int, rollout: Rollout, temperature: float
) -> Batch:
    prompt, prompt_mask = pad_left([p for p in prompts for _ in range(copies)], policy.fill)
    scale = torch.full((len(prompt),), temperature, dtype=torch.float64)
    return Batch(
        {
            "prompt": prompt,
            "prompt_mask": prompt_mask,
            "action": rollout.tokens,
            "mask": rollout.mask,
            "temperature": scale,
        }
    )


@pytest.mark.parametrize("fast", [True, False])
def test_greedy_is_generate(fast: bool) -> None:
    policy = load_policy("nano", seed=3)
    sampler = policy.sampler if fast else general(policy)
    prompts = prompts_of(policy)
    rollout = sampler.sample(prompts, 1, None, Sampling(24, temperature=0))
    for row, prompt in enumerate(prompts):
        given = torch.tensor([prompt])
        out = policy.causal.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=24, pad_token_id=policy.fill
        )
        assert rollout.tokens[row][rollout.mask[row]].tolist() == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_reported_logp_is_evaluated_logp(fast: bool, temperature: float) -> None:
    policy = load_policy("nano", dtype="float64")
    prompts, seeds = prompts_of(policy), torch.arange(12)
    rollout = (policy.sampler if fast else general(policy)).sample(prompts, 4, seeds, Sampling(16, temperature))
    now = policy.evaluate(batch_of(policy, prompts, 4, rollout, temperature), {"logp"})["logp"]
    torch.testing.assert_close(now, rollout.logp, atol=1e-12, rtol=0)
    assert (rollout.logp[~rollout.mask] == 0).all()


def test_greedy_reports_temperature_one() -> None:
    policy = load_policy("nano", dtype="float64")
    prompts = prompts_of(policy)
    rollout = policy.sampler.sample(prompts, 1, None, Sampling(8, temperature=0))
    now = policy.evaluate(batch_of(policy, prompts, 1, rollout, 1.0), {"logp"})["logp"]
    torch.testing.assert_close(now, rollout.logp, atol=1e-12, rtol=0)


def test_a_row_depends_on_its_seed_alone() -> None:
    policy = load_policy("nano", dtype="float64")
    prompts, seeds, how = prompts_of(policy), torch.tensor([5, -1, 2**40, 5, 7, 8]), Sampling(20, 1.3)
    together = policy.sampler.sample(prompts, 2, seeds, how)
    for row in range(6):
        alone = policy.sampler.sample([prompts[row // 2]], 1, seeds[row : row + 1], how)
        width = alone.tokens.shape[1]
        assert torch.equal(alone.tokens[0], together.tokens[row, :width])
        assert torch.equal(alone.mask[0], together.mask[row, :width])
        assert not together.mask[row, width:].any()
        torch.testing.assert_close(alone.logp[0], together.logp[row, :width], atol=1e-12, rtol=0)


def test_copies_are_the_prompt_repeated() -> None:
    policy = load_policy("nano", dtype="float64")
    prompts, seeds = prompts_of(policy), torch.arange(9)
    copied = policy.sampler.sample(prompts, 3, seeds, Sampling(12))
    repeated = policy.sampler.sample([p for p in prompts for _ in range(3)], 1, seeds, Sampling(12))
    assert torch.equal(copied.tokens, repeated.tokens)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("nano", dtype="float64")
    prompts, seeds, how = prompts_of(policy), torch.arange(12), Sampling(20, 0.9)
    whole = policy.sampler.sample(prompts, 4, seeds, how)
    monkeypatch.setattr("trimtab.policies.sampler.ROWS_AT_ONCE", 4)
    parts = policy.sampler.sample(prompts, 4, seeds, how)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.mask, parts.mask)
    assert torch.equal(whole.finished, parts.finished)


def test_end_token_stops_a_row() -> None:
    policy = load_policy("nano", dtype="float64")
    rollout = policy.sampler.sample(prompts_of(policy), 64, torch.arange(192), Sampling(30, 1.5))
    ends = torch.tensor(policy.ends)
    for tokens, mask, finished in zip(rollout.tokens, rollout.mask, rollout.finished):
        said = tokens[mask]
        assert mask[: len(said)].all()
        assert bool(torch.isin(said[-1], ends)) == bool(finished)
        assert not torch.isin(said[:-1], ends).any()
        assert (tokens[~mask] == policy.fill).all()
    assert rollout.finished.any()
    assert not rollout.finished.all()
    assert rollout.tokens.shape[1] == int(rollout.mask.sum(1).max())


def test_draws_follow_the_softmax() -> None:
    """Pearson's chi-square of 20000 draws over 12 tokens, 11 degrees of freedom; 31.3 is the 0.1 % point."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    n, how = 20000, Sampling(1, 0.8)
    token, logp = draw(logits[None], torch.zeros(n, dtype=torch.long), uniforms(torch.arange(n), 1)[:, 0], how)
    expected = (logits / 0.8).softmax(0) * n
    assert float(((token.bincount(minlength=12) - expected).square() / expected).sum()) < 31.3
    torch.testing.assert_close(logp, (logits / 0.8).log_softmax(0)[token])


def test_extreme_uniforms_stay_inside_the_support() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    token, logp = draw(logits, torch.arange(2), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), Sampling())
    assert token.tolist() == [1, 2]
    assert logp.isfinite().all()


def test_rows_share_a_distribution_in_any_order() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    slot = torch.tensor([2, 0, 2, 2, 0])
    noise = uniforms(torch.arange(5), 1)[:, 0]
    shared = draw(logits, slot, noise, Sampling())
    apart = draw(logits[slot], torch.arange(5), noise, Sampling())
    assert torch.equal(shared[0], apart[0])
    assert torch.equal(shared[1], apart[1])


def test_equal_pasts_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("nano")
    widths, step = [], LlamaDecoder.step
    monkeypatch.setattr(LlamaDecoder, "step", lambda self, t: widths.append(len(t)) or step(self, t))
    policy.sampler.sample(prompts_of(policy), 16, None, Sampling(4, temperature=0))
    assert max(widths) <= 3
    widths.clear()
    policy.sampler.sample([policy.encode("a")], 64, torch.zeros(64, dtype=torch.long), Sampling(4))
    assert set(widths) <= {1}


def test_top_k_and_top_p_keep_the_right_tokens() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert narrow(logits, Sampling(top_k=2)).isfinite().tolist() == [[True, True, False, False]]
    # 0.4 + 0.3 = 0.7 crosses 0.65: the crossing token stays.
    assert narrow(logits, Sampling(top_p=0.65)).isfinite().tolist() == [[True, True, False, False]]
    assert narrow(logits, Sampling(top_p=0.75)).isfinite().tolist() == [[True, True, True, False]]
    # After top-k 2 the shares are 4/7 and 3/7, so 0.5 keeps one.
    assert narrow(logits, Sampling(top_k=2, top_p=0.5)).isfinite().tolist() == [[True, False, False, False]]
    assert narrow(logits, Sampling(top_k=9)).isfinite().all()
    tied = torch.zeros(1, 5)
    assert int(narrow(tied, Sampling(top_k=2)).isfinite().sum()) == 2


def test_top_k_logp_is_renormalised() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    token, logp = draw(
        logits, torch.zeros(500, dtype=torch.long), uniforms(torch.arange(500), 1)[:, 0], Sampling(top_k=2)
    )
    assert set(token.tolist()) == {0, 1}
    torch.testing.assert_close(logp, torch.tensor([4 / 7, 3 / 7]).log()[token])


def test_uniforms_are_streams() -> None:
    seeds = torch.tensor([1, 2, 1])
    assert torch.equal(uniforms(seeds, 9)[:, :4], uniforms(seeds, 4))
    assert torch.equal(uniforms(seeds, 4)[0], uniforms(seeds, 4)[2])
    assert not torch.equal(uniforms(seeds, 4)[0], uniforms(seeds, 4)[1])


def test_weights_are_never_stale() -> None:
    policy = load_policy("nano")
    prompts = prompts_of(policy)

    def reads_the_present() -> bool:
        rollout = policy.sampler.sample(prompts, 1, None, Sampling(6, temperature=0))
        with torch.no_grad():
            now = policy.evaluate(batch_of(policy, prompts, 1, rollout, 1.0), {"logp"})["logp"]
        return torch.allclose(now, rollout.logp, atol=1e-5)

    assert reads_the_present()
    q = policy.causal.model.layers[0].mlp.down_proj.weight
    for change in ("optimizer", "no_grad", "data", "load"):
        before = policy.sampler.sample(prompts, 1, None, Sampling(6, temperature=0)).logp
        if change == "optimizer":
            optimizer = torch.optim.AdamW([q], lr=0.1, fused=True)
            q.grad = torch.ones_like(q)
            optimizer.step()
        elif change == "no_grad":
            with torch.no_grad():
                q.mul_(-2)
        elif change == "data":
            q.data.mul_(-1.5)
        else:
            policy.load_state_dict(load_policy("nano", seed=9).state_dict())
        assert reads_the_present(), change
        after = policy.sampler.sample(prompts, 1, None, Sampling(6, temperature=0)).logp
        assert before.shape != after.shape or not torch.allclose(before, after), change


@pytest.mark.parametrize("lora", [0, 4])
def test_bfloat16_sampler_is_near_the_autocast_forward(lora: int) -> None:
    policy = load_policy("nano", dtype="bfloat16", lora=lora)
    if lora:
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.1)
    prompts, seeds = prompts_of(policy), torch.arange(24)
    for sampler in (policy.sampler, general(policy)):
        rollout = sampler.sample(prompts, 8, seeds, Sampling(12))
        with torch.no_grad():
            now = policy.evaluate(batch_of(policy, prompts, 8, rollout, 1.0), {"logp"})["logp"]
        assert float((now - rollout.logp).abs()[rollout.mask].mean()) < 0.03


def test_llama_decoder_is_the_module_decoder() -> None:
    for lora in (0, 3):
        policy = load_policy("nano", dtype="float64", lora=lora)
        assert LlamaDecoder.fits(policy.causal)
        prompts, seeds = prompts_of(policy), torch.arange(24)
        one = policy.sampler.sample(prompts, 8, seeds, Sampling(20))
        other = general(policy).sample(prompts, 8, seeds, Sampling(20))
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logp, other.logp, atol=1e-12, rtol=0)


def small_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=98,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config)


def small_gemma() -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=98,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=6,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("make", [small_gpt2, small_gemma])
def test_other_architectures(make) -> None:
    """GPT-2 (transposed layers, learned positions) and Gemma 2 (sliding window, capped logits)."""
    torch.manual_seed(0)
    policy = LanguagePolicy(make(), character_tokenizer(), name="other", source="", compute=torch.float32)
    assert not LlamaDecoder.fits(policy.causal)
    prompts = prompts_of(policy)
    rollout = policy.sampler.sample(prompts, 4, torch.arange(12), Sampling(12))
    batch = batch_of(policy, prompts, 4, rollout, 1.0)
    now = policy.evaluate(batch, {"logp", "hidden"})
    torch.testing.assert_close(now["logp"], rollout.logp, atol=2e-5, rtol=0)
    for row in range(12):
        said = rollout.tokens[row][rollout.mask[row]]
        ids = torch.cat([torch.tensor(prompts[row // 4]), said])[None]
        logits = policy.causal(ids).logits[0, len(prompts[row // 4]) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, said[:, None]).squeeze(1)
        torch.testing.assert_close(now["logp"][row][rollout.mask[row]], expected, atol=2e-5, rtol=0)
    narrow_policy = LanguagePolicy(policy.causal, policy.tokenizer, name="other", source="", compute=torch.bfloat16)
    rollout = narrow_policy.sampler.sample(prompts, 4, torch.arange(12), Sampling(12))
    with torch.no_grad():
        close = narrow_policy.evaluate(batch_of(policy, prompts, 4, rollout, 1.0), {"logp"})["logp"]
    assert float((close - rollout.logp).abs()[rollout.mask].mean()) < 0.05


@pytest.mark.parametrize(
    "how", [{"new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_impossible_sampling_is_refused(how: dict) -> None:
    with pytest.raises(SamplingError):
        Sampling(**how)


def test_impossible_requests_are_refused() -> None:
    policy = load_policy("nano")
    for prompts, copies, seeds in [([], 1, None), ([[5]], 0, None), ([[]], 1, torch.arange(1)), ([[5]], 1, None)]:
        with pytest.raises(SamplingError):
            policy.sampler.sample(prompts, copies, seeds, Sampling())
    with pytest.raises(SamplingError, match="2 seeds for 3 rows"):
        policy.sampler.sample([[5]], 3, torch.arange(2), Sampling())
