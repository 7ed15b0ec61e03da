"""Several captions of an image: each epoch takes the next one, whoever reads it, and however a step is dealt out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shd_diffusion.config import DataConfig
from shd_diffusion.data import LatentSource, build_source
from shd_diffusion.data.cache_shards import Shard
from shd_diffusion.data.prepare import write_manifest
from shd_diffusion.files import save_tensors, sha256
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.training.batches import BatchLayout, BatchLoader, NoiseSettings, StepSampler

# Captions of each image, shard by shard, and the shards' sizes of latents: two buckets of 7 and 4 images.
SHARDS = [([2, 1, 3, 2], [4, 4]), ([2, 5, 1], [4, 4]), ([2, 3, 2, 2], [2, 6])]
COUNTS = [count for counts, _ in SHARDS for count in counts]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LatentSource:
    """A cache in which moments tell their image, and a condition its image and which of its captions it is of."""
    folder = tmp_path_factory.mktemp("cache")
    records, image = [], 0
    for number, (counts, size) in enumerate(SHARDS):
        shard, first = Shard(folder, number, range(image, image + len(counts)), (32, 32), "x"), image
        image += len(counts)
        content = {
            "moments": torch.arange(first, image).view(-1, 1, 1, 1, 1).expand(-1, 2, 8, *size).float().contiguous(),
            "told": torch.tensor([(first + i, c) for i, count in enumerate(counts) for c in range(count)]),
            "captions": torch.tensor([0, *counts]).cumsum(0),
        }  # fmt: skip
        save_tensors(content, shard.path)
        records.append(
            {
                "file": str(shard.path.relative_to(folder)),
                "bytes": shard.path.stat().st_size,
                "sha256": sha256(shard.path),
                "images": len(counts),
                "size": size,
                "unreadable": [],
            }
        )
    manifest = {
        "identity": {"source": "", "image_shape": [3, 32, 32], "vae": "", "prompts": {"encoders": "e"}},
        "vae": {"path": "", "scaling": {"scale": [1.0], "shift": [0.0]}},
        "shape": [4, 4, 4], "has_variance": True, "conditions": ["told"], "num_classes": None, "null": None,
        "shards": records,
    }  # fmt: skip
    write_manifest(folder, manifest)
    source = build_source(DataConfig(name="latents", path=str(folder)))
    assert isinstance(source, LatentSource) and len(source) == len(COUNTS)
    return source


def test_each_epoch_takes_the_next_caption(source: LatentSource) -> None:
    for index, count in enumerate(COUNTS):
        items = [source.item(index, epoch) for epoch in range(3 * count)]
        assert all(item["told"][0] == index == item["moments"][0, 0, 0, 0] for item in items)
        captions = [int(item["told"][1]) for item in items]
        assert captions == [(captions[0] + epoch) % count for epoch in range(3 * count)]
    first = [int(source.item(index, 0)["told"][1]) for index, count in enumerate(COUNTS) if count > 1]
    assert len(set(first)) > 1  # the first epoch is not that of the first captions


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_of_items_tell_their_epoch(workers: int, source: LatentSource) -> None:
    source.num_workers = workers
    wanted = [[epoch * len(source) + index for epoch in range(3)] for index in (1, 4, 10)]
    found = [batch["told"].tolist() for batch in source.batches(wanted)]
    source.num_workers = 0
    assert found == [[source.item(i, e)["told"].tolist() for e in range(3)] for i in (1, 4, 10)]


PROCESS = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))
STEPS = 24


def told(source: LatentSource, layout: BatchLayout, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """By step, which captions of which images the process of a layout sees, and with which noise."""
    settings = NoiseSettings(source.shape, latent_noise=True)
    loader = BatchLoader(source, PROCESS, {}, 0, layout, settings, torch.device("cpu"), (start, STEPS))
    for step in range(start, STEPS):
        batches = [batch for batch, _ in loader.step(step)]
        assert len({batch.clean.shape[2:] for batch in batches}) == 1
        yield torch.cat([b.condition["told"] for b in batches]), torch.cat([b.noise for b in batches])


@pytest.mark.parametrize(("processes", "micro"), [(1, 1), (1, 3), (2, None), (2, 1), (4, None)])
def test_captions_follow_from_seed_step_and_sample(
    processes: int, micro: int | None, source: LatentSource
) -> None:
    alone = list(told(source, BatchLayout(4)))
    shares = [list(told(source, BatchLayout(4, micro, processes, p))) for p in range(processes)]
    for step, (captions, noise) in enumerate(alone):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), captions)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), noise)


def test_a_resumed_run_sees_the_captions_that_it_would_have_seen(source: LatentSource) -> None:
    whole, rest = list(told(source, BatchLayout(4))), list(told(source, BatchLayout(4), start=11))
    for (captions, noise), (again, its_noise) in zip(whole[11:], rest, strict=True):
        assert torch.equal(captions, again) and torch.equal(noise, its_noise)


def test_batches_are_of_one_size_and_each_caption_comes_round(source: LatentSource) -> None:
    assert source.groups == [range(7), range(7, 11)]
    seen: Counter[tuple[int, int]] = Counter()
    for captions, noise in told(source, BatchLayout(4)):
        of_group = [image < 7 for image in captions[:, 0].tolist()]
        assert len(set(of_group)) == 1
        assert noise.shape[2:] == ((4, 4) if of_group[0] else (2, 6))
        seen.update(map(tuple, captions.tolist()))
    for image in range(7, 11):  # its bucket is one batch: it is seen in each of the twelve epochs
        count = COUNTS[image]
        assert [seen[image, caption] for caption in range(count)] == [STEPS // 2 // count] * count


def test_the_first_items_of_a_sampler_are_the_cache_s(source: LatentSource) -> None:
    """Numbers beyond the data are items of later epochs: none is read under another image's name."""
    numbers = [n for batch in StepSampler(0, source.groups, BatchLayout(4), 0, STEPS) for n in batch]
    for number, captions in zip(
        numbers, torch.cat([c for c, _ in told(source, BatchLayout(4))]), strict=True
    ):
        assert int(captions[0]) == number % len(source)
        assert int(captions[1]) == int(source.item(number % len(source), number // len(source))["told"][1])
