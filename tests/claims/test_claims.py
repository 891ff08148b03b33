"""The claims framework on synthetic claims, the command, and the real claims at a minuscule size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import claims
from trimtab.claims import (
    aepo,
    bapo,
    bnpo,
    capo,
    chord,
    core,
    d3s,
    effect,
    find_claim,
    hapo,
    rec,
    remix,
    show,
    subnetwork,
    toys,
)
from trimtab.claims.core import Arm, Claim, Part, Study, above, below, measure, recorded, verdict, within, write
from trimtab.claims.statistics import ClaimError, Effect
from trimtab.cli import main
from trimtab.core.batch import Batch
from trimtab.core.loop import Step, run
from trimtab.core.method import Method
from trimtab.core.registry import find, methods

FIELDS = {"method", "claim", "metric", "arms", "effect", "low", "high", "detectable", "verdict", "seeds", "seconds"}
NOISE = (0.1, -0.2, 0.15, 0.0, -0.05, 0.2, -0.1, 0.05)


def arm(high: float) -> Arm:
    """An arm whose number is its upper bound."""
    return Arm(f"a bound of {high}", lambda seed: find("grpo")(clip_high=high))


def synthetic(region: tuple[float, float], spread: float = 1.0, log: list[Any] | None = None) -> Claim:
    """Baseline 1, method 3, control 2; only the method is noisy."""

    def measured(method: Method, seed: int) -> dict[str, float]:
        if log is not None:
            log.append((method.get("surrogate.bound.high"), seed))
        high = float(method.get("surrogate.bound.high"))
        return {"x": high + spread * NOISE[seed] * (high == 3.0)}

    part = Part("three is enough", "x", "method", "baseline", ("control",), region)
    study = Study({"baseline": arm(1.0), "method": arm(3.0), "control": arm(2.0)}, (part,), measured, 5)
    return Claim("grpo", "bounds are numbers", study, study)


# -- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "spread", "expected"),
    [
        (above(1.5), 1.0, "holds"),
        (above(2.5), 1.0, "does not hold"),
        (above(2.0), 1.0, "inconclusive"),
        (below(2.5), 1.0, "holds"),
        (below(1.5), 1.0, "does not hold"),
        (within(1.5, 2.5), 1.0, "holds"),
        (within(-0.5, 0.5), 1.0, "does not hold"),
        (within(1.5, 2.5), 9.0, "inconclusive"),
    ],
)
def test_every_verdict_is_reachable(region: tuple[float, float], spread: float, expected: str) -> None:
    (row,) = measure(synthetic(region, spread))
    assert row["verdict"] == expected
    assert expected in core.VERDICTS
    assert row["effect"] == pytest.approx(2.0 + spread * sum(NOISE[:5]) / 5)
    assert row["low"] < row["effect"] < row["high"]


def test_an_interval_that_touches_the_region_from_outside_is_outside() -> None:
    touching = Effect(0.5, 0.0, 1.0, 0.1, "")
    assert verdict(touching, above(1.0)) == "does not hold"
    assert verdict(touching, above(0.0)) == "inconclusive"
    assert verdict(touching, above(-0.1)) == "holds"


def test_rows_have_the_promised_fields_and_are_plain_json() -> None:
    (row,) = measure(synthetic(above(1.5)))
    assert set(row) >= FIELDS
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert [a["role"] for a in row["arms"].values()] == ["baseline", "method", "control"]
    assert row["arms"]["control"]["values"] == [2.0] * 5
    assert row["region"] == [1.5, None]
    assert row["effect_is"] == "method - baseline"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: measure(synthetic(above(0.0)), seeds=1), "2 or more"),
        (lambda: synthetic((2.0, 1.0)), "empty"),
        (lambda: Study({}, (Part("x", "x", "a", "b", ("c",), above(0.0)),), lambda m, s: {}, 5), "'b'"),
        (lambda: Study({"a": arm(1.0), "b": arm(2.0)}, (Part("x", "x", "a", "b", (), above(0.0)),),
                       lambda m, s: {}, 5), "a control"),
    ],
)  # fmt: skip
def test_a_claim_that_cannot_be_measured_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ClaimError, match=sentence):
        make()


def test_a_failure_names_its_arm_and_seed() -> None:
    def broken(method: Method, seed: int) -> dict[str, float]:
        raise ClaimError("no number came out")

    study = synthetic(above(0.0)).mechanism
    claim = Claim("grpo", "", Study(study.arms, study.parts, broken, 2), study)
    with pytest.raises(ClaimError, match="no number") as caught:
        measure(claim)
    assert "'baseline' with seed 0" in caught.value.__notes__[0]


# -- full: kept and resumed ----------------------------------------------------------------------------------------


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    arms = {n: {k: v for k, v in a.items() if k != "seconds"} for n, a in row["arms"].items()}
    return {**row, "seconds": 0.0, "arms": arms}


def test_an_interrupted_full_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    log: list[Any] = []
    whole = measure(synthetic(above(1.5), log=log), full=True, folder=tmp_path / "whole")
    assert len(log) == 15
    measure(synthetic(above(1.5), log=log), full=True, seeds=2, folder=tmp_path / "cut")
    path = tmp_path / "cut" / "grpo" / "full.jsonl"
    with path.open("a") as f:
        f.write('{"arm": "baseline", "seed": 2, "finger')  # killed in the middle of a line
    log.clear()
    said: list[str] = []
    rows = measure(synthetic(above(1.5), log=log), full=True, folder=tmp_path / "cut", say=said.append)
    assert log == [(high, seed) for seed in (2, 3, 4) for high in (1.0, 3.0, 2.0)]
    assert sum("kept" in line for line in said) == 6
    assert [timeless(r) for r in whole] == [timeless(r) for r in rows]
    assert len(recorded(path)) == 15
    assert rows[0]["scope"] == "full"


def test_records_of_another_fingerprint_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    measure(synthetic(above(1.5), log=log), full=True, seeds=2, folder=tmp_path)
    monkeypatch.setattr(core, "versions", lambda: {"trimtab": "another"})
    measure(synthetic(above(1.5), log=log), full=True, seeds=2, folder=tmp_path)
    assert len(log) == 12


def test_what_another_claim_measured_is_not_measured_again(tmp_path: Path) -> None:
    log: list[Any] = []
    first = synthetic(above(1.5), log=log)
    renamed = Study(
        {"plain": arm(1.0), "method": arm(3.0), "wider": arm(4.0)},
        (Part("three is enough", "x", "method", "plain", ("wider",), above(1.5)),),
        first.full.measure, 2,
    )  # fmt: skip
    (row,) = measure(first, full=True, seeds=2, folder=tmp_path)
    log.clear()
    (other,) = measure(Claim("bapo", "", renamed, renamed), full=True, folder=tmp_path)
    assert log == [(4.0, 0), (4.0, 1)], "bounds of 1 and 3 were there under other names"
    assert other["arms"]["plain"]["values"] == row["arms"]["baseline"]["values"]
    assert {r.arm for r in recorded(tmp_path / "bapo" / "full.jsonl")} == {"plain", "method", "wider"}


def test_records_that_lack_a_number_are_measured_again(tmp_path: Path) -> None:
    log: list[Any] = []
    measure(synthetic(above(1.5), log=log), full=True, seeds=2, folder=tmp_path)
    old = synthetic(above(1.5), log=log).full
    both = Study(old.arms, (*old.parts, Part("it is there", "y", "method", "baseline", ("control",), above(-1.0))),
                 lambda method, seed: {**old.measure(method, seed), "y": 1.0}, 2)  # fmt: skip
    log.clear()
    rows = measure(Claim("grpo", "", both, both), full=True, folder=tmp_path)
    assert len(log) == 6
    assert rows[1]["effect"] == 0.0


def test_seconds_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.time, "process_time", iter(range(100)).__next__)
    (row,) = measure(synthetic(above(1.5)), seeds=2)
    assert [a["seconds"] for a in row["arms"].values()] == [2.0, 2.0, 2.0]


def test_rows_of_the_other_scope_are_kept_in_the_file(tmp_path: Path) -> None:
    claim = synthetic(above(1.5))
    write(measure(claim, full=True, seeds=2, folder=tmp_path / "runs"), tmp_path)
    path = write(measure(claim, seeds=3), tmp_path)
    write(measure(claim, seeds=4), tmp_path)
    assert [(r["scope"], r["seeds"]) for r in json.loads(path.read_text())] == [("mechanism", 4), ("full", 2)]
    path.write_text('["x"]')
    with pytest.raises(ClaimError, match="not a list of claim rows"):
        write(measure(claim, seeds=2), tmp_path)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def one_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command sees one synthetic claim that does not hold, under every name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show, "find_claim", lambda name: synthetic(above(2.5)))


@pytest.mark.usefixtures("one_claim")
def test_the_exit_code_does_not_depend_on_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claim", "grpo", "--json", "--seeds", "3", "--out", "kept"]) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert [r["verdict"] for r in rows] == ["does not hold"]
    assert rows == json.loads(Path("kept/grpo.json").read_text())
    assert said.err == ""


@pytest.mark.usefixtures("one_claim")
def test_the_table_says_verdict_effect_and_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claim", "grpo", "--seeds", "3"]) == 0
    said = capsys.readouterr()
    flat = " ".join(said.out.split())
    for word in ("bounds are numbers", "does not hold", "asked:", "(control)", "Student t, 3 seeds"):
        assert word in flat
    assert said.err.count("grpo: ") == 9  # three arms, three seeds


@pytest.mark.usefixtures("one_claim")
def test_all_claims_in_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claim", "--all", "--json", "--seeds", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(claims.claims())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["bapp"], "Did you mean 'bapo'?"),
        (["grpo"], "has no claim yet"),
        ([], "--all"),
        (["bapo", "--all"], "--all"),
        (["bapo", "--seeds", "1"], "2 or more"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claim", *words]) == 1
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == ""


# -- the real claims, small ----------------------------------------------------------------------------------------


def untrained_masks(folder: Path) -> Callable[[int, bool], Path]:
    """In the place of masks that a run must make first: a method is named by its file's digest, whatever it holds."""

    def made(seed: int, by_lot: bool) -> Path:
        path = folder / f"{seed}-{by_lot}"
        path.write_text(path.name)
        return path

    return made


def test_claims_are_of_registered_methods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("mask_for", "tiny_mask"):
        monkeypatch.setattr(subnetwork, name, untrained_masks(tmp_path))
    assert set(claims.claims()) >= {"bnpo", "bapo", "rec"}
    for name in claims.claims():
        made = find_claim(name)
        assert made.method == name
        assert name in methods()
        paper = methods()[name].arxiv or name  # of two methods of one paper, its id names the first
        assert find_claim(paper) is made
        assert made.mechanism.seeds >= 5
        assert made.full.seeds >= 5
        for study in (made.mechanism, made.full):
            assert study.used() == list(study.arms), "an arm that no sentence needs"
            made_all = [a.make(0) for a in study.arms.values()]
            assert len({m.fingerprint() for m in made_all}) == len(made_all), "two arms are the same method"


SMALLER: list[tuple[str, Any, dict[str, Any]]] = [
    ("bnpo", bnpo, {"BATCHES": 100, "STARTS": (0, 10), "FROZEN": 5}),
    ("bapo", bapo, {"BATCHES": 2}),
    ("rec", rec, {"STEPS": 20}),
    ("d3s", d3s, {"UPDATES": 2, "EARLY": 1}),
    ("chord", chord, {"BATCHES": 2}),
    ("remix", remix, {"TURNS": 2, "GOAL": 0.0}),
    ("aepo", aepo, {"BATCHES": 20}),
    ("hapo", hapo, {"BATCHES": 2}),
    ("capo", capo, {"BATCHES": 3}),
]


@pytest.mark.parametrize(("name", "module", "smaller"), SMALLER)
def test_a_mechanism_runs_small(
    name: str, module: Any, smaller: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in smaller.items():
        monkeypatch.setattr(module, key, value)
    study = find_claim(name).mechanism
    chosen = list(dict.fromkeys(a for p in study.parts[:1] for a in p.arms()))[:2]
    for arm_name in chosen:
        values = study.measure(study.arms[arm_name].make(0), 0)
        again = study.measure(study.arms[arm_name].make(0), 0)
        assert values == again, "a pair of arms with one seed is a pair only if the seed decides everything"
        assert all(torch.isfinite(torch.tensor(v)) for v in values.values())


@pytest.mark.parametrize("name", ["bnpo", "bapo", "rec", "d3s", "chord", "remix", "aepo", "hapo", "capo"])
def test_every_metric_that_a_part_names_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other, module, smaller in SMALLER[3:]:
        if other == name:
            for key, value in smaller.items():
                monkeypatch.setattr(module, key, value)
    monkeypatch.setattr(bnpo, "BATCHES", 400)
    monkeypatch.setattr(bnpo, "FROZEN", 3)
    study = find_claim(name).mechanism
    values = study.measure(study.arms[study.parts[0].method].make(0), 0)
    assert {p.metric for p in study.parts} <= set(values)


def test_equal_steps_are_as_long_as_those_of_grpo() -> None:
    environment, policy = toys.skill_task()
    steps = run(bnpo.toy("grpo"), environment, policy, until=bnpo.EARLY, seed=0)
    assert sum(s.logs["grad_norm"] for s in steps) / bnpo.EARLY == pytest.approx(bnpo.LENGTH, rel=0.05)


def test_the_effect_on_tiny_runs_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(effect, "load", lambda seed: effect_at_nano(seed))
    made = find_claim("bapo")
    study = Study(
        {n: Arm(a.what, lambda seed, a=a: a.make(seed).set("collect.prompts", 2).set("collect.group", 4))  # type: ignore[misc]
         for n, a in made.full.arms.items()},
        made.full.parts, effect.on_tiny(60, problems=4), 2,
    )  # fmt: skip
    rows = measure(Claim("bapo", made.statement, study, study), full=True, folder=tmp_path)
    assert len(rows) == len(made.full.parts)
    for row in rows:
        assert all(0 <= v <= 1 for a in row["arms"].values() for v in a["values"])


def test_a_drawdown_is_the_deepest_fall_of_means_in_a_row() -> None:
    assert effect.drawdown([0.0, 0.2, 0.4, 0.6, 0.1, 0.1, 0.9, 0.9], over=2) == pytest.approx(0.4)
    assert effect.drawdown([0.1, 0.2, 0.3], over=1) == 0.0


def test_the_entropy_on_the_way_is_that_where_the_reward_is_reached() -> None:
    rewards, entropies = [0.0, 0.1, 0.2, 0.3, 0.0, 0.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert effect.entropy_on_the_way(rewards, entropies, goal=0.15, over=2) == pytest.approx(4.5)
    assert effect.entropy_on_the_way(rewards, entropies, goal=0.9, over=2) == pytest.approx(1.5)
    assert effect.entropy_on_the_way([0.5], [2.0], over=5) == 2.0


def test_hapo_is_measured_by_its_entropy_at_temperature_1() -> None:
    """Draws of one decision at a temperature of 1.3, weighted as if it were 1, have the policy's entropy."""
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    old, hot = logits.log_softmax(0), (logits / 1.3).log_softmax(0)
    drawn = torch.multinomial(hot.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))[:, None]
    batch = Batch({"logp_old": old[drawn], "logp_behavior": hot[drawn], "mask": torch.ones_like(drawn).bool()})
    exact = float(-(old.exp() * old).sum())
    assert hapo.untempered_entropy(Step(1, batch, {}, None)) == pytest.approx(exact, abs=0.005)  # type: ignore[arg-type]
    assert abs(float(-batch.logp_behavior.mean()) - exact) > 0.05


def test_remix_and_its_control_differ_in_the_clip_alone() -> None:
    ours, control = (remix.tiny_arm(name).make(0) for name in ("remix", "remix, clip at 1"))
    for one, other in zip(ours.phases, control.phases, strict=True):
        assert (one.name, one.until, one.enter) == (other.name, other.until, other.enter)
        assert one.method.passes == other.method.passes
        assert one.method.copies == other.method.copies
        mine, theirs = one.method.flatten(full=True), other.method.flatten(full=True)
        differing = {k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)}
        assert all(k.startswith("recentred(") for k in differing)
        assert bool(differing) == (one.name == "mix")
        assert mine["collect.prompts"] == (19 if one.name == "mix" else 32)


def effect_at_nano(seed: int) -> tuple[Any, Any]:
    """A random language model in the place of tiny, which is a minute in the making."""
    from trimtab.environments.text import load_environment
    from trimtab.policies.builtin import load_policy

    return load_environment("toy:sum(limit=5)", seed=seed), load_policy("nano", seed=0)


# -- the toys ------------------------------------------------------------------------------------------------------


def test_the_expected_reward_of_tokens_is_that_of_all_sequences() -> None:
    environment, policy = toys.token_task(prompts=3, length=3, vocabulary=5, seed=1)
    with torch.no_grad():
        policy.table.copy_(torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(0)))
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)
    total = 0.0
    for prompt in range(3):
        obs = torch.full((len(every), 1), prompt)
        logp = policy.logits(obs).log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(1)
        total += float((logp.exp() * environment.score(obs, every)).sum().detach()) / 3
    assert toys.token_reward(policy) == pytest.approx(total, abs=1e-12)


def test_toys_keep_to_their_declared_columns_and_learn() -> None:
    environment, policy = toys.bandit_task((0.0, 1.0), (0.5, 0.5))
    method = toys.on_toy(find("reinforce")(), prompts=4, group=8, lr=0.5)
    *_, last = run(method, environment, policy, until=60, seed=0, debug=True)
    assert last.logs["reward"] > 0.9
    assert last.state.clock.decisions == 60 * 32


def test_a_step_of_equal_length_is_that_long() -> None:
    environment, policy = toys.skill_task()
    before = policy.table.detach().clone()
    method = bnpo.toy_of_equal_steps("grpo")
    next(run(method, environment, policy, until=1))
    assert float((policy.table.detach() - before).norm()) == pytest.approx(bnpo.LENGTH)


def test_red_on_fixed_data_goes_to_the_second_best_arm() -> None:
    """The card's law: un-clipped REINFORCE on stale data climbs to the arm with the largest pi_b (r - mean)."""
    environment, policy = toys.bandit_task(rec.REWARDS, rec.START)
    method = toys.on_toy(find("reinforce")().but(rows=8).set("surrogate.unit", "group"), prompts=400, group=8, lr=0.5)
    next(run(method, environment, policy, until=1))
    assert int(policy.table.argmax()) == 1


def test_a_curve_is_published_beside_its_arms() -> None:
    def measured(method: Method, seed: int) -> dict[str, float]:
        high = float(method.get("surrogate.bound.high"))
        return {"x": high, "x@10": high + seed, "x@2": high}

    part = Part("three is enough", "x", "method", "baseline", ("control",), above(1.5), curve="x")
    study = Study({"baseline": arm(1.0), "method": arm(3.0), "control": arm(2.0)}, (part,), measured, 2)
    (row,) = measure(Claim("grpo", "", study, study))
    assert row["arms"]["method"]["curve"] == [[2, 3.0], [10, 3.5]]
    assert json.loads(json.dumps(row)) == row


def test_the_success_of_phrases_and_recall_is_that_of_their_draws() -> None:
    rng = torch.Generator().manual_seed(0)
    for (environment, policy), success in (
        (toys.phrase_task(0), toys.phrase_success),
        (toys.recall_task(0), toys.recall_success),
    ):
        method = toys.on_toy(find("reinforce")(), prompts=500, group=8, lr=0.0)
        step = next(run(method, environment, policy, until=1, seed=0, debug=True))
        expected = success(policy)  # type: ignore[arg-type]
        score = step.batch.score()
        assert abs(float(score.mean()) - expected) < 4 * float(score.std()) / 500**0.5
        obs = environment.draw(3, rng)
        assert policy.logits(obs).shape[0] == 3
    environment, policy = toys.phrase_task(0)
    method = toys.on_toy(find("reinforce")(), prompts=20, group=8, lr=0.0)
    batch = next(run(method, environment, policy, until=1, seed=0)).batch
    lengths = batch.mask.sum(1)
    assert len(lengths.unique()) > 3
    for action, mask, length in zip(batch.action, batch.mask, lengths.tolist()):
        assert mask[:length].all()
        assert not (action[: length - 1] == 0).any()
        assert length == 8 or action[length - 1] == 0
