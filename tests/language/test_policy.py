"""Language policies: what evaluate returns, what is saved, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.core.batch import Batch
from trimtab.policies.builtin import cache_folder, cached, load_policy
from trimtab.policies.language import LanguagePolicy
from trimtab.policies.sampler import Sampling, pad_left
from trimtab.policies.tiny import teach
from trimtab.policies.view import PolicyError

PROMPTS = ["3 + 4 =", "a", "what is nine times nine?", "a"]
WANT = {"logp", "entropy", "hidden"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def ragged(policy: LanguagePolicy, *, left: int = 0, right: int = 0) -> Batch:
    """Four rows of different lengths, with this much more padding, a hole (a tool's words) and a temperature."""
    prompt, prompt_mask = pad_left([policy.encode(p) for p in PROMPTS], policy.fill)
    prompt = torch.nn.functional.pad(prompt, (left, 0), value=7)
    prompt_mask = torch.nn.functional.pad(prompt_mask, (left, 0), value=False)
    said = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [6]])
    mask[0, 2:4] = False
    said = torch.nn.functional.pad(said, (0, right), value=11)
    mask = torch.nn.functional.pad(mask, (0, right), value=False)
    scale = torch.tensor([1.0, 0.7, 1.3, 1.0], dtype=torch.float64)
    return Batch({"prompt": prompt, "prompt_mask": prompt_mask, "action": said, "mask": mask, "temperature": scale})


def literal(policy: LanguagePolicy, batch: Batch) -> dict[str, Tensor]:
    """The same numbers one row at a time from transformers' logits."""
    out = {"logp": torch.zeros(batch.mask.shape, dtype=torch.float64)}
    out["entropy"] = out["logp"].clone()
    for i in range(len(batch)):
        prompt = batch.prompt[i][batch.prompt_mask[i]]
        logits = policy.causal(torch.cat([prompt, batch.action[i]])[None]).logits[0] / batch.temperature[i]
        for t in batch.mask[i].nonzero().flatten().tolist():
            p = logits[len(prompt) - 1 + t].log_softmax(-1)
            out["logp"][i, t] = p[batch.action[i, t]]
            out["entropy"][i, t] = -(p.exp() * p).sum()
    return out


@pytest.fixture(scope="module")
def exact() -> LanguagePolicy:
    return load_policy("nano", dtype="float64")


def test_evaluate_is_the_literal_computation(exact: LanguagePolicy) -> None:
    batch = ragged(exact)
    now, slow = exact.evaluate(batch, WANT), literal(exact, batch)
    for name in slow:
        torch.testing.assert_close(now[name], slow[name], atol=1e-12, rtol=0)
        assert (now[name][~batch.mask] == 0).all()
    assert now["hidden"].shape == (4, 9, 24)
    assert now["logp"].requires_grad


def test_padding_and_splitting_change_nothing(exact: LanguagePolicy) -> None:
    batch = ragged(exact)
    now = exact.evaluate(batch, WANT)
    padded = exact.evaluate(ragged(exact, left=5, right=3), WANT)
    rows = [exact.evaluate(batch.take(torch.tensor([i])), WANT) for i in range(4)]
    order = torch.tensor([2, 0, 3, 1])
    turned = exact.evaluate(batch.take(order), WANT)
    for name, value in now.items():
        torch.testing.assert_close(padded[name][:, :9], value, atol=1e-10, rtol=0)
        torch.testing.assert_close(torch.cat([r[name] for r in rows]), value, atol=1e-10, rtol=0)
        torch.testing.assert_close(turned[name], value[order], atol=1e-10, rtol=0)


def test_gradients_do_not_depend_on_splitting(exact: LanguagePolicy) -> None:
    batch, parameters = ragged(exact), list(exact.parameters())

    def gradients(parts: list[Batch]) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in parameters]
        for part in parts:
            now = exact.evaluate(part, {"logp", "entropy"})
            loss = now["logp"].sum() + now["entropy"].square().sum()
            for t, g in zip(total, torch.autograd.grad(loss, parameters)):
                t += g
        return total

    whole = gradients([batch])
    # Rows 1 and 3 share a prompt: read once above, read in each part here.
    for a, b in zip(whole, gradients([batch.take(torch.tensor([i])) for i in range(4)])):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_equal_rows_are_read_once_and_all_count(exact: LanguagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, parameters = ragged(exact), list(exact.parameters())
    twice = batch.take(torch.tensor([3, 0, 1, 3, 2, 0]))
    # Another token behind the last decision is no difference.
    twice = twice.put(action=twice.action + (torch.arange(6) == 3)[:, None] * ~twice.mask)
    sizes = []
    read = exact._states
    monkeypatch.setattr(exact, "_states", lambda view: sizes.append(len(view.said)) or read(view))
    now, one = (exact.evaluate(b, {"logp", "entropy"}) for b in (twice, batch))
    assert sizes == [4, 4]
    for name, value in now.items():
        torch.testing.assert_close(value, one[name][[3, 0, 1, 3, 2, 0]], atol=1e-12, rtol=0)
    weight = torch.rand(6, 1, dtype=torch.float64)
    whole = torch.autograd.grad((now["logp"] * weight).sum(), parameters)
    summed = torch.stack([weight[1] + weight[5], weight[2], weight[4], weight[0] + weight[3]])
    for a, b in zip(whole, torch.autograd.grad((one["logp"] * summed).sum(), parameters)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_chunks_change_nothing(exact: LanguagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, parameters = ragged(exact), list(exact.parameters())
    results = []
    for at_once in (2**25, 98 * 3):
        monkeypatch.setattr("trimtab.policies.language.LOGITS_AT_ONCE", at_once)
        now = exact.evaluate(batch, {"logp", "entropy"})
        results.append([*now.values(), *torch.autograd.grad(now["logp"].sum() - now["entropy"].sum(), parameters)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_gradient_is_the_derivative(exact: LanguagePolicy) -> None:
    batch = ragged(exact)
    p = exact.causal.model.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(exact.evaluate(batch, {"logp"})["logp"].sum(), [p])
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5, 1e-5):
            p[3, 5] += step
            values.append(exact.evaluate(batch, {"logp"})["logp"].sum())
    assert abs(float(values[0] - values[1]) / 2e-5 - float(gradient[3, 5])) < 1e-6


def test_float32_attention_paths_agree() -> None:
    """With a gradient short rows use plain products, without one the fused kernel."""
    policy = load_policy("nano")
    batch = ragged(policy, left=3)
    with torch.no_grad():
        fused = policy.evaluate(batch, {"logp"})["logp"]
    torch.testing.assert_close(policy.evaluate(batch, {"logp"})["logp"].detach(), fused, atol=1e-5, rtol=0)
    assert policy.causal.config._attn_implementation == "sdpa"


def test_empty_rows_and_refusals(exact: LanguagePolicy) -> None:
    batch = ragged(exact)
    one = batch.put(mask=batch.mask & (torch.arange(4) != 1)[:, None])
    now = exact.evaluate(one, {"logp"})["logp"]
    assert (now[1] == 0).all()
    torch.testing.assert_close(now[0], exact.evaluate(batch, {"logp"})["logp"][0], atol=1e-10, rtol=0)
    assert (exact.evaluate(batch.put(mask=torch.zeros_like(batch.mask)), {"logp"})["logp"] == 0).all()
    with pytest.raises(PolicyError, match="cannot give 'value'"):
        exact.evaluate(batch, {"logp", "value"})
    with pytest.raises(PolicyError, match="empty prompt"):
        exact.evaluate(batch.put(prompt_mask=torch.zeros_like(batch.prompt_mask)), {"logp"})
    with pytest.raises(PolicyError, match="temperature"):
        exact.evaluate(batch.put(temperature=torch.zeros(4)), {"logp"})


def test_train_mode_keeps_dropout_off() -> None:
    policy = load_policy("nano")
    assert policy.train().training
    assert not any(m.training for m in policy.model.modules())


def test_text() -> None:
    policy = load_policy("nano")
    assert policy.describe()["parameters"] <= 20_000
    assert policy.decode(policy.encode("3 + 4 = 7?\n")) == "3 + 4 = 7?\n"
    assert policy.decode([*policy.encode("ab"), *policy.ends]) == "ab"
    json.dumps(policy.describe())
    with pytest.raises(PolicyError, match="no chat template"):
        policy.encode([{"role": "user", "content": "hi"}])
    with pytest.raises(PolicyError, match="no chat template"):
        load_policy("nano", chat=True)


def test_seed_decides_the_weights() -> None:
    one, same, other = (load_policy("nano", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("lora", [0, 4])
def test_state_dict_restores_exactly(lora: int) -> None:
    policy, other = load_policy("nano", lora=lora), load_policy("nano", lora=lora)
    disturb(policy)
    state = {k: v.clone() for k, v in policy.state_dict().items()}
    assert not any("lm_head" in k for k in state)  # tied to the embedding
    if lora:
        assert all("lora_" in k for k in state)
    assert sum(v.numel() for v in state.values()) == policy.describe()["trainable"]
    other.load_state_dict(state)
    batch = ragged(policy)
    with torch.no_grad():
        assert torch.equal(policy.evaluate(batch, {"logp"})["logp"], other.evaluate(batch, {"logp"})["logp"])
    nested, twin = (
        torch.nn.ModuleDict({"policy": policy}),
        torch.nn.ModuleDict({"policy": load_policy("nano", lora=lora)}),
    )
    twin.load_state_dict(nested.state_dict())
    assert all(torch.equal(v, twin["policy"].state_dict()[k]) for k, v in state.items())
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_a_copy_has_its_own_weights_and_sampler() -> None:
    policy = load_policy("nano")
    prompts, how = [policy.encode("a")], Sampling(8, temperature=0)
    before = policy.sampler.sample(prompts, 1, None, how)
    frozen = copy.deepcopy(policy)
    disturb(policy)
    again = frozen.sampler.sample(prompts, 1, None, how)
    assert torch.equal(before.logp, again.logp)
    assert not torch.equal(policy.sampler.sample(prompts, 1, None, how).logp[:, :1], again.logp[:, :1])


def disturb(policy: LanguagePolicy) -> None:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("lora", [0, 4])
def test_saved_folder_is_ordinary(lora: int, tmp_path: Path) -> None:
    policy = load_policy("nano", lora=lora)
    disturb(policy)
    policy.save(tmp_path / "model")
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([policy.encode("what is nine?")])
    with torch.no_grad():
        assert torch.equal(ordinary(ids).logits, policy.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").decode(ids[0]) == "what is nine?"
    again = load_policy(str(tmp_path / "model"), dtype="float32")
    assert again.lora == lora
    assert again.describe()["trainable"] == policy.describe()["trainable"]
    batch = ragged(policy)
    with torch.no_grad():
        assert torch.equal(again.evaluate(batch, {"logp"})["logp"], policy.evaluate(batch, {"logp"})["logp"])
    moved = tmp_path / "elsewhere"
    (tmp_path / "model").rename(moved)
    with torch.no_grad():
        after = load_policy(str(moved), dtype="float32").evaluate(batch, {"logp"})["logp"]
        assert torch.equal(after, policy.evaluate(batch, {"logp"})["logp"])
    if lora:
        with pytest.raises(PolicyError, match="already is an adapter"):
            load_policy(str(moved), lora=2)


def test_saved_folder_remembers_the_template(tmp_path: Path) -> None:
    policy = load_policy("nano")
    policy.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    policy.save(tmp_path / "plain")
    policy.chat = True
    policy.save(tmp_path / "chat")
    assert load_policy(str(tmp_path / "chat")).chat
    plain = load_policy(str(tmp_path / "plain"))
    assert not plain.chat
    assert plain.decode(plain.encode("a")) == "a"
    assert plain.decode(plain.encode([{"role": "user", "content": "a"}])) == "[a]"
    assert load_policy(str(tmp_path / "plain"), chat=True).decode(policy.encode("a")) == "[a]"


def test_new_adapter_changes_nothing_yet() -> None:
    plain, adapted = load_policy("nano"), load_policy("nano", lora=4)
    batch = ragged(plain)
    with torch.no_grad():
        one, other = (p.evaluate(batch, {"logp"})["logp"] for p in (plain, adapted))
    torch.testing.assert_close(one, other)


def test_unknown_policies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PolicyError, match="Did you mean 'nano'"):
        load_policy("nanno")
    with pytest.raises(PolicyError, match="not a model folder"):
        load_policy(str(tmp_path))
    with pytest.raises(PolicyError, match="float16"):
        load_policy("nano", dtype="float16")
    with pytest.raises(PolicyError, match="rank"):
        load_policy("nano", lora=-1)
    with pytest.raises(PolicyError, match="device"):
        load_policy("nano", device="gpuu")


def test_cache_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))

    def broken(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        cached("thing", broken)
    assert list((tmp_path / "cache").iterdir()) == []
    cached("thing", lambda folder: (folder / "whole").write_text("x"))
    cached("thing", broken)  # there already: not made again
    assert [p.name for p in (tmp_path / "cache" / "thing").iterdir()] == ["whole"]


def test_tiny_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr("trimtab.policies.tiny.STEPS", 2)
    policy = load_policy("tiny", seed=5)
    assert 800_000 < policy.describe()["parameters"] < 1_200_000
    monkeypatch.setattr("trimtab.policies.tiny.teach", None)
    again = load_policy("tiny", seed=5)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in policy.state_dict().items())


def test_teaching_is_seeded_and_lowers_the_loss() -> None:
    def taught(steps: int) -> tuple[LanguagePolicy, float]:
        policy = load_policy("nano", seed=1)
        teach(policy.causal, policy.tokenizer, seed=4, steps=steps)
        prompt = policy.encode("3 + 4 =")
        action = torch.tensor([policy.answer("7")])
        ones = torch.ones_like(action, dtype=torch.bool)
        ids, mask = pad_left([prompt], policy.fill)
        batch = Batch({"prompt": ids, "prompt_mask": mask, "action": action, "mask": ones})
        with torch.no_grad():
            return policy, float(policy.evaluate(batch, {"logp"})["logp"].sum())

    before, some = taught(0)[1], [taught(12) for _ in range(2)]
    assert some[0][1] == some[1][1]
    assert some[0][1] > before + 1


def test_answer_ends_and_joins() -> None:
    policy = load_policy("nano")
    assert policy.answer("7") == [*policy.encode(" 7"), policy.tokenizer.eos_token_id]
    assert policy.answer(" 7") == policy.answer("7")


@pytest.mark.skipif(not (cache_folder() / "smollm2-135m-instruct").exists(), reason="smollm2 is not converted here")
def test_smollm2_greedy_is_generate() -> None:
    policy = load_policy("smollm2", dtype="float32", chat=True)
    prompt = policy.encode("Name three colors.")
    rollout = policy.sampler.sample([prompt], 1, None, Sampling(12, temperature=0))
    given = torch.tensor([prompt])
    out = policy.causal.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12, pad_token_id=policy.fill
    )
    assert rollout.tokens[0][rollout.mask[0]].tolist() == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_most_probable_tokens_are_those_of_the_softmax(temperature: float) -> None:
    policy = load_policy("nano", dtype="float64")
    prompts = [policy.encode("3 + 4 ="), policy.encode("a")]
    rollout = policy.sampler.sample(prompts, 2, torch.arange(4), Sampling(6, temperature))
    prompt, prompt_mask = pad_left([p for p in prompts for _ in range(2)], policy.fill)
    batch = Batch({"prompt": prompt, "prompt_mask": prompt_mask, "action": rollout.tokens, "mask": rollout.mask,
                   "temperature": torch.full((4,), temperature, dtype=torch.float64)})  # fmt: skip
    now = policy.evaluate(batch, {"topk", "topk_ids", "hidden"})
    assert set(now) == {"topk", "topk_ids", "hidden"}
    assert not now["topk"].requires_grad
    logits = policy.causal.get_output_embeddings()(now["hidden"]) / temperature
    k = min(50, logits.shape[-1])
    value, index = logits.log_softmax(-1).topk(k, -1)
    m = rollout.mask
    assert torch.equal(now["topk_ids"][m], index[m])
    torch.testing.assert_close(now["topk"][m], value[m].detach(), atol=1e-12, rtol=0)
    assert now["topk"].shape == (*m.shape, k)
    assert now["topk"][~m].abs().sum() == 0
    empty = policy.evaluate(batch.put(mask=torch.zeros_like(m)), {"topk", "topk_ids"})
    assert {n: (x.shape, x.dtype) for n, x in empty.items()} == {n: (now[n].shape, now[n].dtype) for n in empty}
