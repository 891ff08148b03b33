"""The training pass: packed rows, the output layer without logits, layers computed again, a narrow frozen base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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

from tests.language.test_policy import PROMPTS, ragged
from trimtab.core.batch import Batch
from trimtab.policies import packing
from trimtab.policies.builtin import _narrow_frozen, character_tokenizer, load_policy
from trimtab.policies.language import LanguagePolicy
from trimtab.policies.readout import Readout, read
from trimtab.policies.sampler import Sampling
from trimtab.policies.view import View

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "llama": lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, **SHAPE)),
    "qwen2": lambda v: Qwen2ForCausalLM(Qwen2Config(vocab_size=v, **SHAPE)),
    "qwen3": lambda v: Qwen3ForCausalLM(Qwen3Config(vocab_size=v, **SHAPE)),
    "gpt2": lambda v: GPT2LMHeadModel(
        GPT2Config(vocab_size=v, n_embd=24, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
    "mistral": lambda v: MistralForCausalLM(MistralConfig(vocab_size=v, sliding_window=4, **SHAPE)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_policy(kind: str, **more: Any) -> LanguagePolicy:
    """A model of this architecture with random weights in float64, its norms too."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    model = MODELS[kind](len(tokenizer)).double()
    for name, layer in list(model.named_modules()):
        if type(layer).__name__.endswith("RMSNorm"):  # they compute in float32
            wide = nn.RMSNorm(layer.weight.shape[0], eps=layer.variance_epsilon, dtype=torch.float64)
            model.set_submodule(name, wide)
    return LanguagePolicy(model, tokenizer, name=kind, source="", compute=torch.float64, **more)


def grouped(policy: LanguagePolicy) -> Batch:
    """Three prompts with four, one and three responses of many lengths, and a temperature."""
    base = ragged(policy)
    rows = torch.tensor([0, 1, 0, 2, 1, 0, 1, 0])
    said = torch.randint(3, 90, (8, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(9) < torch.tensor([9, 1, 5, 2, 7, 6, 3, 1])[:, None]
    mask[0, 2:4] = False
    return base.take(rows).put(action=said, mask=mask)


def literal(policy: LanguagePolicy, batch: Batch) -> dict[str, Tensor]:
    """logp and entropy row by row, nothing shared, from transformers' own logits and softmax."""
    rows: dict[str, list[Tensor]] = {"logp": [], "entropy": []}
    for i in range(len(batch)):
        prompt = batch.prompt[i][batch.prompt_mask[i]]
        logits = policy.model(input_ids=torch.cat([prompt, batch.action[i]])[None]).logits[0, len(prompt) - 1 : -1]
        every = (logits / batch.temperature[i]).log_softmax(-1)
        rows["logp"].append(every.gather(1, batch.action[i][:, None])[:, 0] * batch.mask[i])
        rows["entropy"].append(-(every.exp() * every).sum(-1) * batch.mask[i])
    return {name: torch.stack(values) for name, values in rows.items()}


def gradients(policy: LanguagePolicy, now: dict[str, Tensor]) -> list[Tensor]:
    weight = torch.arange(8)[:, None] - 3.5
    loss = (now["logp"] * weight).sum() + now["entropy"].square().sum()
    return list(torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad]))


def same(ones: list[Tensor], others: list[Tensor], atol: float = 1e-10) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=atol)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_rows_read_alone(kind: str, checkpointing: bool) -> None:
    policy = random_policy(kind, checkpointing=checkpointing)
    batch = grouped(policy)
    now, slow = policy.evaluate(batch, {"logp", "entropy"}), literal(policy, batch)
    same([now["logp"], now["entropy"]], [slow["logp"], slow["entropy"]])
    same(gradients(policy, now), gradients(policy, slow))
    assert policy._packs == (kind != "mistral"), "a sliding window is not packed"
    assert policy.causal.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(m) for m in policy.model.modules())
    if policy._packs:
        assert policy.reading.padding == 0
        assert policy.reading.tokens == _tokens(policy)
    else:
        assert 0 < policy.reading.padding < 1


def _tokens(policy: LanguagePolicy) -> int:
    """Each prompt of `grouped` once, and of each response what comes before its last decision."""
    return sum(len(policy.encode(p)) for p in PROMPTS[:3]) + sum([8, 0, 4, 1, 6, 5, 2, 0])


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_policies_pack_too(dtype: str, lora: int) -> None:
    """Whether rows may be packed is asked in float32: bfloat16 rounds away the difference."""
    policy = load_policy("nano", dtype=dtype, lora=lora)
    batch = grouped(policy)
    exact = load_policy("nano", dtype="float64", lora=lora).evaluate(batch, {"logp"})["logp"]
    now = policy.evaluate(batch, {"logp"})["logp"]
    assert policy.reading.places == policy.reading.tokens == _tokens(policy)
    torch.testing.assert_close(now.double(), exact, rtol=0, atol=1e-4 if dtype == "float32" else 0.3)


@pytest.mark.parametrize(("tile", "scores"), [(2, 2**23), (3, 64), (256, 1), (256, 600)])
def test_tiles_and_blocks_change_nothing(tile: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy("llama")
    batch = grouped(policy)
    whole = policy.evaluate(batch, {"logp", "entropy"})
    monkeypatch.setattr(packing, "TILE", tile)
    monkeypatch.setattr(packing, "SCORES_AT_ONCE", scores)
    monkeypatch.setattr(packing, "FEW", 0)
    cut = policy.evaluate(batch, {"logp", "entropy"})
    same([*whole.values(), *gradients(policy, whole)], [*cut.values(), *gradients(policy, cut)])


def test_every_token_is_in_one_block_and_few_scores_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty-four responses of 1 to 64 tokens: a rectangle would be half padding."""
    monkeypatch.setattr(packing, "FEW", 0)
    lengths = torch.arange(1, 65)
    prompt = torch.arange(4).repeat_interleave(16)[:, None].expand(64, 50)
    yes = torch.arange(64) < lengths[:, None]
    rows = torch.arange(64)
    view = View(
        prompt, torch.ones(64, 50, dtype=torch.bool), torch.ones(64, 64).long(), yes, None, rows, rows, (64, 64)
    )
    made = packing.pack(view, heads=9)
    assert len(made.ids) == 4 * 50 + int((lengths - 1).sum())
    end = len(made.ids)
    written = torch.cat([b.write.flatten() for b in made.blocks])
    assert written[written < end].sort().values.tolist() == list(range(end))
    places = sum(
        b.write.numel() * (b.write.shape[2] + (0 if b.prefix is None else b.prefix.shape[1])) for b in made.blocks
    )
    true = 4 * 50 * 50 + sum(n * (n + 50) for n in range(64))
    assert places <= packing.WASTE * true
    assert len(made.blocks) < 16


def test_a_gradient_can_be_differentiated_again() -> None:
    policy = random_policy("llama")
    batch = grouped(policy)
    p = policy.causal.model.layers[0].mlp.up_proj.weight
    seconds = []
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        alone = literal(policy, batch)
    for now in (policy.evaluate(batch, {"logp"}), alone):
        (g,) = torch.autograd.grad(now["logp"].square().sum(), [p], create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), list(policy.parameters()), materialize_grads=True))
    same([*seconds[0]], [*seconds[1]], atol=1e-8)


# -- the output layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("wants", [("logp",), ("entropy",), ("logp", "entropy")])
@pytest.mark.parametrize("at_once", [(2**23, 2**25), (40, 70), (1, 1)])
def test_readout_is_the_plain_computation(
    frozen: bool, wants: tuple[str, ...], at_once: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.policies.readout.LOGITS_AT_ONCE", at_once[0])
    monkeypatch.setattr("trimtab.policies.readout.SLOPES_AT_ONCE", at_once[1])
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((11, 5), (17, 5), (17,)))
    token, scale = torch.randint(0, 17, (11,)), torch.rand(11, dtype=torch.float64) + 0.5
    x.requires_grad_()
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    leaves = [t for t in (x, weight, bias) if t.requires_grad]
    results = []
    for values in (
        Readout.apply(x, weight, bias, token, scale, torch.float64, "entropy" in wants),
        read(x, weight, bias, token, scale, torch.float64),
    ):
        loss = torch.zeros((), dtype=torch.float64)
        for i, (name, value) in enumerate(zip(("logp", "entropy"), values)):
            if name in wants:
                loss = loss + (value * torch.linspace(-1, 2, 11, dtype=torch.float64)).sum() * (i + 1)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        plain = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([loss.detach(), *first, *plain, *second])
    same(*results, atol=1e-12)


def test_no_entropy_is_made_that_nobody_wants() -> None:
    x, weight, token = torch.randn(3, 5), torch.randn(7, 5), torch.tensor([1, 2, 3])
    assert Readout.apply(x, weight, None, token, None, torch.float32, False)[1] is None


# -- memory --------------------------------------------------------------------------------------------------------


def held(policy: LanguagePolicy, batch: Batch) -> tuple[int, list[Tensor]]:
    """Bytes that a forward keeps for the backward, parameters aside, and the gradient."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        now = policy.evaluate(batch, {"logp", "entropy"})
    return sum(kept.values()), gradients(policy, now)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_checkpointing_keeps_less_and_gives_the_same_bits(dtype: str) -> None:
    plain, again = (load_policy("nano", dtype=dtype, checkpointing=c) for c in (False, True))
    batch = grouped(plain)
    (much, ones), (little, others) = held(plain, batch), held(again, batch)
    assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))
    assert little < 0.6 * much


# -- a frozen base --------------------------------------------------------------------------------------------------


def test_a_frozen_base_in_bfloat16_computes_the_same_bits() -> None:
    policy = load_policy("nano", lora=4, dtype="bfloat16")
    torch.manual_seed(0)
    for name, p in policy.named_parameters():
        p.data.add_(0.1 * torch.randn_like(p)) if "lora_B" in name else p.data.copy_(p.data.bfloat16())
    bases = [m.base_layer for m in policy.model.modules() if hasattr(m, "base_layer")]
    assert all(b.weight.dtype == torch.float32 for b in bases), "random float32 weights would lose digits"
    batch = grouped(policy)
    before = policy.evaluate(batch, {"logp", "entropy"})
    first = gradients(policy, before)
    _narrow_frozen(policy.model)
    assert all(b.weight.dtype == torch.bfloat16 for b in bases)
    assert policy.causal.get_input_embeddings().weight.dtype == torch.bfloat16
    after = policy.evaluate(batch, {"logp", "entropy"})
    assert all(torch.equal(before[k], after[k]) for k in before)
    same(first, gradients(policy, after), atol=1e-2)  # its inputs' gradients are summed in bfloat16


# -- how much at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "want"), [(2, 2048), (0, 4096)])
def test_a_pass_reads_as_many_rows_as_make_it_cheap(lora: int, want: int) -> None:
    policy = load_policy("nano", dtype="float64", lora=lora)

    def rows(prompt: int, said: int) -> int | None:
        ones = torch.ones(8, max(prompt, said))
        return policy.rows_at_once(Batch({"mask": ones[:, :said], "prompt_mask": ones[:, :prompt]}))

    assert rows(16, 64) == want // 64
    assert rows(want, 64) == 8 * want // 64, "a prompt that every pass reads again is an eighth of it at most"
    assert rows(16, 0) == want, "rows that say nothing"


def test_what_learns_is_let_go_while_it_learns_and_is_there_for_the_next_sample() -> None:
    policy = load_policy("nano", dtype="bfloat16", lora=2)
    prompts, seeds, how = [policy.encode("3 + 4 =")], torch.arange(4), Sampling(new_tokens=5)
    first = policy.sampler.sample(prompts, 4, seeds, how)
    held: Any = policy._decoder()
    parts = [part for part in held._products if not part.frozen]
    weights = [part.weight for part in parts]
    with torch.no_grad():
        policy.evaluate(grouped(policy), {"logp"})
    assert all(part.weight is w for part, w in zip(parts, weights)), "nobody learns"
    policy.evaluate(grouped(policy), {"logp"})
    assert parts
    assert all(part.weight is None for part in parts)
    again = policy.sampler.sample(prompts, 4, seeds, how)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.logp, again.logp)


def test_a_policy_that_is_thawed_later_is_sampled_with_what_it_learned() -> None:
    policy, fresh = (load_policy("nano", dtype="bfloat16", seed=1) for _ in range(2))
    prompts, seeds, how = [policy.encode("3 + 4 =")], torch.arange(4), Sampling(new_tokens=5)
    policy.requires_grad_(False)
    policy.sampler.sample(prompts, 4, seeds, how)  # its decoder is made while nothing can learn
    policy.requires_grad_(True)
    policy.sampler.sample(prompts, 4, seeds, how)
    for model in (policy, fresh):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
    mine, theirs = (model.sampler.sample(prompts, 4, seeds, how) for model in (policy, fresh))
    assert torch.equal(mine.logp, theirs.logp)
