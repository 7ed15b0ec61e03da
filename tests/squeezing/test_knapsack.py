from itertools import product

import numpy as np
import pytest

from shd_diffusion.squeezing.knapsack import Block, Choice, Option, choose_options, most_saved


def drawn_problem(seed: int) -> tuple[dict[str, list[Option]], dict[str, Block]]:
    """Three blocks of two parts each, and two parts in no block; whole savings, so that sums are exact."""
    random = np.random.default_rng(seed)

    def options(count: int) -> list[Option]:
        saved = np.sort(random.integers(1, 30, count))
        return [Option(0, 0), *(Option(float(random.exponential()), float(each)) for each in saved)]

    parts = {f"{block}.{part}": options(3) for block in "abc" for part in ("heads", "neurons")}
    parts |= {"in": options(2), "out": options(2)}
    blocks = {}
    for block in "abc":
        inside = frozenset(name for name in parts if name.startswith(f"{block}."))
        saved = sum(parts[name][-1].saved for name in inside) + float(random.integers(1, 20))
        blocks[block] = Block(Option(float(random.exponential(2)), saved), inside)
    return parts, blocks


def all_choices(parts: dict[str, list[Option]], blocks: dict[str, Block]):
    """Total loss and saving of every choice."""
    for gone in product((False, True), repeat=len(blocks)):
        if blocks and all(gone):
            continue
        removed = [block for block, is_gone in zip(blocks.values(), gone, strict=True) if is_gone]
        inside = {name for block in removed for name in block.parts}
        left = [options for name, options in parts.items() if name not in inside]
        for taken in product(*left):
            of_all = [*taken, *(block.leaving for block in removed)]
            yield sum(each.lost for each in of_all), sum(each.saved for each in of_all)


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all_choices(seed):
    parts, blocks = drawn_problem(seed)
    every = list(all_choices(parts, blocks))
    assert most_saved(parts, blocks) == max(saved for _, saved in every)
    for share in (0.1, 0.5, 0.8, 1.0):
        needed = share * most_saved(parts, blocks)
        found = choose_options(parts, blocks, needed)
        inside = {name for block in found.removed for name in blocks[block].parts}
        assert set(found.options) == set(parts) - inside
        taken = [parts[name][index] for name, index in found.options.items()]
        taken += [blocks[name].leaving for name in found.removed]
        assert sum(each.saved for each in taken) >= needed * (1 - 1e-9)
        best = min(lost for lost, saved in every if saved >= needed * (1 - 1e-9))
        assert sum(each.lost for each in taken) == pytest.approx(best, rel=1e-9)


def test_small_losses_are_told_apart_beside_large_ones():
    parts = {name: [Option(0, 0), Option(lost, 5)] for name, lost in (("a", 2e-9), ("b", 1e-9), ("c", 3e-9))}
    blocks = {name: Block(Option(1000, 20), frozenset()) for name in "xy"}
    assert choose_options(parts, blocks, 5) == Choice({"a": 0, "b": 1, "c": 0}, ())


def test_parts_alone_and_blocks_alone_can_be_chosen():
    parts = {"a": [Option(0, 0), Option(1, 5)], "b": [Option(0, 0), Option(2, 5)]}
    assert choose_options(parts, {}, 5).options == {"a": 1, "b": 0}
    blocks = {name: Block(Option(lost, 5), frozenset()) for name, lost in (("x", 3), ("y", 1))}
    assert choose_options({}, blocks, 5).removed == ("y",)
    assert choose_options({}, blocks, 0).removed == ()


def test_what_cannot_be_saved_is_refused():
    blocks = {name: Block(Option(1, 5), frozenset()) for name in "xy"}
    with pytest.raises(ValueError, match=r"10 cannot be saved: 5 can"):
        choose_options({}, blocks, 10)  # one block stays
