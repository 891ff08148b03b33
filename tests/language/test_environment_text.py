"""Drawing, the held-out split, demonstrations, state and description of text environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from trimtab.core.errors import CheckpointError, EnvironmentFailure
from trimtab.environments.pools import StreamPool
from trimtab.environments.problem import PromptTemplate, is_held_out, key_of, make_problem
from trimtab.environments.text import load_environment

TOY = "toy:sum(limit=9)"


def keys(problems):
    return [p.key for p in problems]


def test_held_out_is_fixed_and_never_drawn():
    environments = [load_environment(TOY, seed=seed) for seed in range(3)]
    held = [keys(e.held_out()) for e in environments]
    assert held[0] == held[1] == held[2] == sorted(held[0])
    assert keys(environments[0].held_out(5)) == held[0][:5]
    assert keys(environments[0].held_out(10_000)) == held[0]
    for environment in environments:
        drawn = keys(environment.draw(300))
        assert not set(drawn) & set(held[0])
        assert len(set(drawn) | set(held[0])) == 100


def test_split_follows_the_normalised_question():
    assert key_of("a  b\n") == key_of(" a b")
    assert key_of("a b") != key_of("A b")
    assert key_of([{"role": "user", "content": " a b"}]) == key_of([{"role": "user", "content": "a  b"}])
    assert key_of([{"role": "user", "content": "a"}]) != key_of([{"role": "system", "content": "a"}])
    assert is_held_out("00" * 32, 0.25)
    assert not is_held_out("40" + "00" * 31, 0.25)
    assert not is_held_out("00" * 32, 0.0)
    share = sum(is_held_out(key_of(f"question {i}"), 0.25) for i in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03


def test_epochs_are_complete_shuffled_and_seeded():
    environment = load_environment(TOY)
    size = environment.describe()["train"]
    first, second = keys(environment.draw(size)), keys(environment.draw(size))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == size
    assert first != second
    assert keys(load_environment(TOY).draw(size)) == first
    assert keys(load_environment(TOY, seed=1).draw(size)) != first


def test_draws_do_not_depend_on_their_sizes():
    one, other = load_environment(TOY), load_environment(TOY)
    together = keys(one.draw(200))
    assert [key for n in (1, 0, 7, 92, 100) for key in keys(other.draw(n))] == together


def test_state_is_exact_and_plain():
    environment = load_environment(TOY, seed=5)
    environment.draw(123)
    environment.score(environment.draw(2), ["x", "y"])
    state = json.loads(json.dumps(environment.state_dict()))
    ahead = keys(environment.draw(300))
    fresh = load_environment(TOY, seed=99)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert keys(fresh.draw(300)) == ahead
    assert fresh.describe()["scored"] == 2


def test_state_in_a_fresh_process():
    environment = load_environment(TOY, seed=5)
    environment.draw(77)
    state = environment.state_dict()
    code = (
        "import json, sys; from trimtab.environments.text import load_environment as l\n"
        f"e = l({TOY!r}); e.load_state_dict(json.loads(sys.argv[1])); print(json.dumps([p.key for p in e.draw(50)]))"
    )
    out = subprocess.run([sys.executable, "-c", code, json.dumps(state)], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == keys(environment.draw(50))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("cursor"),
        lambda s: s.update(extra=1),
        lambda s: s.update(cursor=-1),
        lambda s: s.update(epoch="1"),
        lambda s: s.update(failures={}),
        lambda s: s.update(fingerprint="other"),
    ],
)
def test_damaged_states_are_refused_and_change_nothing(change):
    environment = load_environment(TOY)
    environment.draw(10)
    before = environment.state_dict()
    state = json.loads(json.dumps(before))
    change(state)
    with pytest.raises(CheckpointError):
        environment.load_state_dict(state)
    assert environment.state_dict() == before


def test_state_of_other_problems_is_refused():
    state = load_environment(TOY).state_dict()
    for other in (load_environment("toy:sum(limit=8)"), load_environment(TOY, holdout=0.3)):
        with pytest.raises(CheckpointError, match="other problems or another holdout"):
            other.load_state_dict(state)
    load_environment(TOY, prompt="Q {question}").load_state_dict(state)  # the prompt is no part of the state


def test_demonstrations_move_the_cursor():
    environment, twin = load_environment(TOY), load_environment(TOY)
    pairs = environment.demonstrations(5)
    assert keys(p for p, _ in pairs) == keys(twin.draw(5))
    assert all(eval(p.question[:-1]) == int(text) for p, text in pairs)
    assert keys(environment.draw(3)) == keys(twin.draw(3))


def test_describe_is_plain_and_complete():
    described = json.loads(json.dumps(load_environment(TOY, seed=2, prompt="{question} ").describe()))
    assert described == {
        "spec": TOY,
        "reward": "exact",
        "prompt": "{question} ",
        "holdout": 0.25,
        "seed": 2,
        "pool": "listed",
        "train": described["train"],
        "held_out": 100 - described["train"],
        "duplicates": 0,
        "scored": 0,
        "failures": {},
        "max_failure_rate": 0.1,
    }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"holdout": 1.0}, "less than 1"),
        ({"holdout": -0.1}, "at least 0"),
        ({"holdout": float("nan")}, "at least 0"),
        ({"timeout": 0}, "above 0"),
        ({"timeout": float("inf")}, "above 0"),
        ({"max_failure_rate": 1.5}, "between 0 and 1"),
    ],
)
def test_option_faults(options, match):
    with pytest.raises(EnvironmentFailure, match=match):
        load_environment(TOY, **options)


def test_degenerate_splits(tmp_path):
    environment = load_environment(TOY, holdout=0)
    assert environment.describe()["train"] == 100
    with pytest.raises(EnvironmentFailure, match="raise holdout"):
        environment.held_out()
    path = tmp_path / "one.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(EnvironmentFailure, match="Lower holdout"):
        load_environment(str(path), holdout=0.9999999)
    with pytest.raises(EnvironmentFailure, match="0 or more"):
        environment.draw(-1)
    with pytest.raises(EnvironmentFailure, match="at least 1"):
        environment.held_out(0)
    assert environment.draw(0) == []


# --- streams, without any package


def stream(pool_size: int, holdout: float = 0.25, broken: int = 0) -> StreamPool:
    template = PromptTemplate("{question}")

    def make(low, high):
        made = [make_problem(f"q{i * 7919 % pool_size}", "a", {}, template, f"problem {i}") for i in range(low, high)]
        return [None if broken and (low + j) % broken == 0 else p for j, p in enumerate(made)]

    return StreamPool(make, holdout, "a stream", dict)


def test_stream_draws_do_not_depend_on_their_sizes_or_on_restarts():
    whole, _, _ = stream(10**9, broken=5).draw(3, 0, 0, 700)
    pool, cursor, parts = stream(10**9, broken=5), 0, []
    for n in (1, 300, 0, 9, 390):
        part, _, cursor = pool.draw(3, 0, cursor, n)
        parts += part
        if n == 300:
            pool = stream(10**9, broken=5)
    assert keys(parts) == keys(whole)
    assert not any(is_held_out(p.key, 0.25) for p in whole)


def test_stream_skips_what_it_asked_lately():
    drawn, _, _ = stream(300).draw(0, 0, 0, 500)
    for i in range(len(drawn)):
        assert drawn[i].key not in keys(drawn[max(0, i - 30) : i])


def test_stream_that_repeats_itself_is_an_error_and_not_a_loop():
    with pytest.raises(EnvironmentFailure, match="no new training problem"):
        stream(20).draw(0, 0, 0, 100)
    assert 0 < len(stream(300).held_out(1000)) < 110
    with pytest.raises(EnvironmentFailure, match="no held-out"):
        stream(10**9, holdout=0).held_out(3)


def test_gym_stream_state_is_exact():
    pytest.importorskip("reasoning_gym")
    spec = "reasoning-gym:basic_arithmetic"
    environment = load_environment(spec, seed=4)
    environment.draw(70)
    state = json.loads(json.dumps(environment.state_dict()))
    ahead = keys(environment.draw(40))
    fresh = load_environment(spec)
    fresh.load_state_dict(state)
    assert keys(fresh.draw(40)) == ahead
    with pytest.raises(CheckpointError):
        load_environment(spec, holdout=0.2).load_state_dict(state)


def test_gym_problems_do_not_depend_on_the_hash_seed():
    pytest.importorskip("reasoning_gym")
    spec = "reasoning-gym:ransom_note(size=4)"
    here = [p.question for p in load_environment(spec, holdout=0).draw(4)]
    code = (
        "import json; from trimtab.environments.text import load_environment as l\n"
        f"print(json.dumps([p.question for p in l({spec!r}, holdout=0).draw(4)]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert json.loads(out.stdout) == here


# --- imports


def test_importing_and_toy_need_no_package():
    code = (
        "import sys; from trimtab.environments.text import load_environment as l\n"
        "e = l('toy:sum'); e.score(e.draw(2), ['1', '2']); e.held_out()\n"
        "heavy = {'torch', 'numpy', 'reasoning_gym', 'datasets', 'math_verify', 'sympy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
