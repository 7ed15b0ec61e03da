"""A whole model compressed: what must be lossless is, and every part is the least-squares fit that it says it is."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.linalg
import torch
from calibration import batches_of, dit_batches, random_dit, run_dit, run_family
from families import FAMILIES, output
from torch import nn

from shd_diffusion.attention import AttentionCapture, attention_blocks
from shd_diffusion.compression import compress, head_fits
from shd_diffusion.compression.attention import HeadOptions
from shd_diffusion.models.layouts import feed_forwards, head_layout
from shd_diffusion.models.squeezed import cut_heads, shape, squeezed_class

SQUEEZABLE = [
    "dit",
    "mdtv2",
    "mdtv2 masked",
    "unet2d-condition",
    "uvit2d",
    "pixart",
    "hunyuan-dit",
    "sd3",
    "qwen-image",
    "lumina2",  # keys shared among heads
    "wan",  # norms over all heads
    "hunyuan-video",  # one projection of neurons and of two streams of heads
    "ovis-image",  # and of gated neurons
    "flux2",  # by which queries, keys and values are made too
]  # further ones as pipelines, see test_text_pipelines.py


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_all_heads_and_all_neurons_are_the_teacher(name):
    family = FAMILIES[name]
    teacher = family.build()
    has_neurons = {"neurons": 1.0} if any("ff" in part for part in shape(teacher)) else {}
    found = compress(teacher, batches_of(family, (1,)), run_family, heads=1.0, **has_neurons)
    assert type(found.model) is type(teacher) and found.parts == ()
    expected = output(teacher(**family.draw(7)))
    torch.testing.assert_close(output(found.model(**family.draw(7))), expected, rtol=1e-5, atol=1e-6)
    assert found.lost < 1e-10


@pytest.mark.parametrize("name", SQUEEZABLE)
def test_fewer_heads_and_neurons_lose_little_and_load_again(name, tmp_path):
    family = FAMILIES[name]
    teacher = family.build()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    found = compress(teacher, batches_of(family), run_family, heads=0.5, neurons=0.5)
    assert found.parts and all(part.after < part.before for part in found.parts)
    assert all(0 <= part.lost <= 1 for part in found.parts)
    assert all(part.lost <= part.lost_before + 1e-6 for part in found.parts if part.what == "heads")
    assert found.lost < 0.1  # far from the 1 of a model that predicts 0
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    assert not {*map(id, teacher.parameters())} & {*map(id, found.model.parameters())}

    found.model.save_pretrained(tmp_path)
    kind = squeezed_class(type(teacher))
    assert isinstance(found.model, kind) and found.model.config["_class_name"] == kind.__name__
    loaded = kind.from_pretrained(tmp_path, use_safetensors=True).eval()
    torch.testing.assert_close(
        output(loaded(**family.draw(9))), output(found.model(**family.draw(9))), rtol=0, atol=0
    )
    with AttentionCapture(loaded) as capture:
        loaded(**family.draw(9))
        heads = {record.name: record.heads for record in capture.records.values()}
    for part in found.parts:
        if part.what == "heads":
            assert heads[part.name] == part.after


def test_heads_and_neurons_that_double_others_leave_without_loss():
    teacher = random_dit(4)
    for block in teacher.transformer_blocks:
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            for each in (layer.weight, layer.bias):
                by_head = each.data.unflatten(0, (4, 8))
                by_head[2], by_head[3] = by_head[0], by_head[1]
        first = block.ff.net[0].proj
        for each in (first.weight, first.bias):
            each.data[64:] = each.data[:64]
    found = compress(teacher, dit_batches(8, 16), run_dit, heads=2, neurons=64)
    assert {(part.what, part.after) for part in found.parts} == {("heads", 2), ("neurons", 64)}
    # the ridge takes 1e-5 of the mean square, the square of which is lost; and the maps are float32
    assert max(part.lost for part in found.parts) < 1e-6 and found.lost < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "sd3",
        "qwen-image",
        "auraflow",
        "cogview4",
        "hunyuan-video",
        "flux",
        "flux2",
        "lumina2",
        "wan",
        "sana",
        "z-image",
    ],
)
def test_doubled_heads_leave_without_loss(name):
    """Each stream's output weights differ by head, its queries, keys and values do not."""
    family = FAMILIES[name]
    teacher = family.build()
    blocks = [block for block in attention_blocks(teacher).values() if block.heads > 1 and block.capturable]
    for block in blocks:
        layout = head_layout(teacher, block.name)
        for part in layout.inputs:
            for parameter in teacher.get_submodule(part.layer).parameters():
                by_head = parameter.data[part.indices].unflatten(0, (-1, block.head_dim))
                by_head[1:] = by_head[:1].clone()
        for norm in layout.query_norms + layout.key_norms:
            by_head = teacher.get_submodule(norm).weight.data.unflatten(0, (-1, block.head_dim))
            by_head[1:] = by_head[:1].clone()
    found = compress(teacher, batches_of(family), run_family, heads={block.name: 1 for block in blocks})
    assert {part.name for part in found.parts} == {block.name for block in blocks}
    # the ridge takes 1e-5 of the mean square
    assert max(part.lost for part in found.parts) < 5e-6 and found.lost < 1e-6


@pytest.mark.parametrize(
    "name", ["flux", "flux2", "lumina2", "auraflow", "z-image", "sana", "ovis-image", "sd3", "cogview4"]
)
def test_doubled_neurons_leave_without_loss(name):
    """Their output weights differ, what they are made by does not."""
    family = FAMILIES[name]
    teacher = family.build()
    layers = feed_forwards(teacher)
    for layer in layers.values():
        for part in layer.inputs:
            for parameter in teacher.get_submodule(part.layer).parameters():
                half = part.start + layer.neurons // 2
                parameter.data[half : part.start + layer.neurons] = parameter.data[part.start : half].clone()
    found = compress(teacher, batches_of(family, (1, 2, 3, 4)), run_family, neurons=0.5)
    assert {part.name for part in found.parts} == set(layers)
    assert max(part.lost for part in found.parts) < 5e-6 and found.lost < 1e-6


def test_a_feed_forward_layer_of_two_streams_is_the_least_squares_fit_of_both():
    """CogView4's first one, before which nothing has been squeezed: by scipy on the rows of image and text."""
    family, name = FAMILIES["cogview4"], "transformer_blocks.0.ff"
    teacher = family.build()
    batches = batches_of(family, (1, 2, 3, 4))
    found = compress(teacher, batches, run_family, neurons={name: feed_forwards(teacher)[name].neurons // 2})
    rows = {model: ([], []) for model in (teacher, found.model)}
    for model, (read, put_out) in rows.items():

        def keep(module, args, result, read=read, put_out=put_out):
            read.append(args[0].flatten(0, -2).double())
            put_out.append(result.flatten(0, -2).double())

        with torch.no_grad(), model.get_submodule(f"{name}.net.2").register_forward_hook(keep):
            for batch in batches:
                run_family(model, *batch)
    read, wanted = torch.cat(rows[found.model][0]).numpy(), torch.cat(rows[teacher][1]).numpy()
    lengths = {len(each) for each in rows[teacher][0]}
    assert len(lengths) == 2  # image and text
    ones = np.concatenate([read, np.ones((len(read), 1))], 1)
    best = ones @ scipy.linalg.lstsq(ones, wanted)[0]
    error, energy = np.square(wanted - best).sum(), np.square(wanted - wanted.mean(0)).sum()
    (part,) = found.parts
    # the fit has a ridge of 1e-5, and its weights are float32
    assert part.lost == pytest.approx(error / energy, rel=1e-3)
    own = torch.cat(rows[found.model][1]).numpy()
    assert np.square(wanted - own).sum() == pytest.approx(error, rel=1e-3)


def test_a_block_is_the_least_squares_fit_of_its_own_features():
    """Output weights and bias solve the normal equations of the mixed values, on the rows themselves."""
    teacher, batches = random_dit(4, layers=1), dit_batches()
    found = compress(teacher, batches, run_dit, heads=2, options=HeadOptions(pairing="adjacent"))
    (part,) = found.parts
    features, targets = [], []
    for batch in batches:
        for model, into in ((found.model, features), (teacher, targets)):
            linear = model.transformer_blocks[0].attn1.to_out[0]
            keep = lambda module, args, result, into=into: into.append((args[0], result))  # noqa: E731
            with torch.no_grad(), linear.register_forward_hook(keep):
                run_dit(model, *batch)
    mixed = torch.cat([args for args, _ in features]).flatten(0, 1).double().numpy()
    fitted = torch.cat([result for _, result in features]).flatten(0, 1).double().numpy()
    wanted = torch.cat([result for _, result in targets]).flatten(0, 1).double().numpy()
    energy = ((wanted - wanted.mean(0)) ** 2).sum()
    assert part.lost == pytest.approx(((wanted - fitted) ** 2).sum() / energy, rel=1e-3)  # float32 weights
    ones = np.concatenate([mixed, np.ones((len(mixed), 1))], 1)
    best = ones @ np.linalg.lstsq(ones, wanted, rcond=None)[0]
    # No output weights on these values do better, but for what the last head's step has left to the next round.
    assert ((wanted - best) ** 2).sum() / energy == pytest.approx(part.lost, rel=0.05)


def eight_heads_on_four_keys():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 8, "num_kv_heads": 4}
    model = diffusers.Lumina2Transformer2DModel(**{**FAMILIES["lumina2"].arguments, **sizes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def rows_of(model, layer, batches):
    """What a layer takes and gives in a family's batches, a row a token, float64."""
    taken, given = [], []

    def keep(module, args, result):
        taken.append(args[0].flatten(0, -2))
        given.append(result.flatten(0, -2))

    with torch.no_grad(), model.get_submodule(layer).register_forward_hook(keep):
        for batch in batches:
            run_family(model, *batch)
    return torch.cat(taken).double().numpy(), torch.cat(given).double().numpy()


def ridge_solution(features, targets):
    """numpy's least squares with the refit's penalty as rows of their own."""
    penalty = 1e-5 * (features**2).sum(0).mean()
    rows = np.concatenate([features, np.sqrt(penalty) * np.eye(features.shape[1])])
    wanted = np.concatenate([targets, np.zeros((features.shape[1], targets.shape[1]))])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0]


@pytest.mark.parametrize("pairing", ["adjacent", "matched"])
def test_the_output_of_heads_that_share_keys_is_the_least_squares_fit_of_what_they_see(pairing):
    teacher, name, batches = eight_heads_on_four_keys(), "layers.0.attn", batches_of(FAMILIES["lumina2"])
    options = HeadOptions(pairing=pairing)
    found = compress(teacher, batches, run_family, heads={name: 6}, options=options)
    assert attention_blocks(found.model)[name].key_value_heads == 3
    seen = np.ones((len(batches), 2, 21), bool)
    seen[:, 0, -2:] = False  # the first sample's text has 3 tokens, not 5: its last two rows are padding
    features, fitted = (rows[seen.ravel()] for rows in rows_of(found.model, f"{name}.to_out.0", batches))
    wanted = rows_of(teacher, f"{name}.to_out.0", batches)[1][seen.ravel()]
    weight = found.model.get_submodule(name).to_out[0].weight.detach().double().numpy()
    np.testing.assert_allclose(weight.T, ridge_solution(features, wanted), rtol=1e-3, atol=1e-4)
    (part,) = found.parts
    assert part.lost == pytest.approx(((wanted - fitted) ** 2).sum() / (wanted**2).sum(), rel=1e-3)


def test_of_heads_that_merge_one_stays_that_moves_rows_which_count():
    """The second head sees all keys alike, so that it moves rows of padding alone, which see none; and these by far."""
    family, name = FAMILIES["chroma"], "single_transformer_blocks.0.attn"
    teacher = family.build()
    module = teacher.get_submodule(name)
    for linear, factor in ((module.to_q, 0.0), (module.to_v, 100.0)):
        for parameter in linear.parameters():
            parameter.data.unflatten(0, (3, -1))[1] *= factor
    first, _, third = module.to_q.weight.data.clone().unflatten(0, (3, -1))
    options = HeadOptions(pairing="adjacent")
    found = compress(teacher, batches_of(family), run_family, heads={name: 2}, options=options)
    assert found.groups[name] == ((0, 1), (2,))
    torch.testing.assert_close(
        found.model.get_submodule(name).to_q.weight, torch.cat([first, third]), rtol=0, atol=0
    )


def test_heads_and_neurons_of_one_projection_are_fitted_together():
    """Of Flux's single block: no weights and bias on what it is given do better, but for the penalty."""
    family = FAMILIES["flux"]
    teacher, block, batches = family.build(), "single_transformer_blocks.0", batches_of(family)
    counts = {"heads": {f"{block}.attn": 2}, "neurons": {f"{block}.proj_mlp": 20}}
    found = compress(teacher, batches, run_family, **counts)
    assert [part.what for part in found.parts] == ["heads", "neurons"]
    features, fitted = rows_of(found.model, f"{block}.proj_out", batches)
    _, wanted = rows_of(teacher, f"{block}.proj_out", batches)
    assert features.shape[1] == 2 * 8 + 20
    ones = np.concatenate([features, np.ones((len(features), 1))], 1)
    best = ones @ np.linalg.lstsq(ones, wanted, rcond=None)[0]
    energy = ((wanted - wanted.mean(0)) ** 2).sum()
    lost = ((wanted - fitted) ** 2).sum() / energy
    assert found.parts[1].lost == pytest.approx(lost, rel=1e-3)
    assert ((wanted - best) ** 2).sum() / energy == pytest.approx(lost, rel=0.05)


def test_a_norm_over_all_heads_is_made_good_where_the_others_keep_its_share():
    """Heads whose queries and keys are multiples of the first's, and their norm's weight the inverse: with the same
    maps, and with mean squares that are a multiple of any one head's."""
    family = FAMILIES["wan"]
    teacher, name = family.build(), "blocks.0.attn1"
    module = teacher.get_submodule(name)
    factors = torch.tensor([1.0, 3.0, 0.5])[:, None]
    for linear, norm in ((module.to_q, module.norm_q), (module.to_k, module.norm_k)):
        norm.eps = 0.0
        for parameter in linear.parameters():
            by_head = parameter.data.unflatten(0, (3, 12))
            by_head[:] = by_head[:1].clone() * factors.view(3, *[1] * (by_head.ndim - 1))
        weight = norm.weight.data.unflatten(0, (3, 12))
        weight[:] = weight[:1].clone() / factors
    found = compress(teacher, batches_of(family), run_family, heads={name: 2})
    for batch in batches_of(family, (9,)):
        maps = []
        for model in (teacher, found.model):
            with torch.no_grad(), AttentionCapture(model, [name]) as capture:
                run_family(model, *batch)
                maps.append(capture.records[name].maps())
        torch.testing.assert_close(maps[1], maps[0][:, :2], rtol=1e-4, atol=1e-6)
    assert found.model.get_submodule(name).norm_q.normalized_shape == (24,)


def test_a_norm_over_all_heads_is_otherwise_the_least_squares_fit_of_its_channels():
    family = FAMILIES["wan"]
    teacher, name, batches = family.build(), "blocks.0.attn2", batches_of(family)
    found = compress(teacher, batches, run_family, heads={name: 2})
    for norm in ("norm_q", "norm_k"):
        _, wanted = rows_of(teacher, f"{name}.{norm}", batches)
        _, given = rows_of(found.model, f"{name}.{norm}", batches)
        weight = found.model.get_submodule(f"{name}.{norm}").weight.detach().double().numpy()
        wanted = wanted.reshape(len(wanted), 3, 12)
        # the channels of the heads that stayed: those that what is given is nearest to
        nearest = [
            min(range(3), key=lambda h, i=i: ((given[:, 12 * i : 12 * i + 12] - wanted[:, h]) ** 2).sum())
            for i in (0, 1)
        ]
        for i, head in enumerate(nearest):
            for c in range(12):
                x = given[:, 12 * i + c] / weight[12 * i + c]
                best = np.linalg.lstsq(x[:, None], wanted[:, head, c], rcond=None)[0][0]
                assert weight[12 * i + c] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("queries", ["select", "factor"])
@pytest.mark.parametrize("pairing", ["adjacent", "matched"])
def test_every_way_of_merging_is_better_than_dropping_heads(queries, pairing):
    teacher, batches = random_dit(4), dit_batches()
    options = HeadOptions(pairing=pairing, queries=queries)
    found = compress(teacher, batches, run_dit, heads=2, options=options)
    dropped = random_dit(4)
    for name in ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"):
        cut_heads(dropped, name, torch.tensor([0, 1]))
    error = energy = 0.0
    for batch in dit_batches(2):
        expected = run_dit(teacher, *batch).detach()
        error += (run_dit(dropped, *batch).detach() - expected).square().sum().item()
        energy += expected.square().sum().item()
    assert found.lost < 0.5 * error / energy


def test_values_looked_for_in_fewer_directions_lose_little_more(monkeypatch):
    whole = compress(random_dit(4), dit_batches(), run_dit, heads=2)
    losses = []
    for widest in (10, 40, 60):
        monkeypatch.setattr(head_fits, "_WIDEST", widest)
        narrow = compress(random_dit(4), dit_batches(), run_dit, heads=2).parts[0]
        assert narrow.lost < narrow.lost_before
        losses.append(narrow.lost)
    assert whole.parts[0].lost < losses[2] < losses[1] < losses[0]


def test_a_part_of_the_rows_gives_nearly_the_same_fit():
    teacher, batches = random_dit(4, layers=1), dit_batches(8, 16)
    losses = [
        compress(teacher, batches, run_dit, heads=2, options=HeadOptions(rows=rows)).lost
        for rows in (None, 8)
    ]
    assert losses[0] <= losses[1] * 1.01 < losses[0] * 1.5


def test_counts_differ_by_block_and_what_is_not_named_stays():
    counts = {"heads": {"transformer_blocks.1.attn1": 3}, "neurons": {"transformer_blocks.0.ff": 10}}
    found = compress(random_dit(4), dit_batches(1), run_dit, **counts)
    assert shape(found.model) == {
        "transformer_blocks.0.attn1": 4,
        "transformer_blocks.1.attn1": 3,
        "transformer_blocks.0.ff": 10,
        "transformer_blocks.1.ff": 128,
    }
    assert found.model.config["squeezed_heads"] == counts["heads"]
    assert found.model.config["squeezed_neurons"] == counts["neurons"]
    again = compress(found.model, dit_batches(1), run_dit, heads={"transformer_blocks.1.attn1": 1})
    assert type(again.model) is type(found.model)
    assert shape(again.model) == {**shape(found.model), "transformer_blocks.1.attn1": 1}
    assert again.model.config["squeezed_heads"] == {"transformer_blocks.1.attn1": 1}


def test_the_blocks_that_matter_least_leave_and_the_class_stays(tmp_path):
    teacher = random_dit(4, layers=4)
    for index in (1, 3):  # two that do next to nothing
        for layer in (
            teacher.transformer_blocks[index].attn1.to_out[0],
            teacher.transformer_blocks[index].ff.net[2],
        ):
            layer.weight.data *= 1e-3
            layer.bias.data *= 1e-3
    found = compress(teacher, dit_batches(), run_dit, blocks=2)
    assert [part.name for part in found.parts] == ["transformer_blocks.1", "transformer_blocks.3"]
    assert type(found.model) is type(teacher) and found.model.config["num_layers"] == 2
    assert found.lost < 1e-3
    found.model.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path).eval()
    batch = dit_batches(1)[0]
    torch.testing.assert_close(run_dit(loaded, *batch), run_dit(found.model, *batch), rtol=0, atol=0)

    heads = {f"transformer_blocks.{index}.attn1": 2 for index in (0, 1, 2)}  # by the teacher's paths
    both = compress(teacher, dit_batches(), run_dit, blocks=2, heads=heads)
    assert [part.name for part in both.parts[2:]] == [
        "transformer_blocks.0.attn1",
        "transformer_blocks.2.attn1",
    ]
    assert shape(both.model)["transformer_blocks.1.attn1"] == 2


@pytest.mark.parametrize("name", ["dit", "mdtv2 masked", "pixart"])
def test_plain_models_are_of_the_teachers_class(name, tmp_path):
    family = FAMILIES[name]
    teacher = family.build()
    found = compress(teacher, batches_of(family), run_family, heads=2, plain=True)
    assert type(found.model) is type(teacher)
    assert (found.model.config["num_attention_heads"], found.model.config["attention_head_dim"]) == (2, 12)
    found.model.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        output(loaded(**family.draw(9))), output(found.model(**family.draw(9))), rtol=0, atol=0
    )
    assert found.lost < 0.1


def test_a_plain_model_needs_every_block_to_run():
    family = FAMILIES["mdtv2"]  # whose side block runs in masked passes only
    with pytest.raises(ValueError, match=r"`side_block.attn` runs with no calibration batch"):
        compress(family.build(), batches_of(family), run_family, heads=2, plain=True)
    found = compress(family.build(), batches_of(family), run_family, heads=2)
    assert shape(found.model)["side_block.attn"] == 3


def test_a_merge_in_wide_heads_of_heads_with_the_same_maps_loses_nothing():
    teacher = random_dit(4)
    for block in teacher.transformer_blocks:
        for layer in (block.attn1.to_q, block.attn1.to_k):
            for each in (layer.weight, layer.bias):
                by_head = each.data.unflatten(0, (4, 8))
                by_head[1::2] = by_head[::2].clone()
    options = HeadOptions(pairing="adjacent")
    found = compress(teacher, dit_batches(8, 16), run_dit, heads=2, plain=True, options=options)
    assert max(part.lost for part in found.parts) < 1e-6 and found.lost < 1e-6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 5}, "`transformer_blocks.0.attn1` has 4 heads, which cannot become 5"),
        ({"heads": {"nothing": 1}}, "no `nothing` with heads"),
        ({"neurons": 1.5}, "a share of 1.5 neurons"),
        ({"neurons": 0}, "cannot become 0"),
        ({"blocks": 3}, "has 2 blocks, which cannot become 3"),
        ({"heads": 3, "plain": True}, "no config of DiTTransformer2DModel has 3 heads in its width"),
        ({"neurons": 0.5, "plain": True}, "no config of the class has fewer neurons"),
    ],
)
def test_wrong_counts_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        compress(random_dit(4), dit_batches(1), run_dit, **wrong)


def test_heads_that_share_keys_become_what_they_can():
    family = FAMILIES["lumina2"]
    teacher, name = family.build(), "layers.0.attn"
    with pytest.raises(
        ValueError,
        match=r"`layers.0.attn` shares 2 keys and values among 4 heads, which can become 1, 2, 4, not 3",
    ):
        compress(teacher, batches_of(family), run_family, heads={name: 3})
    found = compress(teacher, batches_of(family, (1,)), run_family, heads=0.3)  # 1.2 of 4
    assert {part.after for part in found.parts} == {1}


def test_shares_keep_their_number_when_they_are_squeezed_again(tmp_path):
    """8 heads on 4 keys, 6 on 3, then 4: on 2 keys, not on the 4 that 8 would have left."""
    torch.manual_seed(0)
    arguments = {
        **FAMILIES["lumina2"].arguments,
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
    }
    teacher = diffusers.Lumina2Transformer2DModel(**arguments).eval()
    batches, name = batches_of(FAMILIES["lumina2"], (1,)), "layers.0.attn"
    six = compress(teacher, batches, run_family, heads={name: 6}).model
    four = compress(six, batches, run_family, heads={name: 4}).model
    for model, heads, keys in ((six, 6, 3), (four, 4, 2)):
        block = attention_blocks(model)[name]
        assert (block.heads, block.key_value_heads) == (heads, keys)
        assert model.config["squeezed_key_value_heads"] == {name: keys}
        model.save_pretrained(tmp_path / str(heads))
        loaded = squeezed_class(type(teacher)).from_pretrained(tmp_path / str(heads)).eval()
        assert torch.equal(run_family(loaded, *batches[0]), run_family(model, *batches[0]))


def test_a_factored_head_takes_the_mean_of_the_position_biases():
    """Weighted as their logits are, by what the heads move."""
    family = FAMILIES["mdtv2"]
    teacher, name = family.build(), "in_blocks.0"
    options = HeadOptions(pairing="adjacent", queries="factor")
    found = compress(teacher, batches_of(family), run_family, heads={f"{name}.attn": 2}, options=options)
    before, after = (
        model.get_submodule(f"{name}.position_bias").table.detach().double().numpy()
        for model in (teacher, found.model)
    )
    shares, left = np.linalg.lstsq(before[:, :2], after[:, 0], rcond=None)[:2]
    assert left < 1e-9 and shares.min() > 0.01 and shares.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(after[:, 1], before[:, 2].astype(np.float32))


def test_no_batches_and_no_stack_of_blocks_are_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        compress(random_dit(4), [], run_dit, heads=2)
    family = FAMILIES["mdtv2"]
    with pytest.raises(ValueError, match="no stack of `num_layers` blocks"):
        compress(family.build(), batches_of(family), run_family, blocks=2)


def test_a_class_that_diffusers_would_load_as_another_is_refused():
    family = FAMILIES["transformer2d"]
    with pytest.raises(ValueError, match="loads a Transformer2DModel as another class"):
        compress(family.build(), batches_of(family, (1,)), run_family, heads=1)


def test_blocks_of_linear_attention_only_cannot_be_squeezed():
    family = FAMILIES["sana"]
    model = family.build()
    linear = [name for name in shape(model) if name.endswith("attn1")]
    with pytest.raises(ValueError, match="linear attention has no softmax"):
        compress(model, batches_of(family), run_family, heads={linear[0]: 1})
    for block in model.transformer_blocks:
        del block.attn2
    with pytest.raises(ValueError, match="the only attention of SanaTransformer2DModel is linear"):
        compress(model, batches_of(family), run_family, heads=1)


def test_linear_attention_stays_as_it_is_beside_others():
    family = FAMILIES["sana"]
    teacher = family.build()
    model = compress(teacher, batches_of(family), run_family, heads=1, neurons=0.5).model
    for name, count in shape(teacher).items():
        left = shape(model)[name]
        assert left == (count if name.endswith("attn1") else 1 if name.endswith("attn2") else count // 2)
    point = model.transformer_blocks[0].ff.conv_depth
    assert point.groups == point.in_channels == point.out_channels == point.weight.shape[0]


@pytest.mark.parametrize("method", ["drop", "magnitude"])
def test_heads_that_are_dropped_leave_the_others_as_they_are(method):
    """The baselines: queries, keys and values of the heads that stay are the teacher's, the output is least squares."""
    teacher = random_dit(heads=4, layers=1)
    dead = 1  # a head that puts out nothing, and whose weights are small, is the one to go
    name, width = "transformer_blocks.0.attn1", 8
    block: Any = teacher.get_submodule(name)
    rows = slice(dead * width, (dead + 1) * width)
    block.to_out[0].weight.data[:, rows] = 0
    for layer in (block.to_q, block.to_k, block.to_v):
        layer.weight.data[rows] *= 1e-3
    found = compress(teacher, dit_batches(), run_dit, heads=3, options=HeadOptions(method=method))
    (part,) = found.parts
    assert part.lost < 1e-8 and found.lost < 1e-8
    kept = [i for i in range(4 * width) if i // width != dead]
    small: Any = found.model.get_submodule(name)
    assert torch.equal(small.to_q.weight, block.to_q.weight[kept])
    assert torch.equal(small.to_k.weight, block.to_k.weight[kept])


def test_random_heads_are_fitted_and_lose_more_than_merged_ones():
    teacher = random_dit(heads=4, layers=1)
    lost = {}
    for method in ("merge", "random"):
        found = compress(teacher, dit_batches(), run_dit, heads=2, options=HeadOptions(method=method))
        (part,) = found.parts
        assert part.lost <= part.lost_before
        lost[method] = part.lost
    assert lost["merge"] < lost["random"] < 1


def test_baselines_are_for_blocks_of_one_stream():
    family = FAMILIES["sd3"]
    with pytest.raises(ValueError, match="take the method `merge`"):
        compress(family.build(), batches_of(family), run_family, heads=1, options=HeadOptions(method="drop"))


@pytest.mark.parametrize(
    "options",
    [
        HeadOptions(),
        HeadOptions(pairing="adjacent"),
        HeadOptions(method="drop"),
        HeadOptions(queries="factor"),
    ],
)
def test_what_puts_out_nothing_loses_nothing(options):
    """A pruned block, or one that never learned anything."""
    teacher = random_dit(4)
    block = teacher.transformer_blocks[0]
    for layer in (block.attn1.to_out[0], block.ff.net[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    batches = dit_batches()
    found = compress(teacher, batches, run_dit, heads=2, neurons=16, options=options)
    assert {part.name: part.lost for part in found.parts}.items() >= {
        ("transformer_blocks.0.attn1", 0.0),
        ("transformer_blocks.0.ff", 0.0),
    }
    assert all(parameter.isfinite().all() for parameter in found.model.parameters())
    assert run_dit(found.model, *batches[0]).isfinite().all()
