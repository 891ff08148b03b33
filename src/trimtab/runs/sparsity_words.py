"""What `trimtab sparsity` says: tables, and what they mean in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trimtab.core.disk import size_words
from trimtab.report.sparsity import short_layer

Made = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]
SHARES = ("sparsity", "unchanged", "sparsity_float32", "unchanged_float32")


def tables(made: Made) -> Iterator[Table]:
    """(title, heads, rows): each update in all and by layer, its course, and the overlap of two."""
    shares = [f"{view} {how}" for view in (made["dtype"], "float32") for how in (f"{made['tol']:g}", "exact")]
    for update in made["updates"]:
        rank = ["rank"] if "rank" in update else []
        groups = {"all": update["total"], "all but embeddings": update["without_embeddings"]}
        rows = [
            [name, f"{c['weights']:,}", *(percent(c[key]) for key in SHARES),
             *([percent(c.get("rank", math.nan))] if rank else [])]
            for name, c in {**groups, **_places(update)}.items()
        ]  # fmt: skip
        yield f"{update['update']}: weights unchanged", ["in", "weights", *shares, *rank], rows
        if "course" in update:
            rows = [[str(c["turn"]), *(percent(c[key]) for key in SHARES)] for c in update["course"]]
            yield f"{update['update']}: weights unchanged since its start", ["turn", *shares], rows
    if "overlap" in made:
        rows = [
            [name, *(percent(c[key]) for key in ("o1", "chance_o1", "o2", "chance_o2"))]
            for name, c in {"all": made["overlap"], **_places(made)}.items()
        ]
        yield "changed by both", ["in", "of the first", "by chance", "of the second", "by chance"], rows


def _places(made: Made) -> dict[str, Any]:
    """Networks, where there are several, and layers, under names that are short and still differ."""
    if len(made["networks"]) > 1:
        return {**made["networks"], **made["layers"]}
    short = {name: short_layer(name) for name in made["layers"]}
    same = len(set(short.values())) < len(short)
    return {name if same else short[name]: layer for name, layer in made["layers"].items()}


def sentences(made: Made) -> list[str]:
    """What the numbers mean, and what they do not."""
    said = []
    for update in made["updates"]:
        near = [f"{percent(v)} within {k.split('_')[1]}" for k, v in update["total"].items() if k.startswith("within_")]
        said.append(f"{update['update']}: in units of a matrix's root mean square, in float32: {', '.join(near)}.")
        if "touched" in update:
            said.append(
                f"{update['update']}: {percent(update['touched'])} of the weights differed from the start at some "
                f"checkpoint kept, and {percent(update['changed_back'])} differed there and do not at the end."
            )
        if "rank" in update and not math.isnan(update["rank"]):
            said.append(f"{update['update']}: mean rank of a matrix of differences {percent(update['rank'])} of full.")
    if "ends" in made:
        ends = made["ends"]
        said.append(
            f"The two ends agree on {percent(ends['sparsity'])} of the weights within {made['tol']:g} in "
            f"{made['dtype']}; each end agrees with its own start on "
            f"{' and '.join(percent(u['total']['sparsity']) for u in made['updates'])}."
        )
        if not made["one_start"]:
            said.append("The two began from different parameters: what they changed is not of the same weights.")
    if "mask" in made:
        mask = made["mask"]
        said.append(
            f"mask: {mask['file']} chooses {mask['weights']:,} weights ({percent(mask['density'])}), "
            f"{size_words(mask['bytes'])}, sha256 {mask['digest']}"
        )
    return said


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.2%}"
