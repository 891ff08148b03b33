"""Training a sub-network: the card's exact checks, the literal twin, the mask file and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.golden import subnetwork_twin, twins
from tests.spikes.tokens import case as tokens
from tests.spikes.tokens import token_rollouts
from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.piece import Piece, piece
from trimtab.core.registry import find, parse
from trimtab.core.state import load, save
from trimtab.core.terms import Term
from trimtab.methods.cases import case
from trimtab.stages.momentum import averaging, follow
from trimtab.stages.sparsity import parameters
from trimtab.stages.subnetwork import (
    MaskError,
    MaskFile,
    base_of,
    choose,
    hash_of,
    read_header,
    read_mask,
    subnetwork,
    write_mask,
)
from trimtab.stages.update import adamw, clipped, repeated, rmsprop, scheduled, sgd, stopped_at

torch.set_num_threads(1)


def mask_of(models: dict[str, nn.Module], path: Path, density: float = 0.3, seed: int = 0) -> str:
    """A file of random masks for these networks as they are."""
    g = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(p.shape, generator=g) < density for name, p in parameters(models).items()}
    write_mask(path, masks, {n: base_of(m) for n, m in models.items()}, {"seed": seed})
    return str(path)


# -- a model whose gradient is given -------------------------------------------------------------------------------


class Weights(nn.Module):
    provides = frozenset({"logp"})

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def evaluate(self, batch: Batch, want: set[str]) -> dict[str, Tensor]:
        return {"logp": (batch.slope * self.w).sum(1, keepdim=True)}


@piece("collect", writes=("slope", "mask", "source"))
def slopes(kit: Kit, *, noise: float = 0.0, slope: tuple[float, ...] = (3.0, 4.0)) -> Batch:
    """One row whose loss has the gradient `slope`, with noise."""
    drawn = torch.randn(1, len(slope), generator=kit.rng("noise"), dtype=torch.float64)
    return Batch({"slope": torch.tensor([slope], dtype=torch.float64) + noise * drawn, "mask": torch.ones(1, 1).bool(),
                  "source": torch.zeros(1, dtype=torch.long)})  # fmt: skip


@piece("loss", reads=("slope",), wants=("logp",), per="row")
def given_slope(batch: Batch, now: dict[str, Tensor]) -> Term:
    """The slope is the gradient."""
    return Term(now["logp"], name="given")


def sloped(update: Piece, noise: float = 0.0, slope: tuple[float, ...] = (3.0, 4.0)) -> Method:
    from trimtab.core.track import Track

    track = Track("policy", "policy", (given_slope(),), update)
    return Method("sloped", pieces=(slopes(noise=noise, slope=slope),), tracks=(track,))


def trained(method: Method, models: Any, environment: Any = None, until: int = 1, **more: Any) -> list[Any]:
    return list(run(method, environment, models, until=until, **more))


def written(path: Path, model: nn.Module, chosen: list[bool]) -> str:
    write_mask(path, {"policy/w": torch.tensor(chosen)}, {"policy": base_of(model)}, {})
    return str(path)


FOUR = (0.5, -1.0, 2.0, 0.25)
UPDATES: dict[str, Piece] = {
    "adamw": adamw(lr=1e-2, weight_decay=0.1),
    "adamw clipped": adamw(lr=1e-2, weight_decay=0.1, clip=0.5),
    "adam": adamw(lr=1e-2),
    "rmsprop": rmsprop(lr=1e-2),
    "sgd": sgd(lr=1e-2),
    "sgd with momentum": follow(direction=averaging(eta=0.1), lr=1e-2),
}


def wrapped(update: Piece, *wraps: Piece) -> Method:
    method = sloped(update, noise=1.0, slope=(3.0, 4.0, -1.0, 0.5))
    for wrap in wraps:
        method = method.wrap("update", wrap)
    return method


@pytest.mark.parametrize("name", UPDATES)
def test_card_check_5_off_the_mask_every_bit_stays(name: str, tmp_path: Path) -> None:
    model = Weights(*FOUR)
    start = model.w.detach().clone()
    mask = written(tmp_path / "m", model, [True, False, True, False])
    trained(wrapped(UPDATES[name], subnetwork(mask)), model, until=100)
    assert torch.equal(model.w.detach()[1::2], start[1::2])
    assert bool((model.w.detach()[::2] != start[::2]).all())
    free = Weights(*FOUR)
    trained(wrapped(UPDATES[name]), free, until=100)
    assert bool((free.w.detach() != start).all())


def test_card_check_5_masking_the_gradient_alone_leaks_through_the_decay(tmp_path: Path) -> None:
    """What the restored step is for: the same update with gradients masked, and nothing put back."""
    from trimtab.stages.subnetwork import MaskedClosure

    @piece("update", one_gradient=True)
    def gradient_alone(kit: Kit, closure: Any, *, inner: Any) -> Any:
        return inner(MaskedClosure(closure, {"w": torch.tensor([True, False, True, False])}))

    model = Weights(*FOUR)
    trained(wrapped(UPDATES["adamw"], gradient_alone()), model, until=100)
    assert bool((model.w.detach()[1::2] != torch.tensor(FOUR, dtype=torch.float64)[1::2]).all())


@pytest.mark.parametrize("name", UPDATES)
def test_card_check_5_all_ones_is_the_plain_update_and_all_zeros_moves_nothing(name: str, tmp_path: Path) -> None:
    plain, ones, none, zeros = (Weights(*FOUR) for _ in range(4))
    trained(wrapped(UPDATES[name]), plain, until=100)
    trained(wrapped(UPDATES[name], subnetwork(written(tmp_path / "1", ones, [True] * 4))), ones, until=100)
    trained(wrapped(UPDATES[name], subnetwork()), none, until=100)
    trained(wrapped(UPDATES[name], subnetwork(written(tmp_path / "0", zeros, [False] * 4))), zeros, until=100)
    assert torch.equal(plain.w, ones.w)
    assert torch.equal(plain.w, none.w)
    assert torch.equal(zeros.w, Weights(*FOUR).w)


def test_moments_stay_zero_off_the_mask(tmp_path: Path) -> None:
    model = Weights(*FOUR)
    mask = written(tmp_path / "m", model, [True, False, True, False])
    last = trained(wrapped(UPDATES["adamw"], subnetwork(mask)), model, until=5)[-1]
    (held,) = last.state.pieces["policy/optimizer"].state.values()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert bool((held[moment][1::2] == 0).all())
        assert bool((held[moment][::2] != 0).all())


@pytest.mark.parametrize("how", ["adamw's own", "a wrap outside", "a wrap inside"])
def test_card_check_6_clip_first_then_mask(how: str, tmp_path: Path) -> None:
    """Gradient (3, 4), mask (1, 0), longest 1: 0.6 is left; the other order would leave 1."""
    model = Weights(0.0, 0.0)
    mask = subnetwork(written(tmp_path / "m", model, [True, False]))
    if how == "adamw's own":  # the first moment after one step is a tenth of the gradient
        logs = trained(sloped(adamw(lr=1.0, clip=1.0)).wrap("update", mask), model)[-1]
        (held,) = logs.state.pieces["policy/optimizer"].state.values()
        left = 10 * float(held["exp_avg"][0])
    else:
        wraps = (mask, clipped(1.0)) if how == "a wrap outside" else (clipped(1.0), mask)
        method = sloped(sgd(lr=1.0))
        for wrap in wraps:
            method = method.wrap("update", wrap)
        logs = trained(method, model)[-1]
        left = -float(model.w.detach()[0])
    assert left == pytest.approx(0.6, abs=1e-6)
    assert float(model.w.detach()[1]) == 0.0
    assert logs.logs["subnetwork"] == 0.5
    if how == "adamw's own":
        assert logs.logs["grad_norm"] == pytest.approx(5.0)
        assert logs.logs["grad_norm_inside"] == pytest.approx(3.0)


def test_card_check_9_the_first_step_is_that_of_the_full_run_where_the_mask_is(tmp_path: Path) -> None:
    steps = []
    base = find("grpo")().set("update.clip", 0.05).set("update.weight_decay", 0.1)
    for masked in (False, True):
        k = case("text", 0)
        models, start = k.models, {n: p.clone() for n, p in parameters(k.models).items()}
        mask = mask_of(models, tmp_path / "m")
        method = k.shrink(find("subnetwork")(base, mask=mask) if masked else base)
        trained(method, models, k.environment, seed=5)
        steps.append({n: p - start[n] for n, p in parameters(models).items()})
    full, part = steps
    for name, mine in read_mask(tmp_path / "m", "policy").items():
        assert torch.equal(part[f"policy/{name}"], full[f"policy/{name}"] * mine)
    assert any(bool((full[n] != 0).any()) for n in full)


# -- with other wraps ----------------------------------------------------------------------------------------------


WRAPS: dict[str, tuple[Piece, ...]] = {
    "repeated": (repeated(times=3),),
    "scheduled": (scheduled(0.5),),
    "stopped_at": (stopped_at(limit=1e9, metric="given"),),
    "clipped and repeated": (clipped(1.0), repeated(times=2)),
}


@pytest.mark.parametrize("outermost", [True, False])
@pytest.mark.parametrize("name", WRAPS)
def test_other_wraps_inside_and_outside_keep_the_mask(name: str, outermost: bool, tmp_path: Path) -> None:
    wraps = WRAPS[name]
    model = Weights(*FOUR)
    mask = subnetwork(written(tmp_path / "m", model, [True, False, True, False]))
    order = (*wraps, mask) if outermost else (mask, *wraps)
    trained(wrapped(UPDATES["adamw"], *order), model, until=7)
    start = torch.tensor(FOUR, dtype=torch.float64)
    assert torch.equal(model.w.detach()[1::2], start[1::2])
    assert bool((model.w.detach()[::2] != start[::2]).all())


def test_repeated_steps_see_masked_gradients_each_time(tmp_path: Path) -> None:
    """`anew` wraps again: without it the moments of later steps would not stay zero off the mask."""
    model = Weights(*FOUR)
    mask = subnetwork(written(tmp_path / "m", model, [True, False, True, False]))
    last = trained(wrapped(adamw(lr=1e-2), repeated(times=3), mask), model, until=1)[-1]
    (held,) = last.state.pieces["policy/optimizer"].state.values()
    assert bool((held["exp_avg"][1::2] == 0).all())
    assert float(held["step"]) == 3


@pytest.mark.parametrize("expression", ["subnetwork+sac", "subnetwork+ppo", "subnetwork+trpo", "subnetwork+harpg"])
def test_every_network_of_a_control_method_keeps_its_bits_off_the_mask(expression: str, tmp_path: Path) -> None:
    method = parse(expression)
    k = case(find(expression.rpartition("+")[2]).case, 1)
    models = k.models_of(method)
    start = {n: p.clone() for n, p in parameters(models).items()}
    mask = mask_of(models, tmp_path / "m", density=0.5)
    method = k.shrink(find("subnetwork")(find(expression.rpartition("+")[2])(), mask=mask))
    trained(method, models, k.environment, until=12)
    end, moved = parameters(models), set()
    for network in models:
        for name, mine in read_mask(mask, network).items():
            key = f"{network}/{name}"
            assert torch.equal(end[key][~mine], start[key][~mine]), key
            moved |= {network} if bool((end[key] != start[key]).any()) else set()
    assert moved == set(models)


# -- the literal twin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_method_agrees_with_its_twin(seed: int, tmp_path: Path) -> None:
    environment, models = tokens(seed)
    mask = mask_of(dict(models), tmp_path / "m", density=0.4, seed=seed)
    base = find("grpo")(passes=2)
    # Adam divides by the size of the gradient: a small eps would blow up the rounding of gradients near zero.
    for name, value in (("lr", 0.05), ("weight_decay", 0.1), ("clip", 0.02), ("eps", subnetwork_twin.EPS)):
        base = base.set(f"update.{name}", value)
    method = find("subnetwork")(base, mask=mask).swap("collect", token_rollouts(prompts=3, group=4))
    chosen = {tuple(p) for p in read_mask(mask, "policy")["logits"].nonzero().tolist()}
    optimizer = subnetwork_twin.Masked(lr=0.05, decay=0.1, clip=0.02, mask=chosen)
    policy: Any = models["policy"]
    before = policy.logits.detach().clone()
    for step in run(method, environment, models, until=2, seed=seed):
        expected = subnetwork_twin.subnetwork(step.batch, before, optimizer, subnetwork_twin.grpo_loss, 2)
        assert float((policy.logits.detach() - expected).abs().max()) < 1e-12
        assert float((expected - before).abs().max()) > 1e-3
        before = policy.logits.detach().clone()
    assert twins.TWINS["subnetwork"] is not None


# -- the file ------------------------------------------------------------------------------------------------------


def test_a_mask_file_holds_one_bit_a_weight_and_comes_back(tmp_path: Path) -> None:
    masks = {"policy/a": torch.rand(33, 31) < 0.5, "policy/b": torch.rand(3) < 0.5, "critic/a": torch.ones(()).bool()}
    path = tmp_path / "deep" / "m"
    digest = write_mask(path, masks, {"policy": "x", "critic": "y"}, {"seed": 7, "config": "abc"})
    assert path.stat().st_size < 33 * 31 / 8 + 1000
    back = {f"{n}/{name}": m for n in ("policy", "critic") for name, m in read_mask(path, n).items()}
    assert back.keys() == masks.keys()
    assert all(torch.equal(back[n], masks[n]) for n in masks)
    header = read_header(path)
    assert (header["base"], header["seed"], header["config"]) == ({"policy": "x", "critic": "y"}, 7, "abc")
    assert MaskFile.of(path).digest == digest
    assert write_mask(path, masks, {"policy": "x", "critic": "y"}, {"seed": 7, "config": "abc"}) == digest
    with pytest.raises(MaskError, match="is there already and holds something else"):
        write_mask(path, masks, {"policy": "x", "critic": "z"}, {})


def test_the_base_of_a_mask_does_not_depend_on_the_precision_that_holds_it() -> None:
    w = torch.randn(9).bfloat16()
    assert hash_of([("w", w)]) == hash_of([("w", w.float())]) == hash_of([("w", w.double())])
    assert hash_of([("w", w)]) != hash_of([("v", w)])
    assert hash_of([("w", w)]) != hash_of([("w", w.view(3, 3))])
    assert hash_of([("w", w), ("v", w)]) == hash_of([("v", w), ("w", w)])


def test_the_digest_of_the_file_is_part_of_the_method(tmp_path: Path) -> None:
    model = Weights(0.0, 0.0)
    path = Path(written(tmp_path / "m", model, [True, False]))
    first = parse(f"subnetwork(mask='{path}')")
    path.unlink()
    written(path, model, [False, True])
    assert parse(f"subnetwork(mask='{path}')").fingerprint() != first.fingerprint()
    with pytest.raises(MaskError, match="has changed since it was named"):
        begin(sloped(sgd(lr=1.0)).wrap("update", first.get("masked")), None, {"policy": model})


def started(path: str, models: Any) -> None:
    begin(sloped(sgd(lr=1.0)).wrap("update", subnetwork(path)), None, models)


def test_a_mask_of_another_base_network_or_shape_is_refused(tmp_path: Path) -> None:
    model = Weights(1.0, 2.0)
    path = written(tmp_path / "m", model, [True, False])
    started(path, {"policy": model})
    with pytest.raises(MaskError, match="A mask belongs to its base"):
        started(path, {"policy": Weights(1.0, 2.5)})
    with pytest.raises(MaskError, match=r"'w' has shape \[3\] in 'policy', has shape \[2\] in it"):
        started(path, {"policy": Weights(1.0, 2.0, 3.0)})
    write_mask(tmp_path / "v", {"policy/v": torch.ones(2).bool()}, {"policy": base_of(model)}, {})
    with pytest.raises(MaskError, match=r"'w' has shape \[2\] in 'policy', is not there in it"):
        started(str(tmp_path / "v"), {"policy": model})
    write_mask(tmp_path / "c", {"critic/w": torch.ones(2).bool()}, {"critic": base_of(model)}, {})
    with pytest.raises(MaskError, match="holds masks of critic and none of 'policy'"):
        started(str(tmp_path / "c"), {"policy": model})


def test_a_file_that_is_no_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"cannot be read \(No such file"):
        subnetwork(tmp_path / "none")
    (tmp_path / "text").write_text("no mask")
    with pytest.raises(MaskError, match="cannot be read as a mask"):
        started(str(tmp_path / "text"), {"policy": Weights(0.0, 0.0)})
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(MaskError, match="is no mask of this version"):
        started(str(tmp_path / "model.safetensors"), {"policy": Weights(0.0, 0.0)})
    good = written(tmp_path / "m", Weights(0.0, 0.0), [True, True])
    with safe_open(good, "pt") as f:
        save_file({"policy/w": torch.zeros(5, dtype=torch.uint8)}, tmp_path / "bad", metadata=f.metadata())
    with pytest.raises(MaskError, match="'policy/w' has 5 bytes for 2 weights"):
        started(str(tmp_path / "bad"), {"policy": Weights(0.0, 0.0)})


def test_a_path_in_the_place_of_a_mask_file_and_two_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"write subnetwork\(mask='x'\), which reads it"):
        parse("subnetwork").set("masked.mask", "x")
    model = Weights(0.0, 0.0)
    mask = subnetwork(written(tmp_path / "m", model, [True, False]))
    with pytest.raises(MethodError, match="has two masks"):
        begin(sloped(sgd(lr=1.0)).wrap("update", mask).wrap("update", mask), None, {"policy": model})


def test_a_masked_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    k = case("text", 0)
    mask = mask_of(k.models, tmp_path / "m")
    method = k.shrink(find("subnetwork")(mask=mask, every=1))
    straight = case("text", 0)
    trained(method, straight.models, straight.environment, until=4, seed=1)
    half = case("text", 0)
    for step in run(method, half.environment, half.models, until=4, seed=1):
        if step.turn == 2:
            save(step.state, tmp_path / "c")
    fresh = case("text", 0)
    state = begin(method, fresh.environment, fresh.models, seed=9)
    load(state, tmp_path / "c")
    trained(method, fresh.models, fresh.environment, until=4, state=state)
    ends = [parameters(c.models) for c in (straight, half, fresh)]
    assert all(torch.equal(ends[0][n], e[n]) for e in ends[1:] for n in e)
    held = json.loads((tmp_path / "c" / "turn-00000002" / "manifest.json").read_text())
    assert held["fingerprint"] == method.fingerprint()
    shutil.rmtree(tmp_path / "c")


def test_the_masks_of_a_checkpoint_are_not_in_it(tmp_path: Path) -> None:
    model = Weights(*FOUR)
    mask = written(tmp_path / "m", model, [True, False, True, False])
    state = trained(wrapped(sgd(lr=0.1), subnetwork(mask)), model)[-1].state
    assert state.tree()["pieces"]["policy/subnetwork"] == {}
    assert choose.__doc__ is not None
