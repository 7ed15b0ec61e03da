import pytest

from shd_diffusion.losses.layer_map import map_blocks


def blocks(prefix, kinds):
    return {f"{prefix}{i}": kind for i, kind in enumerate(kinds)}


def numbers(pairs):
    return {int(ours[1:]): int(theirs[1:]) for ours, theirs in pairs.items()}


@pytest.mark.parametrize(
    ("teacher", "student", "layer_map", "expected"),
    [
        (12, 6, "uniform", [1, 3, 5, 7, 9, 11]),
        (28, 12, "uniform", [2, 4, 6, 9, 11, 13, 16, 18, 20, 23, 25, 27]),
        (5, 3, "uniform", [1, 3, 4]),
        (3, 3, "uniform", [0, 1, 2]),
        (2, 4, "uniform", [0, 0, 1, 1]),
        (5, 3, "last", [2, 3, 4]),
        (5, 3, "first", [0, 1, 2]),
        (5, 3, [4, 0, 0], [4, 0, 0]),
    ],
)
def test_layer_maps(teacher, student, layer_map, expected):
    pairs = map_blocks(blocks("t", ["self"] * teacher), blocks("s", ["self"] * student), layer_map)
    assert numbers(pairs) == dict(enumerate(expected))


def test_blocks_meet_their_own_kind():
    pairs = map_blocks(blocks("t", ["self", "cross"] * 4), blocks("s", ["self", "cross"] * 2))
    assert numbers(pairs) == {0: 2, 1: 3, 2: 6, 3: 7}
    teacher = {f"t{i}{stream}": "joint" for i in range(4) for stream in ("", ":context")}
    student = {f"s{i}{stream}": "joint" for i in range(2) for stream in ("", ":context")}
    assert map_blocks(teacher, student) == {
        "s0": "t1",
        "s0:context": "t1:context",
        "s1": "t3",
        "s1:context": "t3:context",
    }


def unet(layers, depth, mid=True):
    """The self-attention of a UNet as diffusers names it: two stages each way, `depth` blocks in each transformer."""
    stages = [f"down_blocks.{stage}.attentions.{layer}" for stage in range(2) for layer in range(layers)]
    stages += ["mid_block.attentions.0"] * mid
    stages += [f"up_blocks.{stage}.attentions.{layer}" for stage in range(2) for layer in range(layers + 1)]
    return {f"{stage}.transformer_blocks.{block}.attn1": "self" for stage in stages for block in range(depth)}


def test_shallower_transformers_of_a_unet_meet_their_own():
    pairs = map_blocks(unet(2, 10), unet(2, 5))
    assert len(pairs) == 11 * 5
    for name, by in pairs.items():
        place, other = name.rpartition(".attn1")[0], by.rpartition(".attn1")[0]
        assert place.rpartition(".")[0] == other.rpartition(".")[0]
        assert int(other.rpartition(".")[2]) == 2 * int(place.rpartition(".")[2]) + 1


@pytest.mark.parametrize("mid", [True, False])
def test_fewer_layers_of_a_unet_meet_the_same_resolution(mid):
    pairs = map_blocks(unet(2, 1), unet(1, 1, mid))
    short = {
        name.removesuffix(".transformer_blocks.0.attn1"): by.split(".transformer")[0]
        for name, by in pairs.items()
    }
    assert short == {
        "down_blocks.0.attentions.0": "down_blocks.0.attentions.1",
        "down_blocks.1.attentions.0": "down_blocks.1.attentions.1",
        **({"mid_block.attentions.0": "mid_block.attentions.0"} if mid else {}),
        "up_blocks.0.attentions.0": "up_blocks.0.attentions.1",
        "up_blocks.0.attentions.1": "up_blocks.0.attentions.2",
        "up_blocks.1.attentions.0": "up_blocks.1.attentions.1",
        "up_blocks.1.attentions.1": "up_blocks.1.attentions.2",
    }


def test_student_blocks_may_be_left_out():
    teacher, student = blocks("t", ["self"] * 4), blocks("s", ["self"] * 3)
    assert numbers(map_blocks(teacher, student, [None, 2, None])) == {1: 2}
    assert map_blocks(teacher, student, {"s2": "t0"}) == {"s2": "t0"}


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ([0, 1], "2 entries"),
        ([0, 1, 4], "s2"),
        ([0, -1, 2], "s1"),
        ({"s9": "t0"}, "s9"),
        ({"s0": "t4"}, "kinds"),
    ],
)
def test_a_map_that_does_not_fit_is_an_error(layer_map, message):
    with pytest.raises(ValueError, match=message):
        map_blocks(blocks("t", ["self"] * 4 + ["cross"]), blocks("s", ["self"] * 3), layer_map)


@pytest.mark.parametrize("layer_map", ["last", "first"])
def test_more_student_blocks_than_the_teacher_has(layer_map):
    with pytest.raises(ValueError, match="teacher's 2"):
        map_blocks(blocks("t", ["self"] * 2), blocks("s", ["self"] * 3), layer_map)


def test_a_kind_that_the_teacher_lacks_is_an_error():
    with pytest.raises(ValueError, match="cross"):
        map_blocks(blocks("t", ["self"] * 2), blocks("s", ["self", "cross"]))


def test_the_text_rows_of_a_block_follow_its_image_rows():
    """The last block of a joint model has none of the text's: counted apart, the streams would part."""
    teacher = {f"t{i}{stream}": "joint" for i in range(4) for stream in ("", ":context")} | {"t4": "joint"}
    student = {"s0": "joint", "s0:context": "joint", "s1": "joint"}
    assert map_blocks(teacher, student) == {"s0": "t2", "s0:context": "t2:context", "s1": "t4"}
    assert map_blocks(teacher, student, [1, 3]) == {"s0": "t1", "s0:context": "t1:context", "s1": "t3"}
    assert map_blocks(teacher, student, "last") == {"s0": "t3", "s0:context": "t3:context", "s1": "t4"}
    assert map_blocks(teacher, student, [4, 4]) == {"s0": "t4", "s1": "t4"}
    assert map_blocks(student, student, [None, 1]) == {"s1": "s1"}
