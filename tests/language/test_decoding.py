"""Decoding: literal inverse CDF, literal attention over the shared cache, and prompts that wait change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trimtab.core.errors import TrimtabWarning
from trimtab.policies.builtin import character_tokenizer, load_policy
from trimtab.policies.cache import SharedCache, settle
from trimtab.policies.decoders import ModuleDecoder
from trimtab.policies.draws import draw, narrow, uniforms
from trimtab.policies.language import LanguagePolicy
from trimtab.policies.llama_decoder import LlamaDecoder
from trimtab.policies.sampler import LocalSampler, Sampling

PROMPTS = ["3 + 4 =", "a", "what is nine times nine?", "7 - 2 =", "b", "say 12", "1", "2 + 2", "the end"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# -- draws ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocabulary", [5, 128, 300])
@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0.7), Sampling(top_k=3), Sampling(top_p=0.6)])
def test_a_draw_is_the_literal_inverse_cdf(vocabulary: int, how: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """At some pasts and some rows at a time, in float64."""
    dice = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(5, vocabulary, generator=dice, dtype=torch.float64)
    logits[:, : vocabulary // 2 : 2] = -torch.inf
    slot = torch.randint(5, (200,), generator=dice)
    noise = uniforms(torch.arange(200), 1)[:, 0]
    p = narrow(logits / how.temperature, how).softmax(-1)
    literal = (p.cumsum(-1)[slot] > noise[:, None]).int().argmax(-1)
    for at_once in (1, 2 * vocabulary, 2**18):
        monkeypatch.setattr("trimtab.policies.draws.LOGITS_AT_ONCE", at_once)
        token, logp = draw(logits, slot, noise, how)
        assert torch.equal(token, literal)
        torch.testing.assert_close(logp, p[slot, literal].log(), atol=1e-13, rtol=0)


def test_no_impossible_token_is_drawn_in_bfloat16() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[:, ::3] = -torch.inf
    logits[:, 512:] = -torch.inf
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    noise = torch.cat([edges, torch.rand(998, generator=torch.Generator().manual_seed(1), dtype=torch.float64)])
    for past in range(4):
        token, logp = draw(logits, torch.full((1000,), past), noise, Sampling())
        assert logits[past, token].isfinite().all()
        torch.testing.assert_close(logp, logits[past].float().log_softmax(-1)[token])


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = logits[1].max() + 1e-7  # too near for probabilities to tell
    token, logp = draw(logits, torch.tensor([2, 0, 1, 1]), None, Sampling(temperature=0))
    assert torch.equal(token, logits.argmax(-1)[[2, 0, 1, 1]])
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1)[[2, 0, 1, 1]])


# -- the cache --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("before", [[0, 1, 2], [0, 0, 0], [1, 3, 3, 5], [4], [0, 2, 2, 2, 7, 9], []])
def test_settling_fills_the_first_places_and_moves_few(before: list[int]) -> None:
    place = settle(torch.tensor(before, dtype=torch.long))
    assert sorted(place.tolist()) == list(range(len(before)))
    could_stay = {b for b in before if b < len(before)}
    assert sum(p == b for p, b in zip(place.tolist(), before)) == len(could_stay)


class Literal:
    """What every row has seen, as lists: keys and values `[t, H, w]`."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[Tensor, Tensor]]] = []

    def attend(self, query: Tensor) -> Tensor:
        out = []
        for q, seen in zip(query, self.rows):
            keys, values = (torch.stack(x) for x in zip(*seen))
            p = torch.einsum("hgw,thw->hgt", q, keys).softmax(-1)
            out.append(torch.einsum("hgt,thw->hgw", p, values))
        return torch.stack(out)


def test_shared_cache_is_literal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows enter, split, leave and move while the ring goes round; memory starts as nan where nothing was written."""
    monkeypatch.setattr("trimtab.policies.cache.NUMBERS_AT_ONCE", 64)
    dice = torch.Generator().manual_seed(0)
    heads, groups, width, room = 2, 3, 4, 5

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    # What is held is float32, so that widening is looked at too.
    device = torch.device("cpu")
    cache = SharedCache((1, heads, width), 3, 6, 7, room, torch.float32, torch.float64, device)
    for held in (cache.prompt_keys, cache.prompt_values, cache.said_keys, cache.said_values):
        held.fill_(torch.nan)
    plain = Literal()

    def add(lengths: list[int]) -> None:
        slots = cache.add(torch.tensor(lengths), max(lengths))
        filled = random(2, len(lengths), heads, max(lengths), width).float()
        cache.read(0, slots, *filled)
        for i, n in enumerate(lengths):
            plain.rows.append([(filled[0, i, :, t].double(), filled[1, i, :, t].double()) for t in range(n)])

    def step() -> None:
        n = len(plain.rows)
        query, key, value = random(n, heads, groups, width), random(n, heads, width), random(n, heads, width)
        key, value = key.float(), value.float()
        assert cache.place.tolist() == [len(seen) for seen in plain.rows]
        for seen, k, v in zip(plain.rows, key.double(), value.double()):
            seen.append((k, v))
        cache.begin()
        torch.testing.assert_close(cache.attend(0, query, key, value), plain.attend(query), atol=1e-12, rtol=0)
        cache.end()

    def keep(rows: list[int]) -> None:
        cache.keep(torch.tensor(rows))
        plain.rows = [list(plain.rows[r]) for r in rows]

    add([3, 6])
    step()
    keep([0, 1, 0, 1, 1])
    step()
    keep([0, 3])  # the second prompt's row moves
    add([7])
    step()
    keep([2, 1])  # the first prompt leaves
    add([2])
    step()
    step()
    keep([0, 2])  # those that began first leave: their five tokens are said
    for _ in range(2):
        step()
    keep([1, 1])
    for _ in range(1):
        step()


# -- waiting prompts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("copies", [1, 4])
def test_the_number_of_rows_at_once_changes_nothing(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("nano", dtype="float64")
    prompts, how = [policy.encode(p) for p in PROMPTS], Sampling(25, 1.4)
    seeds, joined, admit = torch.arange(len(prompts) * copies), [], LlamaDecoder.admit
    whole = policy.sampler.sample(prompts, copies, seeds, how)
    assert whole.finished.any()
    monkeypatch.setattr(LlamaDecoder, "admit", lambda self, p: joined.append(len(self.cache.owner)) or admit(self, p))
    general = ModuleDecoder(policy.causal)
    for rows in (1, 5, 8, 13):
        monkeypatch.setattr("trimtab.policies.sampler.ROWS_AT_ONCE", rows)
        for sampler in (policy.sampler, LocalSampler(lambda: general, policy.ends, policy.fill, policy.wide)):
            some = sampler.sample(prompts, copies, seeds, how)
            assert torch.equal(some.tokens, whole.tokens)
            assert torch.equal(some.mask, whole.mask)
            assert torch.equal(some.finished, whole.finished)
            torch.testing.assert_close(some.logp, whole.logp, atol=1e-12, rtol=0)
    assert any(joined)  # some prompts entered beside living rows


def test_what_is_sampled_can_be_learned_from() -> None:
    """Sampling runs in inference mode; its tensors must not."""
    rollout = load_policy("nano").sampler.sample([[5]], 2, torch.arange(2), Sampling(4))
    assert not any(x.is_inference() for x in (rollout.tokens, rollout.mask, rollout.logp, rollout.finished))


# -- architectures ----------------------------------------------------------------------------------------------
SHAPE: dict[str, Any] = {
    "vocab_size": 98, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0,
    "max_position_embeddings": 128,
}  # fmt: skip
FAMILY = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8)),
}


def policy_of(name: str, compute: torch.dtype = torch.float32) -> LanguagePolicy:
    torch.manual_seed(0)
    kind, config = FAMILY[name]
    model = kind(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias") or "_norm" in key:
                p.add_(0.3 * torch.randn_like(p))
    return LanguagePolicy(model, character_tokenizer(), name=name, source="", compute=compute)


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_decoded_as_transformers_does(name: str) -> None:
    policy = policy_of(name)
    assert LlamaDecoder.fits(policy.causal)
    assert policy.describe()["decoder"] == "fused"
    prompts, seeds = [policy.encode(p) for p in PROMPTS[:3]], torch.arange(12)
    general = ModuleDecoder(policy.causal)
    slow = LocalSampler(lambda: general, policy.ends, policy.fill, policy.wide)
    one, other = (s.sample(prompts, 4, seeds, Sampling(16)) for s in (policy.sampler, slow))
    assert torch.equal(one.tokens, other.tokens)
    torch.testing.assert_close(one.logp, other.logp, atol=2e-5, rtol=0)
    greedy = policy.sampler.sample(prompts, 1, None, Sampling(16, temperature=0))
    for row, prompt in enumerate(prompts):
        given = torch.tensor([prompt])
        out = policy.causal.generate(given, do_sample=False, max_new_tokens=16, pad_token_id=0)
        assert greedy.tokens[row][greedy.mask[row]].tolist() == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_in_bfloat16_is_near_its_autocast_forward(name: str) -> None:
    policy = policy_of(name, torch.bfloat16)
    prompts = [policy.encode(p) for p in PROMPTS[:3]]
    rollout = policy.sampler.sample(prompts, 1, None, Sampling(12, temperature=0))
    for row, prompt in enumerate(prompts):
        said = rollout.tokens[row][rollout.mask[row]]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = policy.causal(torch.cat([torch.tensor(prompt), said])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, said[:, None]).squeeze(1)
        assert float((expected - rollout.logp[row][rollout.mask[row]]).abs().mean()) < 0.05


def test_what_does_not_fit_falls_back_and_says_so() -> None:
    assert not LlamaDecoder.fits(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)))
    sliding = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert not LlamaDecoder.fits(Qwen2ForCausalLM(sliding))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=98, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    policy = LanguagePolicy(model, character_tokenizer(), name="other", source="", compute=torch.float32)
    assert policy.describe()["decoder"] == "transformers"
    with pytest.warns(TrimtabWarning, match="GPT2LMHeadModel"):
        policy.sampler.sample([[5]], 1, None, Sampling(2, temperature=0))
